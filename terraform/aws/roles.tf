# Roles for who computes: EC2 instances, and pods of EKS. Elsewhere attach the policies to what is there.

locals {
  roles = setunion(var.instances, toset([for account in var.service_accounts : account.role]))
}

data "aws_iam_policy_document" "trust" {
  for_each = local.roles

  dynamic "statement" {
    for_each = contains(var.instances, each.key) ? [1] : []

    content {
      sid     = "Instances"
      actions = ["sts:AssumeRole"]

      principals {
        type        = "Service"
        identifiers = ["ec2.amazonaws.com"]
      }
    }
  }

  dynamic "statement" {
    for_each = contains([for account in var.service_accounts : account.role], each.key) ? [1] : []

    content {
      sid     = "Pods"
      actions = ["sts:AssumeRole", "sts:TagSession"]

      principals {
        type        = "Service"
        identifiers = ["pods.eks.amazonaws.com"]
      }
    }
  }
}

resource "aws_iam_role" "this" {
  for_each = local.roles

  name               = "${coalesce(var.name, var.bucket)}-${each.key}"
  description        = "The ${each.key} of checkpoints in s3://${var.bucket}/${local.below}"
  assume_role_policy = data.aws_iam_policy_document.trust[each.key].json
  tags               = var.tags
}

resource "aws_iam_role_policy_attachment" "this" {
  for_each = local.roles

  role       = aws_iam_role.this[each.key].name
  policy_arn = aws_iam_policy.this[each.key].arn
}

resource "aws_iam_instance_profile" "this" {
  for_each = var.instances

  name = "${coalesce(var.name, var.bucket)}-${each.key}"
  role = aws_iam_role.this[each.key].name
  tags = var.tags
}

resource "aws_eks_pod_identity_association" "this" {
  for_each = { for account in var.service_accounts : "${account.cluster}/${account.namespace}/${account.name}" => account }

  cluster_name    = each.value.cluster
  namespace       = each.value.namespace
  service_account = each.value.name
  role_arn        = aws_iam_role.this[each.value.role].arn
  tags            = var.tags
}
