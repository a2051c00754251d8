"""The settings of an S3 bucket: lifecycle rules, versions, and the encryption of new objects."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Final

from botocore.exceptions import ClientError

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.finding import Finding
from cloudckpt.backends.stores.exam import Exam
from cloudckpt.backends.stores.s3.client import Clients
from cloudckpt.backends.stores.s3.errors import code_of, is_denial
from cloudckpt.backends.stores.s3.requests import Requests

_NO_RULES: Final = "NoSuchLifecycleConfiguration"
_ADD_A_RULE: Final = "Add a lifecycle rule with AbortIncompleteMultipartUpload"
_OR_COLLECT: Final = ", or run `cloudckpt gc` now and then"

Rules = Sequence[Mapping[str, Any]]


def settings_of(
    requests: Requests, target: Target, exam: Exam, example: str | None, *, gc_aborts: bool
) -> Iterator[Finding]:
    """Examine the settings that decide over what a save leaves and costs.

    Args:
        requests: of the store.
        target: the place.
        exam: names the permissions.
        example: an object that was just put, if one could be.
        gc_aborts: False where the server does not list or abort uploads, so that gc can't.
    """
    rules = yield from _lifecycle(requests, target, exam, gc_aborts=gc_aborts)
    yield from _versions(requests, target, exam, rules)
    if example is not None:
        yield from _encryption(requests, target, example)


def applying(rules: Rules, prefix: str) -> list[Mapping[str, Any]]:
    """Return the rules that are in force for every object below a prefix of keys."""
    return [rule for rule in rules if rule.get("Status") == "Enabled" and _covers(rule, prefix)]


def _covers(rule: Mapping[str, Any], prefix: str) -> bool:
    chosen = rule.get("Filter", {})
    chosen = {**chosen, **chosen.get("And", {})}
    if chosen.keys() & {"Tag", "Tags", "ObjectSizeGreaterThan", "ObjectSizeLessThan"}:
        return False
    return prefix.startswith(chosen.get("Prefix") or rule.get("Prefix") or "")


def _lifecycle(
    requests: Requests, target: Target, exam: Exam, *, gc_aborts: bool
) -> Generator[Finding, None, Rules | None]:
    answer, error = _asked(
        requests, lambda c: c.data.get_bucket_lifecycle_configuration(Bucket=target.bucket)
    )
    rules: Rules = answer.get("Rules", ())
    prefix = f"{target.path}/" if target.path else ""
    if error is not None and code_of(error) != _NO_RULES:
        yield _not_told("lifecycle", "lifecycle rules", error, exam)
        return None
    in_force = applying(rules, prefix)
    days = [
        rule["AbortIncompleteMultipartUpload"].get("DaysAfterInitiation", 0)
        for rule in in_force
        if "AbortIncompleteMultipartUpload" in rule
    ]
    if days:
        yield Finding("lifecycle", "ok", f"uploads that a killed job leaves are aborted after {min(days)} d")
    else:
        what = "no lifecycle rule here aborts uploads that a killed job leaves: unseen, they cost money"
        yield Finding("lifecycle", "warning", what, _ADD_A_RULE + (_OR_COLLECT if gc_aborts else ""))
    expiry = [rule["Expiration"]["Days"] for rule in in_force if "Days" in rule.get("Expiration", {})]
    if expiry:
        what = f"a lifecycle rule deletes objects here after {min(expiry)} d, committed checkpoints too"
        yield Finding("expiry", "warning", what, "Leave the rule out for this prefix, if they are to stay")
    return in_force


def _versions(requests: Requests, target: Target, exam: Exam, rules: Rules | None) -> Iterator[Finding]:
    answer, error = _asked(requests, lambda c: c.data.get_bucket_versioning(Bucket=target.bucket))
    if error is not None:
        yield _not_told("versions", "whether versions are kept", error, exam)
    elif answer.get("Status") != "Enabled":
        yield Finding("versions", "ok", "not kept: what is deleted is gone, and costs nothing")
    elif rules is not None and any("NoncurrentVersionExpiration" in rule for rule in rules):
        yield Finding("versions", "ok", "kept for a while after an object is deleted, which costs its size")
    else:
        what = "kept for ever, as far as is known: steps that are deleted go on costing"
        yield Finding("versions", "warning", what, "Add a lifecycle rule with NoncurrentVersionExpiration")


def _encryption(requests: Requests, target: Target, example: str) -> Iterator[Finding]:
    key = f"{target.path}/{example}" if target.path else example
    arguments = {"Bucket": target.bucket, "Key": key}
    answer, error = _asked(requests, lambda c: c.data.head_object(**c.arguments("head_object", **arguments)))
    if error is not None:
        yield Finding("encryption", "unknown", f"what was put can't be looked at ({code_of(error)})")
        return
    wanted, found = target.options.sse, answer.get("ServerSideEncryption")
    if wanted is not None and found != wanted:
        what = f"sse={wanted} was asked for, and the server says {found or 'nothing of it'}"
        yield Finding("encryption", "failed", what, "Use a server that keeps to it, or leave the option out")
    elif found is None:
        yield Finding("encryption", "unknown", "the server names none for what is put", "Set the option sse")
    else:
        by = f" with the key {answer['SSEKMSKeyId']}" if "SSEKMSKeyId" in answer else ""
        yield Finding("encryption", "ok", f"what is put is encrypted by {found}{by}")


def _asked(
    requests: Requests, ask: Callable[[Clients], Mapping[str, Any]]
) -> tuple[Mapping[str, Any], ClientError | None]:
    """Return the answer, or what the server said instead."""
    with requests.explained():
        outcome = requests.outcome(ask)
        if isinstance(outcome.error, ClientError):
            return {}, outcome.error
        return outcome.result(), None


def _not_told(check: str, what: str, error: ClientError, exam: Exam) -> Finding:
    if is_denial(error):
        said = f"{what} may not be looked at ({code_of(error)})"
        advice = "Only this examination needs it: a save does without"
        return Finding(check, "unknown", said, advice, exam.action(check, error))
    return Finding(check, "unknown", f"the server does not tell {what} ({code_of(error)})")
