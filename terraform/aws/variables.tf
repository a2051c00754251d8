variable "bucket" {
  description = "Name of the bucket to create."
  type        = string
  nullable    = false

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9-]{1,61}[a-z0-9]$", var.bucket))
    error_message = "A bucket's name has 3 to 63 lower-case letters, digits and hyphens, and neither begins nor ends with a hyphen."
  }

  # S3 user guide, "General purpose bucket naming rules".
  validation {
    condition     = !can(regex("^(xn--|sthree-|amzn-s3-demo-)", var.bucket))
    error_message = "S3 reserves names that begin with xn--, sthree- or amzn-s3-demo-."
  }

  validation {
    condition     = !can(regex("(-s3alias|--ol-s3|--x-s3|--table-s3|-an)$", var.bucket))
    error_message = "S3 reserves names that end with -s3alias, --ol-s3, --x-s3, --table-s3 or -an."
  }
}

variable "name" {
  description = "What the names of policies and roles begin with; the bucket's name where it is null."
  type        = string
  default     = null

  validation {
    condition     = can(regex("^[A-Za-z0-9_-]{1,55}$", var.name == null ? var.bucket : var.name))
    error_message = "IAM allows 64 characters in a role's name: give a name of 1 to 55 letters, digits, _ and -. A bucket's name of more than 55 characters needs a name beside it."
  }

  validation {
    condition     = var.name == null ? true : can(regex("^[A-Za-z0-9](.*[A-Za-z0-9])?$", var.name))
    error_message = "A name begins and ends with a letter or a digit: -trainer, -reader or -janitor follows it."
  }
}

variable "prefix" {
  description = "Prefix of keys that the policies are for, without a slash at either end; the whole bucket where it is empty."
  type        = string
  default     = ""
  nullable    = false

  validation {
    condition     = can(regex("^$|^[A-Za-z0-9_.=-]+(/[A-Za-z0-9_.=-]+)*$", var.prefix))
    error_message = "A prefix is names joined by slashes, of letters, digits and _.=- alone: in a policy * and ? are wildcards."
  }

  validation {
    condition     = !can(regex("(^|/)[.]{1,2}(/|$)", var.prefix))
    error_message = "No name in a prefix is . or ..: clients take them for folders."
  }

  validation {
    condition     = try(length(var.prefix) <= 512, false)
    error_message = "A prefix has at most 512 characters: S3 allows 1024 in a key, and descriptions in IAM have 1000."
  }
}

variable "kms_key_arn" {
  description = "KMS key that encrypts what is put into the bucket; S3's own keys (SSE-S3) where it is null."
  type        = string
  default     = null

  validation {
    condition     = var.kms_key_arn == null ? true : can(regex("^arn:[a-z-]+:kms:[a-z0-9-]+:[0-9]{12}:key/[A-Za-z0-9-]+$", var.kms_key_arn))
    error_message = "The ARN of a key, not of an alias: policies need the key's own."
  }
}

variable "versioning" {
  description = "Keep versions of what is overwritten or deleted, for noncurrent_days."
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

variable "transition" {
  description = "Days after which objects below the prefix move to another storage class; never where it is null."
  type = object({
    days          = number
    storage_class = string
  })
  default = null

  # Classes that have to be restored first are left out: a checkpoint there does not load.
  validation {
    condition     = var.transition == null ? true : try(contains(["STANDARD_IA", "ONEZONE_IA", "INTELLIGENT_TIERING", "GLACIER_IR"], var.transition.storage_class), false)
    error_message = "One of STANDARD_IA, ONEZONE_IA, INTELLIGENT_TIERING and GLACIER_IR."
  }

  validation {
    condition     = var.transition == null ? true : try(var.transition.days >= 30 && var.transition.days <= 36500 && floor(var.transition.days) == var.transition.days, false)
    error_message = "A whole number of days, from 30 to 36500: an object that moves or is deleted earlier is charged for 30."
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
  description = "Bucket that takes the access log; none is kept where it is null."
  type        = string
  default     = null

  validation {
    condition     = var.log_bucket == null ? true : can(regex("^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$", var.log_bucket))
    error_message = "The name of a bucket: 3 to 63 lower-case letters, digits, dots and hyphens."
  }

  validation {
    condition     = var.log_bucket == null ? true : var.log_bucket != var.bucket
    error_message = "Another bucket than the one that is logged: each log would be logged in turn."
  }
}

variable "instances" {
  description = "Roles (trainer, reader, janitor) for which EC2 instances get a role and an instance profile."
  type        = set(string)
  default     = []
  nullable    = false

  validation {
    condition     = alltrue([for role in var.instances : try(contains(["trainer", "reader", "janitor"], role), false)])
    error_message = "The roles are trainer, reader and janitor."
  }
}

variable "service_accounts" {
  description = "Service accounts of EKS clusters and the role that each gets, by EKS Pod Identity."
  type = list(object({
    role      = string
    cluster   = string
    namespace = string
    name      = string
  }))
  default  = []
  nullable = false

  validation {
    condition     = alltrue([for account in var.service_accounts : try(contains(["trainer", "reader", "janitor"], account.role), false)])
    error_message = "The roles are trainer, reader and janitor."
  }

  validation {
    condition     = alltrue([for account in var.service_accounts : can(regex("^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$", account.cluster))])
    error_message = "A cluster's name has 1 to 100 letters, digits, _ and -, and begins with a letter or a digit."
  }

  validation {
    condition     = alltrue([for account in var.service_accounts : can(regex("^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", account.namespace))])
    error_message = "A namespace has 1 to 63 lower-case letters, digits and hyphens, and no hyphen at either end."
  }

  validation {
    condition     = alltrue([for account in var.service_accounts : can(regex("^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$", account.name))])
    error_message = "A service account's name has 1 to 253 lower-case letters, digits, dots and hyphens, and begins and ends with a letter or a digit."
  }

  # EKS keeps one association for a service account.
  validation {
    condition     = try(length(distinct([for account in var.service_accounts : "${account.cluster}/${account.namespace}/${account.name}"])) == length(var.service_accounts), true)
    error_message = "A service account gets one role: name each cluster, namespace and service account once."
  }
}

variable "force_destroy" {
  description = "Let terraform destroy delete the bucket with everything in it."
  type        = bool
  default     = false
  nullable    = false
}

variable "tags" {
  description = "Tags of the bucket, the policies and the roles."
  type        = map(string)
  default     = {}
  nullable    = false

  validation {
    condition     = length(var.tags) <= 50 && alltrue([for key, value in var.tags : can(regex("^[\\p{L}\\p{Z}\\p{N}_.:/=+@-]{1,128}$", key)) && can(regex("^[\\p{L}\\p{Z}\\p{N}_.:/=+@-]{0,256}$", value))])
    error_message = "At most 50 tags, with keys of 1 to 128 and values of at most 256 letters, digits, spaces and _.:/=+-@."
  }

  validation {
    condition     = !anytrue([for key, value in var.tags : startswith(lower(key), "aws:")]) && length(distinct([for key, value in var.tags : lower(key)])) == length(var.tags)
    error_message = "AWS reserves keys that begin with aws:, and IAM takes keys that differ in upper and lower case alone for the same."
  }
}
