# A bucket, and instances that train.

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

module "checkpoints" {
  source = "../../"

  bucket    = "example-checkpoints"
  instances = ["trainer"]
}

output "uri" {
  description = "Where runs go."
  value       = module.checkpoints.uri
}

output "environment" {
  description = "Environment variables to set on the instances."
  value       = module.checkpoints.environment
}

output "instance_profiles" {
  description = "The profile to start instances with."
  value       = module.checkpoints.instance_profiles
}
