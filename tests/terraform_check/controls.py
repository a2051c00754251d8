"""Faults that the check must find: without them its silence would prove nothing."""

from __future__ import annotations

from typing import Final

from terraform_check.runs import Workspace

_FAULTS: Final = (
    ("bucket_key_enabled", "bucket_keys_enabled"),
    ("days_after_initiation", "days_after_start"),
    ("sse_algorithm ", "sse_algorithms "),
    ("cluster_name ", "cluster "),
    ("aws_s3_bucket_versioning", "aws_s3_bucket_version"),
    ("aws_s3_bucket.this.region", "aws_s3_bucket.this.regions"),
    ("uniform_bucket_level_access", "uniform_bucket_access"),
    ("days_since_noncurrent_time", "noncurrent_days"),
    ("soft_delete_policy", "soft_delete"),
    ("role_id ", "role "),
    ("retention_duration_seconds", "retention_seconds"),
    ("this.email_address", "this.email"),
)
"""A text of one of the modules, and what takes its place: a name that the provider does not know."""


def unnoticed(workspace: Workspace) -> tuple[int, list[str]]:
    """Put each fault into a copy of the module, and return their number and those that Terraform accepts."""
    tried, accepted = 0, list[str]()
    for text, fault in _FAULTS:
        folder = workspace.copy("control")
        files = [path for path in sorted(folder.glob("*.tf")) if text in path.read_text()]
        if not files:  # a fault of the other cloud's module
            continue
        for path in files:
            path.write_text(path.read_text().replace(text, fault))
        tried += 1
        if workspace.init(folder).status == 0 and workspace.validate(folder).status == 0:
            accepted.append(f"{text.strip()} -> {fault.strip()}")
    return tried, accepted
