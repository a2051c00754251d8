"""The HTTP connections of the S3 and GCS stores."""
