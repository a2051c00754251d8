"""HTTP connections of the S3 and GCS stores, and the loop that moves their bodies."""
