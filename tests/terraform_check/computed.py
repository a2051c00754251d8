"""Values that a provider computes: ARNs, e-mail addresses, and the JSON of `aws_iam_policy_document`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

ACCOUNT: Final = "123456789012"

Configuration = Mapping[str, Any]


def of_resource(kind: str, name: str, type_: Any, configuration: Configuration) -> Any:
    """Return a value for an attribute that is unknown until the resource is created."""
    if type_ == "string":
        return _strings(kind, configuration).get(name, f"computed-{name}")
    return _empty(type_)


def of_data(kind: str, name: str, type_: Any, configuration: Configuration) -> Any:
    """Return a value for an attribute that a data source reads."""
    if kind == "aws_iam_policy_document" and name in ("json", "minified_json"):
        return policy_document(configuration)
    known = {"account_id": ACCOUNT, "email_address": "service-1@gs-project-accounts.iam.gserviceaccount.com"}
    if type_ == "string":
        return known.get(name, f"read-{name}")
    return _empty(type_)


def policy_document(configuration: Configuration) -> str:
    """Render a policy as `aws_iam_policy_document` does."""
    return json.dumps(
        {"Version": "2012-10-17", "Statement": [_statement(one) for one in configuration["statement"]]},
        indent=2,
    )


def _statement(one: Configuration) -> dict[str, Any]:
    rendered: dict[str, Any] = {"Sid": one["sid"] or "", "Effect": one["effect"] or "Allow"}
    for argument, element in (
        ("actions", "Action"),
        ("not_actions", "NotAction"),
        ("resources", "Resource"),
        ("not_resources", "NotResource"),
    ):
        if one.get(argument):
            rendered[element] = _one_or_many(one[argument])
    principals = {block["type"]: _one_or_many(block["identifiers"]) for block in one.get("principals") or ()}
    if principals:
        rendered["Principal"] = "*" if principals == {"*": "*"} else principals
    conditions: dict[str, dict[str, list[str]]] = {}
    for block in one.get("condition") or ():
        conditions.setdefault(block["test"], {}).setdefault(block["variable"], []).extend(block["values"])
    if conditions:
        rendered["Condition"] = {
            test: {
                variable: values[0] if len(values) == 1 else values for variable, values in variables.items()
            }
            for test, variables in conditions.items()
        }
    return rendered


def _one_or_many(values: list[str]) -> str | list[str]:
    return values[0] if len(values) == 1 else sorted(values, reverse=True)


def _strings(kind: str, configuration: Configuration) -> dict[str, str]:
    def given(name: str) -> str:
        value = configuration.get(name)
        return value if isinstance(value, str) else "unknown"

    match kind:
        case "aws_s3_bucket":
            region = "us-east-1"
            bucket = given("bucket")
            return {"arn": f"arn:aws:s3:::{bucket}", "id": bucket, "region": region, "bucket_region": region}
        case "aws_iam_policy" | "aws_iam_role":
            resource = kind.removeprefix("aws_iam_")
            return {"arn": f"arn:aws:iam::{ACCOUNT}:{resource}/{given('name')}"}
        case "google_project_iam_custom_role":
            role = f"projects/{given('project')}/roles/{given('role_id')}"
            return {"id": role, "name": role}
        case "google_service_account":
            email = f"{given('account_id')}@{given('project')}.iam.gserviceaccount.com"
            name = f"projects/{given('project')}/serviceAccounts/{email}"
            return {"email": email, "member": f"serviceAccount:{email}", "id": name, "name": name}
        case _:
            return {}


def _empty(type_: Any) -> Any:
    match type_:
        case "number":
            return 0
        case "bool":
            return False
        case [("map" | "object"), *_]:
            return {}
        case [("list" | "set" | "tuple"), *_]:
            return []
        case _:
            return None
