output "uri" {
  description = "Where runs go: `cloudckpt.Checkpointer(\"<uri>/my-run\")`."
  value       = var.prefix == "" ? "s3://${aws_s3_bucket.this.id}" : "s3://${aws_s3_bucket.this.id}/${var.prefix}"
}

output "environment" {
  description = "Environment variables to set for jobs and for the command line."
  value       = { CLOUDCKPT_REGION = aws_s3_bucket.this.region }
}

output "bucket" {
  description = "Name of the bucket."
  value       = aws_s3_bucket.this.id
}

output "bucket_arn" {
  description = "ARN of the bucket."
  value       = aws_s3_bucket.this.arn
}

output "policy_arns" {
  description = "ARNs of the policies, by trainer, reader and janitor."
  value       = { for role, policy in aws_iam_policy.this : role => policy.arn }
}

output "role_arns" {
  description = "ARNs of the roles that instances and service_accounts asked for."
  value       = { for name, role in aws_iam_role.this : name => role.arn }
}

output "instance_profiles" {
  description = "Names of the instance profiles, by role."
  value       = { for role, profile in aws_iam_instance_profile.this : role => profile.name }
}
