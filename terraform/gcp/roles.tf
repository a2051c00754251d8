# Who may do what: no permission is granted that the code does not ask for, which a test holds.
#
# The roles are our own: no predefined one grants just these.

locals {
  below = var.prefix == "" ? "" : "${var.prefix}/"

  # Two buckets in one project need two names. A service account's ID has 30 characters, of which "-trainer" takes 8:
  # 5 for "ckpt-", 8 of the bucket's name to read, and 9 for a hyphen and a digest that tells buckets apart.
  beginning = trim(substr(replace(var.bucket, "_", "-"), 0, 8), "-")
  name      = var.name == null ? "ckpt-${local.beginning}-${substr(sha256(var.bucket), 0, 8)}" : var.name

  permissions = {
    trainer = [
      "storage.multipartUploads.abort", "storage.multipartUploads.create", "storage.multipartUploads.list",
      "storage.objects.create", "storage.objects.get", "storage.objects.list", "storage.objects.delete",
    ]
    reader = ["storage.objects.get", "storage.objects.list"]
    janitor = [
      "storage.multipartUploads.abort", "storage.multipartUploads.list",
      "storage.objects.get", "storage.objects.list", "storage.objects.delete",
    ]
  }

  # An object is known by its name, a listing by the prefix that it asks for.
  condition = join(" || ", [
    "resource.name.startsWith(\"projects/_/buckets/${var.bucket}/objects/${local.below}\")",
    "api.getAttribute(\"storage.googleapis.com/objectListPrefix\", \"\").startsWith(\"${local.below}\")",
  ])
}

resource "google_project_iam_custom_role" "this" {
  for_each = local.permissions

  project     = var.project
  role_id     = "${replace(local.name, "-", "_")}_${each.key}"
  title       = "Checkpoints: ${each.key}"
  description = "What cloudckpt asks for as a ${each.key}"
  permissions = each.value
}

resource "google_service_account" "this" {
  for_each = local.permissions

  project    = var.project
  account_id = "${local.name}-${each.key}"
  # Google allows 100 bytes in a display name and 256 in a description. A bucket's name has at most 63.
  display_name = "Checkpoints: ${each.key} of ${var.bucket}"
  description  = substr("The ${each.key} of checkpoints in gs://${var.bucket}/${local.below}", 0, 256)
}

resource "google_storage_bucket_iam_member" "this" {
  for_each = local.permissions

  bucket = google_storage_bucket.this.name
  role   = google_project_iam_custom_role.this[each.key].id
  member = "serviceAccount:${google_service_account.this[each.key].email}"

  dynamic "condition" {
    for_each = var.prefix == "" ? [] : [local.condition]

    content {
      title       = "below-the-prefix"
      description = substr("Objects below ${local.below} and listings of them", 0, 256)
      expression  = condition.value
    }
  }
}

resource "google_service_account_iam_member" "workload" {
  for_each = { for one in var.workload_identities : "${one.role}/${one.namespace}/${one.name}" => one }

  service_account_id = google_service_account.this[each.value.role].name
  role               = "roles/iam.workloadIdentityUser"
  member             = "serviceAccount:${var.project}.svc.id.goog[${each.value.namespace}/${each.value.name}]"
}
