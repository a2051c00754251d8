variable "project" {
  description = "Project of the bucket, the roles and the service accounts."
  type        = string
  nullable    = false

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{4,28}[a-z0-9]$", var.project))
    error_message = "A project's ID has 6 to 30 lower-case letters, digits and hyphens, begins with a letter, and doesn't end with a hyphen."
  }
}

variable "bucket" {
  description = "Name of the bucket to create."
  type        = string
  nullable    = false

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9_-]{1,61}[a-z0-9]$", var.bucket))
    error_message = "A bucket's name has 3 to 63 lower-case letters, digits, _ and -, and begins and ends with a letter or digit."
  }

  # Cloud Storage documentation, "Bucket naming requirements".
  validation {
    condition     = !can(regex("^goog|g[o0]{2}g[l1]e", var.bucket))
    error_message = "Google reserves names that begin with goog, or that contain google or what looks like it, such as g00gle."
  }
}

variable "location" {
  description = "Where the bucket is: the region of the machines that train, such as us-central1."
  type        = string
  nullable    = false

  validation {
    condition     = can(regex("^[A-Za-z][A-Za-z0-9-]*$", var.location))
    error_message = "A region such as us-central1, a dual-region such as NAM4, or a multi-region such as EU."
  }
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

  validation {
    condition     = !can(regex("(^|/)[.]{1,2}(/|$)", var.prefix)) && !can(regex("^[.]well-known/acme-challenge(/|$)", var.prefix))
    error_message = "No name in a prefix is . or .., and Google reserves .well-known/acme-challenge."
  }

  validation {
    condition     = try(length(var.prefix) <= 512, false)
    error_message = "A prefix has at most 512 characters: Google allows 1024 in an object's name."
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
    condition     = var.noncurrent_days >= 1 && var.noncurrent_days <= 36500 && floor(var.noncurrent_days) == var.noncurrent_days
    error_message = "A whole number of days, from 1 to 36500."
  }
}

variable "soft_delete_days" {
  description = "Days for which what was deleted can be restored, and is paid for; 0 turns it off."
  type        = number
  default     = 7
  nullable    = false

  validation {
    condition     = var.soft_delete_days == 0 || (var.soft_delete_days >= 7 && var.soft_delete_days <= 90 && floor(var.soft_delete_days) == var.soft_delete_days)
    error_message = "A whole number of days, from 7 to 90, or 0."
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
    condition     = var.transition == null ? true : try(contains(["NEARLINE", "COLDLINE", "ARCHIVE"], var.transition.storage_class), false)
    error_message = "One of NEARLINE, COLDLINE and ARCHIVE."
  }

  validation {
    condition     = var.transition == null ? true : try(var.transition.days >= 1 && var.transition.days <= 36500 && floor(var.transition.days) == var.transition.days, false)
    error_message = "A whole number of days, from 1 to 36500."
  }
}

variable "expiration_days" {
  description = "Days after which every object is deleted, committed checkpoints too; never where it is null. For throw-away buckets."
  type        = number
  default     = null

  validation {
    condition     = var.expiration_days == null ? true : var.expiration_days >= 1 && var.expiration_days <= 36500 && floor(var.expiration_days) == var.expiration_days
    error_message = "A whole number of days, from 1 to 36500."
  }

  validation {
    condition     = var.expiration_days == null || var.transition == null ? true : try(var.expiration_days > var.transition.days, true)
    error_message = "Objects have to move before they are deleted: give more expiration_days than transition.days, or one of the two."
  }
}

variable "log_bucket" {
  description = "Bucket that takes the usage log; none is kept where it is null."
  type        = string
  default     = null

  validation {
    condition     = var.log_bucket == null ? true : can(regex("^[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]$", var.log_bucket))
    error_message = "The name of a bucket: 3 to 222 lower-case letters, digits, dots, _ and -."
  }

  validation {
    condition     = var.log_bucket == null ? true : var.log_bucket != var.bucket
    error_message = "Another bucket than the one that is logged: each log would be logged in turn."
  }
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
    condition     = alltrue([for one in var.workload_identities : try(contains(["trainer", "reader", "janitor"], one.role), false)])
    error_message = "The roles are trainer, reader and janitor."
  }

  validation {
    condition     = alltrue([for one in var.workload_identities : can(regex("^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", one.namespace))])
    error_message = "A namespace has 1 to 63 lower-case letters, digits and hyphens, and no hyphen at either end."
  }

  validation {
    condition     = alltrue([for one in var.workload_identities : can(regex("^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$", one.name))])
    error_message = "A service account's name has 1 to 253 lower-case letters, digits, dots and hyphens, and begins and ends with a letter or a digit."
  }

  # The annotation of a Kubernetes service account names one account of Google's.
  validation {
    condition     = try(length(distinct([for one in var.workload_identities : "${one.namespace}/${one.name}"])) == length(var.workload_identities), true)
    error_message = "A service account gets one role: name each namespace and service account once."
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

  validation {
    condition     = length(var.labels) <= 64 && alltrue([for key, value in var.labels : can(regex("^[\\p{Ll}\\p{Lo}][\\p{Ll}\\p{Lo}\\p{N}_-]{0,62}$", key)) && can(regex("^[\\p{Ll}\\p{Lo}\\p{N}_-]{0,63}$", value))])
    error_message = "At most 64 labels, with keys and values of at most 63 lower-case letters, digits, _ and -, and a letter first in a key."
  }
}
