"""The bucket of terraform/aws and its policies, on a moto that holds to them: enough for a role, no more."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from torch.distributed.checkpoint.api import CheckpointException

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import AccessDeniedError, ObjectNotFoundError
from cloudckpt.backends.load.read_lease import READ_LEASE
from cloudckpt.backends.stores import open_store
from support import duties, findings
from support.as_aws import Policed, policed
from support.commands import save
from support.hcl import Module
from support.iam import ACTIONS, OF_A_KEY, Ask, Statement, allows, asked, denies, granted, statements
from support.places import Place
from support.proxy import Proxy, proxied
from support.servers import S3Server, moto_server

HERE = Path(__file__).parents[2] / "terraform" / "aws"
BUCKET = "checkpoints"
ARN = f"arn:aws:s3:::{BUCKET}"
KEY = "arn:aws:kms:us-east-1:123456789012:key/1"
ROLES = ("trainer", "reader", "janitor")


def module(**variables: Any) -> Module:
    bucket = {"this": {"id": BUCKET, "arn": ARN, "region": "us-east-1"}}
    return Module(HERE, {"bucket": BUCKET, "prefix": "runs", **variables}, {"aws_s3_bucket": bucket})


def policy(role: str, **variables: Any) -> list[Statement]:
    return statements(module(**variables).block("data", "aws_iam_policy_document", role))


def as_moto_asks(policy: Sequence[Statement]) -> list[Statement]:
    """The policy for moto, which asks about the bucket before a batch goes, where S3 asks about each key."""
    batch = {"Effect": "Allow", "Action": ["s3:DeleteObject"], "Resource": [ARN]}
    return [*policy, batch] if "s3:DeleteObject" in granted(policy) else [*policy]


@dataclass(frozen=True, slots=True)
class Bucket:
    """The bucket on moto, seen by its owner and, through a proxy, by who acts in a role."""

    law: Policed
    proxy: Proxy
    key: str
    """Where the run is that is being tried."""

    @property
    def owned(self) -> Place:
        return Place.on_server(self.law.root, BUCKET).child(self.key)

    def place(self, user: S3Server) -> Place:
        return Place.on_server(user, BUCKET).child(self.key)


@pytest.fixture(scope="module")
def running() -> Iterator[Bucket]:
    with moto_server() as server, proxied(server.endpoint) as proxy:
        server.client().create_bucket(Bucket=BUCKET)
        yield Bucket(policed(server, proxy), proxy, "")


@pytest.fixture
def bucket(running: Bucket) -> Bucket:
    """The bucket, and an untouched run in it."""
    running.proxy.forget()
    return replace(running, key=f"runs/{uuid.uuid4().hex[:8]}")


DUTIES: Mapping[str, Callable[[Place, Proxy], None]] = {
    "trainer": duties.train,
    "reader": lambda place, _: duties.read(place),
    "janitor": lambda place, _: duties.tidy(place),
}


@pytest.mark.parametrize("prefix", ["runs", ""], ids=["prefix", "whole bucket"])
@pytest.mark.parametrize("role", ROLES)
def test_a_role_may_do_what_it_has_to_and_nothing_to_spare(bucket: Bucket, role: str, prefix: str) -> None:
    allowed = policy(role, prefix=prefix)
    if role != "trainer":
        duties.prepare(bucket.owned)
    with bucket.law.under(*as_moto_asks(allowed)) as user:
        DUTIES[role](bucket.place(user), bucket.proxy)
    requests = {name: bucket.proxy.seen(name) for name in ACTIONS}
    assert sum(map(len, requests.values())) == bucket.proxy.count, "an operation that no action is known for"
    asks = [ask for seen in requests.values() for request in seen for ask in asked(request)]
    if role == "reader":  # tries to hold a lease, and reads without one
        asks = [ask for ask in asks if not READ_LEASE.fullmatch(ask.resource)]
    duties.tell(role, granted(allowed), {(name, ACTIONS[name]): len(seen) for name, seen in requests.items()})
    assert {ask.action for ask in asks} == granted(allowed)
    assert [ask for ask in asks if not allows(allowed, ask)] == []
    # A role that has more to do than its statements need would have one statement doing nothing.
    for one in allowed:
        assert any(allows([one], ask) for ask in asks), one["Sid"]


@pytest.mark.parametrize("role", ROLES)
def test_with_a_key_a_role_gets_what_its_actions_take_of_it(role: str) -> None:
    with_key = policy(role, kms_key_arn=KEY)
    key = [one for one in with_key if one["Resource"] == [KEY]]
    assert [one for one in with_key if one not in key] == policy(role)
    needed = set[str]().union(*(OF_A_KEY.get(action, ()) for action in granted(policy(role))))
    assert granted(key) == needed
    by_s3 = {"kms:ViaService": "s3.eu-central-1.amazonaws.com"}
    assert allows(key, Ask("kms:Decrypt", KEY, by_s3))
    assert not allows(key, Ask("kms:Decrypt", KEY))
    assert not allows(key, Ask("kms:Decrypt", KEY, {"kms:ViaService": "ebs.eu-central-1.amazonaws.com"}))
    assert not allows(key, Ask("kms:Decrypt", f"{KEY}2", by_s3))


def refused(act: Callable[..., object], **arguments: Any) -> None:
    with pytest.raises(ClientError) as caught:
        act(Bucket=BUCKET, **arguments)
    assert caught.value.response.get("Error", {}).get("Code") == "AccessDenied"


FORBIDDEN = {
    "trainer": (
        "s3:DeleteBucket s3:PutBucketPolicy s3:PutLifecycleConfiguration s3:PutBucketVersioning "
        "s3:PutObjectAcl s3:GetObjectVersion s3:DeleteObjectVersion s3:ListBucketVersions"
    ),
    "reader": (
        "s3:PutObject s3:DeleteObject s3:AbortMultipartUpload s3:DeleteBucket s3:ListBucketMultipartUploads"
    ),
    "janitor": "s3:PutObject s3:DeleteBucket s3:DeleteObjectVersion s3:PutLifecycleConfiguration",
}


@pytest.mark.parametrize("role", ROLES)
def test_a_role_may_not_do_what_is_another_s(role: str) -> None:
    allowed = policy(role)
    for action in FORBIDDEN[role].split():
        for resource in (ARN, f"{ARN}/runs/run/x"):
            assert not allows(allowed, Ask(action, resource, {"s3:prefix": "runs/"})), action


@pytest.mark.parametrize("role", ROLES)
def test_a_role_ends_at_its_prefix(role: str) -> None:
    allowed = policy(role)
    for action in granted(allowed) - {"s3:ListBucket", "s3:ListBucketMultipartUploads"}:
        assert allows(allowed, Ask(action, f"{ARN}/runs/x"))
        for resource in (f"{ARN}/runs", f"{ARN}/runs2/x", f"{ARN}/x", "arn:aws:s3:::other/runs/x"):
            assert not allows(allowed, Ask(action, resource)), (action, resource)
    # A run lists what is below it, and a missing object by its very name: S3 answers 403 for it.
    below = ("runs/", "runs/run/", "runs/run/step-1/", "runs/run/step-1/.metadata", "runs/.metadata")
    elsewhere = ("", "runs", "runs2/", "runs2/.metadata", ".metadata", "other/runs/")
    for prefix, may in {**dict.fromkeys(below, True), **dict.fromkeys(elsewhere, False)}.items():
        assert allows(allowed, Ask("s3:ListBucket", ARN, {"s3:prefix": prefix})) is may, prefix
    assert not allows(allowed, Ask("s3:ListBucket", ARN))


def test_without_a_prefix_a_role_has_the_bucket_and_no_other() -> None:
    for role in ROLES:
        allowed = policy(role, prefix="")
        assert allows(allowed, Ask("s3:GetObject", f"{ARN}/x"))
        assert allows(allowed, Ask("s3:ListBucket", ARN, {"s3:prefix": ""}))
        assert not allows(allowed, Ask("s3:GetObject", "arn:aws:s3:::other/x"))


@pytest.mark.parametrize("role", ROLES)
def test_the_server_refuses_what_the_policy_does_not_allow(bucket: Bucket, role: str) -> None:
    bucket.owned.write("x", b"data")
    with bucket.law.under(*as_moto_asks(policy(role))) as user:
        client = user.client()
        refused(client.delete_bucket)
        refused(client.put_bucket_policy, Policy="{}")
        refused(client.put_object, Key="elsewhere/x", Body=b"")
        refused(client.get_object, Key="elsewhere/x")
        if role != "trainer":
            refused(client.put_object, Key=f"{bucket.key}/x", Body=b"")
            refused(client.create_multipart_upload, Key=f"{bucket.key}/x")
            with pytest.raises(CheckpointException, match="AccessDeniedError"):
                save(bucket.place(user), duties.state(1))
        if role == "reader":
            refused(client.delete_object, Key=f"{bucket.key}/x")
            refused(client.list_multipart_uploads)
    assert bucket.owned.visible() == {"x"}


@pytest.mark.parametrize("prefix", ["runs", ""], ids=["prefix", "whole bucket"])
def test_doctor_finds_that_a_trainer_may_do_all_that_a_save_takes(bucket: Bucket, prefix: str) -> None:
    with bucket.law.under(*as_moto_asks(policy("trainer", prefix=prefix))) as user:
        status, found = findings.doctor(bucket.place(user))
    assert status == 0
    assert findings.failed(found) == []
    # How the bucket is set up is none of a trainer's business.
    assert {found[check]["state"] for check in ("lifecycle", "versions")} == {"unknown"}


@pytest.mark.parametrize("role", ["reader", "janitor"])
def test_doctor_names_the_permission_that_a_role_does_not_have(bucket: Bucket, role: str) -> None:
    with bucket.law.under(*as_moto_asks(policy(role))) as user:
        status, found = findings.doctor(bucket.place(user))
    assert status == 1
    needed = f"s3:PutObject on {ARN}/{bucket.key}/*"
    assert found["put"]["state"] == found["multipart"]["state"] == "failed"
    assert found["put"]["advice"] == f"Grant {needed}"
    assert "AccessDenied" in found["put"]["what"] and "GetObject" not in found["put"]["what"]
    assert found["list"]["state"] == "ok"


@pytest.mark.parametrize("role", ROLES)
def test_a_read_that_is_really_denied_is_told_as_a_denial(bucket: Bucket, role: str) -> None:
    bucket.owned.write(".metadata", b"data")
    allowed = [one for one in policy(role) if "s3:GetObject" not in one["Action"]]
    with bucket.law.under(*as_moto_asks(allowed)) as user:
        place = bucket.place(user)
        with (
            open_store(Target.parse(place.uri, **place.options)) as store,
            pytest.raises(AccessDeniedError) as caught,
        ):
            store.get(".metadata")
    assert caught.value.hint is not None and "s3:GetObject here" in caught.value.hint


@pytest.mark.parametrize("prefix", ["runs", ""], ids=["prefix", "whole bucket"])
@pytest.mark.parametrize("role", ROLES)
def test_a_missing_object_answers_403_and_is_found_to_be_missing(
    bucket: Bucket, role: str, prefix: str
) -> None:
    # Also without a prefix the grant to list has a condition: StringLike s3:prefix "*".
    with bucket.law.under(*as_moto_asks(policy(role, prefix=prefix))) as user:
        refused(user.client().get_object, Key=f"{bucket.key}/missing")
        place = bucket.place(user)
        with open_store(Target.parse(place.uri, **place.options)) as store:
            assert not store.holds("missing")
            with pytest.raises(ObjectNotFoundError):
                store.get("missing")


def applied(lifecycle: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A lifecycle configuration as boto3 takes it."""
    names = {
        "abort_incomplete_multipart_upload": (
            "AbortIncompleteMultipartUpload",
            {"days_after_initiation": "DaysAfterInitiation"},
        ),
        "noncurrent_version_expiration": (
            "NoncurrentVersionExpiration",
            {"noncurrent_days": "NoncurrentDays"},
        ),
        "expiration": (
            "Expiration",
            {"days": "Days", "expired_object_delete_marker": "ExpiredObjectDeleteMarker"},
        ),
        "transition": ("Transitions", {"days": "Days", "storage_class": "StorageClass"}),
    }
    rules: list[dict[str, Any]] = []
    for one in lifecycle["rule"]:
        rule: dict[str, Any] = {
            "ID": one["id"],
            "Status": one["status"],
            "Filter": {"Prefix": one["filter"][0].get("prefix", "")},
        }
        for name, (spelt, fields) in names.items():
            for given in one.get(name, ()):
                told = {fields[key]: value for key, value in given.items() if value is not None}
                rule[spelt] = [told] if spelt == "Transitions" else told
        assert one.keys() - names.keys() == {"id", "status", "filter"}
        rules.append(rule)
    return rules


