# Two teams' jobs on EKS, a key of one's own, a job that cleans up, and old checkpoints on cheaper storage.

terraform {
  required_version = ">= 1.9"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 6.0"
    }
  }
}

provider "aws" {
  region = "us-east-1"
}

variable "kms_key_arn" {
  description = "KMS key that encrypts the checkpoints."
  type        = string
}

module "checkpoints" {
  source = "../../"

  bucket      = "example-checkpoints"
  prefix      = "runs"
  kms_key_arn = var.kms_key_arn
  transition  = { days = 90, storage_class = "GLACIER_IR" }

  service_accounts = [
    { role = "trainer", cluster = "gpu", namespace = "training", name = "trainer" },
    { role = "reader", cluster = "gpu", namespace = "evaluation", name = "evaluator" },
    { role = "janitor", cluster = "gpu", namespace = "training", name = "janitor" },
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
