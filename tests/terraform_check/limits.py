"""Refusals of the providers and of the clouds' APIs that a schema does not hold.

Each comes from the provider's own validators or from the reference of the API, as far as these modules meet
them. What only the API refuses would fail in the middle of an apply: the stand-in refuses it in the plan.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

Configuration = Mapping[str, Any]
Limit = Callable[[Configuration], Iterator[str]]

_DAY: Final = 86400


def refusals(kind: str, configuration: Configuration) -> list[str]:
    """Return the reasons for which a resource would be refused. Values that are not known yet pass."""
    return [
        f"{kind}: {reason}"
        for limit in (_whole_numbers, *_LIMITS.get(kind, ()))
        for reason in limit(configuration)
    ]


def _whole_numbers(configuration: Configuration) -> Iterator[str]:
    """Refuse fractions: every number that these modules set is an integer of the provider."""
    for path, value in _leaves(configuration):
        if isinstance(value, float) and not value.is_integer():
            yield f"{path}: {value} is not a whole number"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, one in value.items():
            yield from _leaves(one, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list):
        for one in value:
            yield from _leaves(one, path)
    else:
        yield path, value


def _blocks(configuration: Any, *path: str) -> Iterator[Mapping[str, Any]]:
    """Yield the blocks at a path."""
    if not path:
        if isinstance(configuration, Mapping):
            yield configuration
        return
    found = configuration.get(path[0]) if isinstance(configuration, Mapping) else None
    for one in found if isinstance(found, list) else [found]:
        yield from _blocks(one, *path[1:])


def _length(path: str, least: int, most: int) -> Limit:
    *parents, name = path.split(".")

    def limit(configuration: Configuration) -> Iterator[str]:
        for block in _blocks(configuration, *parents):
            value = block.get(name)
            if isinstance(value, str) and not least <= len(value.encode()) <= most:
                yield f"{path}: {len(value.encode())} bytes, {least} to {most} are allowed: {value!r}"

    return limit


def _form(name: str, pattern: str) -> Limit:
    def limit(configuration: Configuration) -> Iterator[str]:
        value = configuration.get(name)
        if isinstance(value, str) and not re.fullmatch(pattern, value):
            yield f"{name}: {value!r} does not match {pattern}"

    return limit


def _number(path: str, least: int, most: int, *, or_zero: bool = False) -> Limit:
    *parents, name = path.split(".")

    def limit(configuration: Configuration) -> Iterator[str]:
        for block in _blocks(configuration, *parents):
            value = block.get(name)
            if not isinstance(value, int | float) or (or_zero and value == 0):
                continue
            if not least <= value <= most:
                yield f"{path}: {value}, {least} to {most} are allowed"

    return limit


def _policy_size(configuration: Configuration) -> Iterator[str]:
    policy = configuration.get("policy")
    if isinstance(policy, str) and len(re.sub(r"\s", "", policy)) > 6144:
        yield "policy: more than 6144 characters without white space"


def _reserved_bucket(configuration: Configuration) -> Iterator[str]:
    """S3 user guide, "General purpose bucket naming rules"."""
    name = configuration.get("bucket")
    if isinstance(name, str) and (
        name.startswith(("xn--", "sthree-", "amzn-s3-demo-"))
        or name.endswith(("-s3alias", "--ol-s3", ".mrap", "--x-s3", "--table-s3", "-an"))
    ):
        yield f"bucket: S3 reserves names such as {name!r}"


def _transitions(configuration: Configuration) -> Iterator[str]:
    """S3 user guide, "Constraints and considerations for transitions"."""
    moves = [
        block
        for block in _blocks(configuration, "rule", "transition")
        if isinstance(block.get("days"), int | float)
    ]
    for move in moves:
        if str(move.get("storage_class")).endswith("_IA") and move["days"] < 30:
            yield f"rule.transition.days: {move['days']}, at least 30 for {move['storage_class']}"
        for expiration in _blocks(configuration, "rule", "expiration"):
            days = expiration.get("days")
            if isinstance(days, int | float) and days and days <= move["days"]:
                yield f"rule.expiration.days: {days}, more than transition.days ({move['days']}) are needed"


def _google_bucket(configuration: Configuration) -> Iterator[str]:
    """Cloud Storage documentation, "Bucket naming requirements"."""
    name = configuration.get("name")
    if isinstance(name, str) and re.search(r"^goog|g[o0]{2}g[l1]e", name):
        yield f"name: Google reserves names such as {name!r}"


_MOST_DAYS: Final = 2**31 - 1
_LIMITS: Final[Mapping[str, tuple[Limit, ...]]] = {
    "aws_s3_bucket": (
        _length("bucket", 3, 63),
        _form("bucket", r"[a-z0-9][a-z0-9.-]*[a-z0-9]"),
        _reserved_bucket,
    ),
    "aws_s3_bucket_logging": (_length("target_bucket", 3, 63),),
    "aws_s3_bucket_lifecycle_configuration": (
        _length("rule.filter.prefix", 0, 1024),
        _number("rule.noncurrent_version_expiration.noncurrent_days", 1, _MOST_DAYS),
        _number("rule.transition.days", 0, _MOST_DAYS),
        _number("rule.expiration.days", 1, _MOST_DAYS, or_zero=True),
        _transitions,
    ),
    "aws_iam_role": (
        _length("name", 1, 64),
        _form("name", r"[\w+=,.@-]+"),
        _length("description", 0, 1000),
    ),
    "aws_iam_policy": (
        _length("name", 1, 128),
        _form("name", r"[\w+=,.@-]+"),
        _length("description", 0, 1000),
        _policy_size,
    ),
    "aws_iam_instance_profile": (_length("name", 1, 128), _form("name", r"[\w+=,.@-]+")),
    "google_service_account": (
        _form("account_id", r"[a-z][a-z0-9-]{4,28}[a-z0-9]"),
        _length("display_name", 0, 100),
        _length("description", 0, 256),
    ),
    "google_project_iam_custom_role": (
        _form("role_id", r"[A-Za-z0-9_.]{3,64}"),
        _length("title", 1, 100),
        _length("description", 0, 256),
    ),
    "google_storage_bucket": (
        _length("name", 3, 63),
        _form("name", r"[a-z0-9][a-z0-9_-]*[a-z0-9]"),
        _google_bucket,
        _number("soft_delete_policy.retention_duration_seconds", 7 * _DAY, 90 * _DAY, or_zero=True),
        _number("lifecycle_rule.condition.age", 0, _MOST_DAYS),
        _number("lifecycle_rule.condition.days_since_noncurrent_time", 0, _MOST_DAYS),
    ),
    "google_storage_bucket_iam_member": (
        _length("condition.title", 1, 100),
        _length("condition.description", 0, 256),
    ),
}
