variable "region" {
  description = "Region of the bucket."
  type        = string
  default     = "us-east-1"
  nullable    = false
}

variable "name" {
  description = "Whose bucket it is: a person's or a branch's name."
  type        = string
  nullable    = false

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9-]{0,28}[a-z0-9]$", var.name))
    error_message = "2 to 30 lower-case letters, digits and hyphens, and no hyphen at either end."
  }
}

variable "kms_key_arn" {
  description = "KMS key for the tests of SSE-KMS; SSE-S3 where it is null."
  type        = string
  default     = null
}