def rules_of(server: S3Server, **variables: Any) -> list[Any]:
    """The rules that S3 tells once the module's are put."""
    lifecycle = module(**variables).block("resource", "aws_s3_bucket_lifecycle_configuration", "this")
    client, name = server.client(), server.new_bucket()
    rules: Any = {"Rules": applied(lifecycle)}
    client.put_bucket_lifecycle_configuration(Bucket=name, LifecycleConfiguration=rules)
    return list(client.get_bucket_lifecycle_configuration(Bucket=name)["Rules"])


def everywhere(rule: Mapping[str, Any]) -> bool:
    return rule["Status"] == "Enabled" and not rule["Filter"].get("Prefix")


def test_the_bucket_forgets_incomplete_uploads_after_a_day_and_old_versions(moto: S3Server) -> None:
    rules = rules_of(moto)
    aborted = [one for one in rules if "AbortIncompleteMultipartUpload" in one]
    assert [one["AbortIncompleteMultipartUpload"] for one in aborted] == [{"DaysAfterInitiation": 1}]
    expired = [one for one in rules if "NoncurrentVersionExpiration" in one]
    assert [one["NoncurrentVersionExpiration"] for one in expired] == [{"NoncurrentDays": 7}]
    assert all(map(everywhere, (*aborted, *expired)))
    # A committed checkpoint goes by nobody's rule.
    assert not any("Days" in one.get("Expiration", {}) or "Transitions" in one for one in rules)


