# A throw-away bucket for tests on S3 itself. What a test that died leaves is gone after a day, and the bucket with `terraform destroy`.

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
  region = var.region
}

data "aws_caller_identity" "this" {}

module "bucket" {
  source = "../"

  bucket          = "cloudckpt-test-${data.aws_caller_identity.this.account_id}-${var.name}"
  name            = "cloudckpt-test-${var.name}"
  prefix          = "live"
  kms_key_arn     = var.kms_key_arn
  expiration_days = 1
  force_destroy   = true
  tags            = { purpose = "cloudckpt-test", "safe-to-delete" = "yes" }
}
