variable "project" {
  description = "Project of the bucket, the roles and the service accounts."
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{4,28}[a-z0-9]$", var.project))
    error_message = "A project's ID has 6 to 30 lower-case letters, digits and hyphens."
  }
}

variable "bucket" {
  description = "Name of the bucket to create."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9_-]{1,61}[a-z0-9]$", var.bucket))
    error_message = "A bucket's name has 3 to 63 lower-case letters, digits, _ and -, and begins and ends with a letter or digit."
  }
}

variable "location" {
  description = "Where the bucket is: the region of the machines that train, such as us-central1."
  type        = string
}

variable "name" {
  description = "What the names of custom roles and service accounts begin with; made of the bucket's name where it is null."
  type        = string
  default     = null

  validation {
    condition     = var.name == null ? true : can(regex("^[a-z]([a-z0-9-]{0,20}[a-z0-9])?$", var.name))
    error_message = "Google allows 30 characters in a service account's name, and the role takes 8 of them: give 1 to 22 lower-case letters, digits and hyphens, a letter first and no hyphen last."
  }
}

variable "prefix" {
  description = "Prefix of names that the roles are for, without a slash at either end; the whole bucket where it is empty."
  type        = string
  default     = ""
  nullable    = false

  validation {
    condition     = can(regex("^$|^[A-Za-z0-9_.=-]+(/[A-Za-z0-9_.=-]+)*$", var.prefix))
    error_message = "A prefix is names joined by slashes, of letters, digits and _.=- alone."
  }
}

variable "kms_key_name" {
  description = "Cloud KMS key that encrypts what is put into the bucket (CMEK); Google's own keys where it is null."
  type        = string
  default     = null

  validation {
    condition     = var.kms_key_name == null ? true : can(regex("^projects/[^/]+/locations/[^/]+/keyRings/[^/]+/cryptoKeys/[^/]+$", var.kms_key_name))
    error_message = "A key is named projects/PROJECT/locations/LOCATION/keyRings/RING/cryptoKeys/KEY."
  }
}

variable "versioning" {
  description = "Keep versions of what is overwritten or deleted, for noncurrent_days. Soft delete does the same for less trouble."
  type        = bool
  default     = false
  nullable    = false
}

variable "noncurrent_days" {
  description = "Days after which versions that were overwritten or deleted go for good."
  type        = number
  default     = 7
  nullable    = false

  validation {
    condition     = var.noncurrent_days >= 1 && floor(var.noncurrent_days) == var.noncurrent_days
    error_message = "A whole number of days, at least 1."
  }
}

variable "soft_delete_days" {
  description = "Days for which what was deleted can be restored, and is paid for; 0 turns it off."
  type        = number
  default     = 7
  nullable    = false

  validation {
    condition     = var.soft_delete_days == 0 || (var.soft_delete_days >= 7 && var.soft_delete_days <= 90)
    error_message = "Google takes 0, or 7 to 90 days."
  }
}

variable "transition" {
  description = "Days after which objects below the prefix move to another storage class; never where it is null."
  type = object({
    days          = number
    storage_class = string
  })
  default = null

  validation {
    condition     = var.transition == null ? true : contains(["NEARLINE", "COLDLINE", "ARCHIVE"], var.transition.storage_class)
    error_message = "One of NEARLINE, COLDLINE and ARCHIVE."
  }
}

variable "expiration_days" {
  description = "Days after which every object is deleted, committed checkpoints too; never where it is null. For throw-away buckets."
  type        = number
  default     = null

  validation {
    condition     = var.expiration_days == null ? true : var.expiration_days >= 1 && floor(var.expiration_days) == var.expiration_days
    error_message = "A whole number of days, at least 1."
  }
}

variable "log_bucket" {
  description = "Bucket that takes the usage log; none is kept where it is null."
  type        = string
  default     = null
}

variable "workload_identities" {
  description = "Kubernetes service accounts of the project's GKE clusters, and the role that each gets, by workload identity."
  type = list(object({
    role      = string
    namespace = string
    name      = string
  }))
  default  = []
  nullable = false

  validation {
    condition     = alltrue([for one in var.workload_identities : contains(["trainer", "reader", "janitor"], one.role)])
    error_message = "The roles are trainer, reader and janitor."
  }
}

variable "force_destroy" {
  description = "Let terraform destroy delete the bucket with everything in it."
  type        = bool
  default     = false
  nullable    = false
}

variable "labels" {
  description = "Labels of the bucket."
  type        = map(string)
  default     = {}
  nullable    = false
}
