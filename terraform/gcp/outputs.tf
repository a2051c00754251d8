output "uri" {
  description = "Where runs go: `cloudckpt.Checkpointer(\"<uri>/my-run\")`."
  value       = var.prefix == "" ? "gs://${google_storage_bucket.this.name}" : "gs://${google_storage_bucket.this.name}/${var.prefix}"
}

output "environment" {
  description = "Environment variables to set for jobs and for the command line."
  value       = { CLOUDCKPT_PROJECT = var.project }
}

output "bucket" {
  description = "Name of the bucket."
  value       = google_storage_bucket.this.name
}

output "service_accounts" {
  description = "E-mail addresses of the service accounts, by trainer, reader and janitor."
  value       = { for role, account in google_service_account.this : role => account.email }
}

output "roles" {
  description = "Names of the custom roles, to grant to accounts that are there already."
  value       = { for name, role in google_project_iam_custom_role.this : name => role.id }
}
