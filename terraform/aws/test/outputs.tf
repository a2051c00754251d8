output "uri" {
  description = "Where tests may write."
  value       = module.bucket.uri
}

output "environment" {
  description = "Environment variables to set for the tests."
  value       = module.bucket.environment
}

output "policy_arns" {
  description = "ARNs of the policies, to test each of them with."
  value       = module.bucket.policy_arns
}
