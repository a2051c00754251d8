"""Values of the modules' variables that must apply, and values that must be refused in the plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

Variables = Mapping[str, Any]

LEAST: Final[Mapping[str, Variables]] = {
    "aws": {"bucket": "checkpoints"},
    "gcp": {"project": "a-project", "bucket": "checkpoints", "location": "us-central1"},
}
"""The variables that have no default."""


def _pod(role: str, name: str, **changed: Any) -> Variables:
    return {"role": role, "cluster": "gpu", "namespace": "training", "name": name, **changed}


def _workload(role: str, name: str, **changed: Any) -> Variables:
    return {"role": role, "namespace": "training", "name": name, **changed}


APPLIED: Final[Mapping[str, Mapping[str, Variables]]] = {
    "aws": {
        "least": {},
        "most": {
            "prefix": "runs",
            "kms_key_arn": "arn:aws:kms:us-east-1:123456789012:key/1234abcd",
            "versioning": True,
            "transition": {"days": 90, "storage_class": "GLACIER_IR"},
            "expiration_days": 365,
            "log_bucket": "logs",
            "instances": ["trainer", "reader"],
            "service_accounts": [
                _pod("trainer", "a"),
                _pod("janitor", "b"),
                _pod("reader", "a", namespace="other"),
            ],
            "tags": {"team": "Pre-training: a@b"},
            "name": "team",
        },
        "transition without a prefix": {"transition": {"days": 30, "storage_class": "STANDARD_IA"}},
        "throw-away": {"prefix": "live", "expiration_days": 1, "force_destroy": True},
        "longest": {"bucket": "a" * 63, "name": "b" * 55, "prefix": "p" * 512, "instances": ["trainer"]},
        "longest without a name": {"bucket": "a" * 55, "instances": ["trainer"]},
        "nulls": dict.fromkeys(
            [
                "name",
                "prefix",
                "kms_key_arn",
                "versioning",
                "noncurrent_days",
                "transition",
                "expiration_days",
                "log_bucket",
                "instances",
                "service_accounts",
                "force_destroy",
                "tags",
            ]
        ),
    },
    "gcp": {
        "least": {},
        "most": {
            "prefix": "runs",
            "kms_key_name": "projects/p/locations/l/keyRings/r/cryptoKeys/k",
            "versioning": True,
            "transition": {"days": 90, "storage_class": "COLDLINE"},
            "expiration_days": 365,
            "log_bucket": "logs",
            "workload_identities": [_workload("trainer", "a"), _workload("janitor", "b")],
            "labels": {"team": "pre-training"},
            "name": "team",
        },
        "another bucket": {"bucket": "checkpoints2"},
        "transition without a prefix": {"transition": {"days": 30, "storage_class": "NEARLINE"}},
        "throw-away": {"prefix": "live", "expiration_days": 1, "soft_delete_days": 0, "force_destroy": True},
        "longest": {"project": "a" * 30, "bucket": "1" + "a" * 62, "name": "b" * 22, "prefix": "p" * 512},
        "longest without a name": {"project": "a" * 30, "bucket": "a_" * 31 + "b", "prefix": "runs"},
        "nulls": dict.fromkeys(
            [
                "name",
                "prefix",
                "kms_key_name",
                "versioning",
                "noncurrent_days",
                "soft_delete_days",
                "transition",
                "expiration_days",
                "log_bucket",
                "workload_identities",
                "force_destroy",
                "labels",
            ]
        ),
    },
}
"""By cloud and by a name of their own."""
_NOT_DAYS: Final = (0, -1, 30.5, 100_000)


def _days(storage_class: str) -> tuple[tuple[str, Variables], ...]:
    """Return numbers that are no numbers of days, for each variable that is one."""
    return tuple(
        refused
        for days in _NOT_DAYS
        for refused in (
            ("noncurrent_days", {"noncurrent_days": days}),
            ("expiration_days", {"expiration_days": days}),
            ("transition", {"transition": {"days": days, "storage_class": storage_class}}),
        )
    )


_TRANSITION_WITHOUT: Final[tuple[tuple[str, Variables], ...]] = (
    ("transition", {"transition": {"days": None, "storage_class": "NEARLINE"}}),
    ("transition", {"transition": {"days": 90, "storage_class": None}}),
)

REFUSED: Final[Mapping[str, tuple[tuple[str, Variables], ...]]] = {
    "aws": (
        *(
            ("bucket", {"bucket": name})
            for name in (
                *("Capital", "dotted.name", "a-", "-a", "ab", "a" * 64, None),
                *("xn--abc", "sthree-abc", "sthree-configurator-abc", "amzn-s3-demo-bucket"),
                *("abc-s3alias", "abc--ol-s3", "abc.mrap", "abc--x-s3", "abc--table-s3", "abc-an"),
            )
        ),
        ("name", {"bucket": "b" * 56, "name": None}),
        *(("name", {"name": name}) for name in ("", "b" * 56, "team-", "-team", "a team", "team/a")),
        *(("prefix", {"prefix": prefix}) for prefix in ("/runs", "runs/", "a//b", "ru*ns", "${aws:userid}")),
        *(("prefix", {"prefix": prefix}) for prefix in ("..", "a/../b", "./a", "p" * 513)),
        *(("kms_key_arn", {"kms_key_arn": key}) for key in ("alias/checkpoints", "")),
        *_days("STANDARD_IA"),
        *_TRANSITION_WITHOUT,
        ("transition", {"transition": {"days": 90, "storage_class": "DEEP_ARCHIVE"}}),
        ("transition", {"transition": {"days": 29, "storage_class": "STANDARD_IA"}}),
        *(
            (
                "expiration_days",
                {"transition": {"days": 90, "storage_class": "STANDARD_IA"}, "expiration_days": days},
            )
            for days in (30, 90)
        ),
        *(("log_bucket", {"log_bucket": name}) for name in ("", "Logs", "checkpoints")),
        *(("instances", {"instances": roles}) for roles in (["admin"], ["trainer", None])),
        *(
            ("service_accounts", {"service_accounts": accounts})
            for accounts in (
                [_pod("admin", "a")],
                [_pod("trainer", "a"), _pod("reader", "a")],
                [_pod("trainer", "a"), _pod("trainer", "a")],
                *(
                    [{**_pod("trainer", "a"), field: None}]
                    for field in ("role", "cluster", "namespace", "name")
                ),
                *([_pod("trainer", "a", cluster=name)] for name in ("", "-a", "a.b", "a" * 101)),
                *([_pod("trainer", "a", namespace=name)] for name in ("", "a-", "A", "a" * 64)),
                *([_pod("trainer", name)] for name in ("", "a-", "A", "a" * 254)),
            )
        ),
        *(
            ("tags", {"tags": tags})
            for tags in (
                {"aws:team": "a"},
                {"team": "a", "Team": "b"},
                {"": "a"},
                {"a" * 129: "a"},
                {"team": "a" * 257},
                {"team": None},
                {"team": "a;b"},
                {str(number): "a" for number in range(51)},
            )
        ),
    ),
    "gcp": (
        *(
            ("project", {"project": name})
            for name in ("P", "short", "a-project-", "1-project", "a" * 31, None)
        ),
        *(
            ("bucket", {"bucket": name})
            for name in (
                *("Capital", "dotted.name", "a-", "_ab", "ab", "a" * 64, None),
                *("goog-checkpoints", "my-google-bucket", "g00gle-bucket"),
            )
        ),
        *(("location", {"location": name}) for name in ("", "us central1", None)),
        *(("name", {"name": name}) for name in ("", "a-", "-a", "1a", "A", "a_b", "a" * 23)),
        *(
            ("prefix", {"prefix": prefix})
            for prefix in ("/runs", "runs/", "a//b", 'runs")', "..", "a/./b", "p" * 513)
        ),
        ("prefix", {"prefix": ".well-known/acme-challenge"}),
        *(("kms_key_name", {"kms_key_name": key}) for key in ("k", "")),
        *_days("NEARLINE"),
        *_TRANSITION_WITHOUT,
        *(("soft_delete_days", {"soft_delete_days": days}) for days in (-1, 3, 7.3, 0.5, 91)),
        ("transition", {"transition": {"days": 90, "storage_class": "GLACIER_IR"}}),
        *(
            (
                "expiration_days",
                {"transition": {"days": 90, "storage_class": "NEARLINE"}, "expiration_days": days},
            )
            for days in (30, 90)
        ),
        *(("log_bucket", {"log_bucket": name}) for name in ("", "Logs", "checkpoints")),
        *(
            ("workload_identities", {"workload_identities": identities})
            for identities in (
                [_workload("admin", "a")],
                [_workload("trainer", "a"), _workload("reader", "a")],
                [_workload("trainer", "a"), _workload("trainer", "a")],
                *([{**_workload("trainer", "a"), field: None}] for field in ("role", "namespace", "name")),
                *([_workload("trainer", "a", namespace=name)] for name in ("", "a-", "A", "a" * 64)),
                *([_workload("trainer", name)] for name in ("", "a-", "A", "a" * 254)),
            )
        ),
        *(
            ("labels", {"labels": labels})
            for labels in (
                {"Team": "a"},
                {"1": "a"},
                {"": "a"},
                {"a" * 64: "a"},
                {"team": "a" * 64},
                {"team": "A"},
                {"team": None},
                {f"a{number}": "a" for number in range(65)},
            )
        ),
    ),
}
"""By cloud, each with the variable whose rule refuses it."""
