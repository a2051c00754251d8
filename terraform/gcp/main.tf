# A bucket for checkpoints: nobody's business, encrypted, and what was deleted by mistake can come back for a while.

resource "google_storage_bucket" "this" {
  #checkov:skip=CKV_GCP_62: log_bucket turns the usage log on; which bucket takes it is the project's business
  #checkov:skip=CKV_GCP_78: versioning turns it on; soft delete keeps what was deleted, and a checkpoint is never half overwritten
  project                     = var.project
  name                        = var.bucket
  location                    = var.location
  force_destroy               = var.force_destroy
  labels                      = var.labels
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"

  soft_delete_policy {
    retention_duration_seconds = var.soft_delete_days * 86400
  }

  versioning {
    enabled = var.versioning
  }

  dynamic "encryption" {
    for_each = var.kms_key_name == null ? [] : [var.kms_key_name]

    content {
      default_kms_key_name = encryption.value
    }
  }

  dynamic "logging" {
    for_each = var.log_bucket == null ? [] : [var.log_bucket]

    content {
      log_bucket = logging.value
    }
  }

  # Uploads that a killed job leaves, which cost what objects do. `cloudckpt gc` aborts them as well.
  lifecycle_rule {
    action {
      type = "AbortIncompleteMultipartUpload"
    }

    condition {
      age = 1
    }
  }

  lifecycle_rule {
    action {
      type = "Delete"
    }

    condition {
      days_since_noncurrent_time = var.noncurrent_days
      with_state                 = "ARCHIVED"
    }
  }

  dynamic "lifecycle_rule" {
    for_each = var.transition == null ? [] : [var.transition]

    content {
      action {
        type          = "SetStorageClass"
        storage_class = lifecycle_rule.value.storage_class
      }

      condition {
        age            = lifecycle_rule.value.days
        matches_prefix = local.below == "" ? [] : [local.below]
      }
    }
  }

  dynamic "lifecycle_rule" {
    for_each = var.expiration_days == null ? [] : [var.expiration_days]

    content {
      action {
        type = "Delete"
      }

      condition {
        age = lifecycle_rule.value
      }
    }
  }

  depends_on = [google_kms_crypto_key_iam_member.storage]
}

# Cloud Storage itself uses the key; who reads and writes objects needs no permission on it.

data "google_storage_project_service_account" "this" {
  project = var.project
}

resource "google_kms_crypto_key_iam_member" "storage" {
  count         = var.kms_key_name == null ? 0 : 1
  crypto_key_id = var.kms_key_name
  role          = "roles/cloudkms.cryptoKeyEncrypterDecrypter"
  member        = "serviceAccount:${data.google_storage_project_service_account.this.email_address}"
}
