variable "project" {
  description = "Project of the bucket."
  type        = string
  nullable    = false
}

variable "location" {
  description = "Where the bucket is."
  type        = string
  default     = "us-central1"
  nullable    = false
}

variable "name" {
  description = "Whose bucket it is: a person's or a branch's name."
  type        = string
  nullable    = false

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9-]{0,14}[a-z0-9]$", var.name))
    error_message = "2 to 16 lower-case letters, digits and hyphens, and no hyphen at either end."
  }
}

variable "kms_key_name" {
  description = "Cloud KMS key for the tests of CMEK; Google's own keys where it is null."
  type        = string
  default     = null
}
