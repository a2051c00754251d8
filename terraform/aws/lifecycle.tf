# What goes by itself: parts that a killed job left, and versions that nobody needs any more.

resource "aws_s3_bucket_lifecycle_configuration" "this" {
  #checkov:skip=CKV_AWS_300: the first rule is what it looks for; checkov loses the rules beside a dynamic one without elements, and a test holds this one
  bucket = aws_s3_bucket.this.id

  rule {
    id     = "abort-incomplete-uploads"
    status = "Enabled"

    filter {}

    abort_incomplete_multipart_upload {
      days_after_initiation = 1
    }
  }

  rule {
    id     = "expire-noncurrent-versions"
    status = "Enabled"

    filter {}

    noncurrent_version_expiration {
      noncurrent_days = var.noncurrent_days
    }
  }

  dynamic "rule" {
    for_each = var.transition == null ? [] : [var.transition]

    content {
      id     = "move-old-checkpoints"
      status = "Enabled"

      filter {
        prefix = local.below
      }

      transition {
        days          = rule.value.days
        storage_class = rule.value.storage_class
      }
    }
  }

  # By age where that is asked for. Else what is left of objects whose versions are all gone: the two exclude each other.
  rule {
    id     = "expire"
    status = "Enabled"

    filter {}

    expiration {
      days                         = var.expiration_days
      expired_object_delete_marker = var.expiration_days == null ? true : null
    }
  }

  # Rules about versions are taken amiss while versioning is being turned on.
  depends_on = [aws_s3_bucket_versioning.this]
}
