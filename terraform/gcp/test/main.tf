# A throw-away bucket for tests on GCS itself. What a test that died leaves is gone after a day, and the bucket with `terraform destroy`.

terraform {
  required_version = ">= 1.9"

  required_providers {
    google = {
      source  = "hashicorp/google"
      version = ">= 7.0, < 9.0"
    }
  }
}

provider "google" {
  project = var.project
  region  = var.location
}

module "bucket" {
  source = "../"

  project          = var.project
  bucket           = "cloudckpt-test-${var.project}-${var.name}"
  location         = var.location
  name             = "ckpt-${var.name}"
  prefix           = "live"
  kms_key_name     = var.kms_key_name
  soft_delete_days = 0
  expiration_days  = 1
  force_destroy    = true
  labels           = { purpose = "cloudckpt-test", safe-to-delete = "yes" }
}
