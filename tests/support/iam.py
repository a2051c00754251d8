"""Policies of IAM: as Terraform writes them, as AWS takes them, and what they allow.

moto's own IAM knows neither conditions nor the keys of a batch of deletions, so requests that it let pass are
judged once more here, by the rules of the IAM user guide ("Policy evaluation logic"): what a statement denies
is denied, what none allows is denied, and a condition on what a request doesn't have does not hold.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

from support.hcl import Rendered
from support.proxy import Request

ACTIONS: Final[Mapping[str, str]] = {
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "DeleteObject": "s3:DeleteObject",
    "DeleteObjects": "s3:DeleteObject",
    "ListObjectsV2": "s3:ListBucket",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
}
"""What S3 asks IAM before it acts: S3 user guide, "Required permissions for Amazon S3 API operations"."""
OF_A_KEY: Final[Mapping[str, frozenset[str]]] = {
    "s3:PutObject": frozenset({"kms:GenerateDataKey", "kms:Decrypt"}),
    "s3:GetObject": frozenset({"kms:Decrypt"}),
}
"""What an action takes of the KMS key: S3 user guide, "Using server-side encryption with AWS KMS keys"."""

_PARAMETERS: Final = frozenset(
    {"delete", "list-type", "partNumber", "uploadId", "uploads", "x-id"}
    | {"prefix", "delimiter", "encoding-type", "max-keys", "max-uploads", "fetch-owner"}
    | {"continuation-token", "start-after", "key-marker", "upload-id-marker"}
)
"""Of a query, those with which an operation is the one that the proxy takes it for: ``?acl`` is another."""

Statement = Mapping[str, Any]

_KEY = re.compile(rb"<Key>(.*?)</Key>", re.DOTALL)


def _like(pattern: str, text: str) -> bool:
    return fnmatch.fnmatchcase(text, pattern.replace("[", "[[]"))


_TESTS: Final[Mapping[str, Callable[[str, str], bool]]] = {
    "Bool": lambda wanted, found: wanted == found,
    "NumericLessThan": lambda wanted, found: float(found) < float(wanted),
    "StringLike": _like,
}


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request asks IAM: may this be done to that?"""

    action: str
    resource: str
    context: Mapping[str, str] = field(default_factory=dict)


def statements(document: Rendered) -> list[Statement]:
    """An ``aws_iam_policy_document``, as AWS takes it."""
    return [
        {
            "Sid": one["sid"],
            "Effect": one.get("effect", "Allow"),
            "Action": one["actions"],
            "Resource": one["resources"],
            **_principal(one),
            **_condition(one),
        }
        for one in document["statement"]
    ]


def granted(policy: Sequence[Statement], resource: str | None = None) -> set[str]:
    """Every action that a policy names; those on resources of a service alone where that is given."""
    return {
        action
        for one in policy
        if resource is None or any(f":{resource}:" in arn for arn in one["Resource"])
        for action in one["Action"]
    }


def allows(policy: Sequence[Statement], ask: Ask) -> bool:
    """Whether a policy, by itself, lets a request pass."""
    effects = {one["Effect"] for one in policy if _concerns(one, ask)}
    return "Allow" in effects and "Deny" not in effects


def denies(policy: Sequence[Statement], ask: Ask) -> bool:
    """Whether a policy forbids a request, whatever others allow."""
    return any(one["Effect"] == "Deny" and _concerns(one, ask) for one in policy)


def asked(request: Request) -> Iterator[Ask]:
    """What a request that came in path style asks of IAM.

    Raises:
        ValueError: it does something that is not known here.
    """
    split = urlsplit(request.target)
    query = parse_qs(split.query, keep_blank_values=True)
    if unknown := query.keys() - _PARAMETERS:
        raise ValueError(f"{request.method} {request.target}: {sorted(unknown)}")
    bucket, _, key = unquote(split.path).lstrip("/").partition("/")
    action, arn = ACTIONS[request.operation], f"arn:aws:s3:::{bucket}"
    if request.operation == "DeleteObjects":
        for found in _KEY.findall(request.body):
            yield Ask(action, f"{arn}/{found.decode()}")
    elif key:
        yield Ask(action, f"{arn}/{key}")
        if source := unquote(request.headers.get("x-amz-copy-source", "")).lstrip("/"):
            yield Ask("s3:GetObject", f"arn:aws:s3:::{source}")
    elif action == "s3:ListBucket":  # which alone has this in its context
        yield Ask(action, arn, {"s3:prefix": query.get("prefix", [""])[0]})
    else:
        yield Ask(action, arn)


def _principal(statement: Rendered) -> dict[str, Any]:
    # Of all the ways to write a principal, Terraform's for everybody is the one that is needed here.
    return {"Principal": "*"} if "principals" in statement else {}


def _condition(statement: Rendered) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {}
    for one in statement.get("condition", ()):
        found.setdefault(one["test"], {})[one["variable"]] = one["values"]
    return {"Condition": found} if found else {}


def _concerns(statement: Statement, ask: Ask) -> bool:
    return (
        any(_like(pattern, ask.action) for pattern in statement["Action"])
        and any(_like(pattern, ask.resource) for pattern in statement["Resource"])
        and all(
            variable in ask.context and any(_TESTS[test](value, ask.context[variable]) for value in values)
            for test, variables in statement.get("Condition", {}).items()
            for variable, values in variables.items()
        )
    )
