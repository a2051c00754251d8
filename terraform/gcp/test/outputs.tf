output "uri" {
  description = "Where tests may write."
  value       = module.bucket.uri
}

output "environment" {
  description = "Environment variables to set for the tests."
  value       = module.bucket.environment
}

output "service_accounts" {
  description = "The accounts of the roles, to test each of them with."
  value       = module.bucket.service_accounts
}
