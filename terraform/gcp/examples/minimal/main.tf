# A bucket, and accounts to train, read and clean up with.

terraform {
  required_version = ">= 1.9"

  required_providers {
    google = {
      source  = "hashicorp/google"
      version = ">= 7.0, < 9.0"
    }
  }
}

module "checkpoints" {
  source = "../../"

  project  = "example-project"
  bucket   = "example-checkpoints"
  location = "us-central1"
}

output "uri" {
  description = "Where runs go."
  value       = module.checkpoints.uri
}

output "environment" {
  description = "Environment variables to set on the machines."
  value       = module.checkpoints.environment
}

output "service_accounts" {
  description = "The accounts to start machines with."
  value       = module.checkpoints.service_accounts
}
