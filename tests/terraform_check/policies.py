"""Checks the policies that the modules render, by AWS's own data on actions, resources and condition keys.

parliament knows the rules of the policy language, and policy_sentry the service authorization reference. Both
carry their data with them.
"""

# parliament and policy_sentry are in .venv-providers, where this module runs, and are not typed.
# pyright: reportMissingImports=false

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

import parliament
from policy_sentry.querying.actions import get_action_data

Policy = Mapping[str, Any]

_ON_BUCKETS: Final = "tls_only"
_TRUST: Final = "trust"
_NOT_A_FINDING: Final = (
    # parliament takes "1.2" for no number. The S3 user guide writes s3:TlsVersion so.
    "s3:TlsVersion requires a value of type Numeric",
)
_NOT_A_FINDING_OF: Final[Mapping[str, tuple[str, ...]]] = {
    # parliament reads every policy as one of an identity. A bucket's policy has principals, and this one
    # denies s3:*, of whose actions not all have s3:TlsVersion. A trust policy names no resource.
    _ON_BUCKETS: ("Principal", "UNKNOWN_CONDITION_FOR_ACTION"),
    _TRUST: ("Principal", "neither Resource nor NotResource"),
}


def documents(resources: list[Mapping[str, Any]]) -> dict[str, Policy]:
    """Return the policies of a state, by the name of their data source and the key of their instance."""
    found: dict[str, Policy] = {}
    for resource in resources:
        if resource["type"] == "aws_iam_policy_document":
            for instance in resource["instances"]:
                key = f"[{instance['index_key']}]" if "index_key" in instance else ""
                found[f"{resource['name']}{key}"] = json.loads(instance["attributes"]["json"])
    return found


def findings(name: str, policy: Policy) -> list[str]:
    """Return what is wrong with a policy."""
    kind = name.partition("[")[0]
    expected = (*_NOT_A_FINDING, *_NOT_A_FINDING_OF.get(kind, ()))
    found = (str(one) for one in parliament.analyze_policy_string(json.dumps(policy)).findings)
    grave = {one.partition(" - {")[0] for one in found if not any(text in one for text in expected)}
    unknown = [] if kind in (_ON_BUCKETS, _TRUST) else _unknown(policy)
    return sorted(grave) + list(unknown)


def _unknown(policy: Policy) -> Iterator[str]:
    """Yield actions that do not exist, and condition keys that their actions do not have."""
    for statement in policy["Statement"]:
        actions = statement["Action"]
        asked = {key for keys in statement.get("Condition", {}).values() for key in keys}
        for action in [actions] if isinstance(actions, str) else actions:
            service, _, name = action.partition(":")
            known = get_action_data(service, name)
            if not known:
                yield f"{action} does not exist"
                continue
            keys = {key for row in known[service] for key in row["condition_keys"]}
            for key in sorted(asked - keys):
                if not key.startswith("aws:"):
                    yield f"{action} has no condition key {key}"
