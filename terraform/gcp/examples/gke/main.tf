# Jobs on GKE, a key of one's own, a job that cleans up, and old checkpoints on cheaper storage.

terraform {
  required_version = ">= 1.9"

  required_providers {
    google = {
      source  = "hashicorp/google"
      version = ">= 7.0, < 9.0"
    }
  }
}

variable "kms_key_name" {
  description = "Cloud KMS key that encrypts the checkpoints."
  type        = string
}

module "checkpoints" {
  source = "../../"

  project      = "example-project"
  bucket       = "example-checkpoints"
  location     = "us-central1"
  prefix       = "runs"
  kms_key_name = var.kms_key_name
  transition   = { days = 90, storage_class = "COLDLINE" }

  workload_identities = [
    { role = "trainer", namespace = "training", name = "trainer" },
    { role = "reader", namespace = "evaluation", name = "evaluator" },
    { role = "janitor", namespace = "training", name = "janitor" },
  ]
}

output "uri" {
  description = "Where runs go."
  value       = module.checkpoints.uri
}

output "environment" {
  description = "Environment variables to set in the pods."
  value       = module.checkpoints.environment
}

output "service_accounts" {
  description = "What to annotate the Kubernetes service accounts with: iam.gke.io/gcp-service-account."
  value       = module.checkpoints.service_accounts
}
