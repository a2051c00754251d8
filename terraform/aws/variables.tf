variable "bucket" {
  description = "Name of the bucket to create."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9-]{1,61}[a-z0-9]$", var.bucket))
    error_message = "A bucket's name has 3 to 63 lower-case letters, digits and hyphens, and neither begins nor ends with a hyphen."
  }
}

variable "name" {
  description = "What the names of policies and roles begin with; the bucket's name where it is null."
  type        = string
  default     = null

  validation {
    condition     = can(regex("^[A-Za-z0-9_-]{1,55}$", coalesce(var.name, var.bucket)))
    error_message = "IAM allows 64 characters in a role's name, and the role takes 9 of them: give a name of at most 55 letters, digits, _ and -."
  }
}

variable "prefix" {
  description = "Prefix of keys that the policies are for, without a slash at either end; the whole bucket where it is empty."
  type        = string
  default     = ""

  validation {
    condition     = can(regex("^$|^[A-Za-z0-9_.=-]+(/[A-Za-z0-9_.=-]+)*$", var.prefix))
    error_message = "A prefix is names joined by slashes, of letters, digits and _.=- alone: in a policy * and ? are wildcards."
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
    condition     = var.noncurrent_days >= 1 && floor(var.noncurrent_days) == var.noncurrent_days
    error_message = "A whole number of days, at least 1."
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
    condition     = var.transition == null ? true : contains(["STANDARD_IA", "ONEZONE_IA", "INTELLIGENT_TIERING", "GLACIER_IR"], var.transition.storage_class)
    error_message = "One of STANDARD_IA, ONEZONE_IA, INTELLIGENT_TIERING and GLACIER_IR."
  }

  validation {
    condition     = var.transition == null ? true : var.transition.days >= 30
    error_message = "At least 30 days: what moves or goes earlier is charged for as many."
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
  description = "Bucket that takes the access log; none is kept where it is null."
  type        = string
  default     = null
}

variable "instances" {
  description = "Roles (trainer, reader, janitor) for which EC2 instances get a role and an instance profile."
  type        = set(string)
  default     = []
  nullable    = false

  validation {
    condition     = length(setsubtract(var.instances, ["trainer", "reader", "janitor"])) == 0
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
    condition     = alltrue([for account in var.service_accounts : contains(["trainer", "reader", "janitor"], account.role)])
    error_message = "The roles are trainer, reader and janitor."
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
}