def test_old_checkpoints_move_and_throw_away_ones_go_where_that_is_asked(moto: S3Server) -> None:
    transition = {"days": 90, "storage_class": "GLACIER_IR"}
    (moved,) = (one for one in rules_of(moto, transition=transition) if "Transitions" in one)
    assert moved["Filter"] == {"Prefix": "runs/"}
    assert moved["Transitions"] == [{"Days": 90, "StorageClass": "GLACIER_IR"}]
    (gone,) = (one for one in rules_of(moto, expiration_days=1) if "Expiration" in one)
    assert gone["Expiration"] == {"Days": 1} and everywhere(gone)


def test_the_bucket_is_closed_to_the_public_and_encrypted(moto: S3Server) -> None:
    block = module().block("resource", "aws_s3_bucket_public_access_block", "this")
    assert [value for name, value in block.items() if name != "bucket"] == [True] * 4
    for key, wanted in (
        (None, {"SSEAlgorithm": "AES256"}),
        (KEY, {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": KEY}),
    ):
        rendered = module(kms_key_arn=key).block(
            "resource", "aws_s3_bucket_server_side_encryption_configuration", "this"
        )
        (rule,) = rendered["rule"]
        (default,) = rule["apply_server_side_encryption_by_default"]
        assert default["sse_algorithm"] == wanted["SSEAlgorithm"]
        assert default["kms_master_key_id"] == wanted.get("KMSMasterKeyID")
        assert rule["bucket_key_enabled"] is (key is not None)
        client, name = moto.client(), moto.new_bucket()
        put: Any = {"Rules": [{"ApplyServerSideEncryptionByDefault": wanted}]}
        client.put_bucket_encryption(Bucket=name, ServerSideEncryptionConfiguration=put)
        client.put_object(Bucket=name, Key="x", Body=b"")
        assert client.head_object(Bucket=name, Key="x")["ServerSideEncryption"] == wanted["SSEAlgorithm"]


def test_the_bucket_takes_nothing_that_is_not_encrypted_on_its_way(moto: S3Server) -> None:
    tls = policy("tls_only")
    for action in ("s3:GetObject", "s3:PutObject"):
        plain, old, good = (
            Ask(action, f"{ARN}/runs/x", {"aws:SecureTransport": secure, "s3:TlsVersion": version})
            for secure, version in (("false", "0"), ("true", "1.1"), ("true", "1.3"))
        )
        assert denies(tls, plain) and denies(tls, old) and not denies(tls, good)
    assert all(one["Principal"] == "*" for one in tls)
    assert not any(one["Effect"] == "Allow" for one in tls)
