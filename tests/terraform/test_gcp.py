"""The roles of terraform/gcp, and what each asks of a GCS server: enough for each role, and no more."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from cloudckpt.backends.load.read_lease import READ_LEASE
from support import duties
from support.gcs import GCSServer
from support.hcl import Module
from support.places import Place
from support.proxy import Proxy, Request, proxied

HERE = Path(__file__).parents[2] / "terraform" / "gcp"
BUCKET = "checkpoints"
ROLES = ("trainer", "reader", "janitor")
ROLE_OF_THE_KEY = "roles/cloudkms.cryptoKeyEncrypterDecrypter"

PERMISSIONS: Final[Mapping[str, frozenset[str]]] = {
    # What takes the place of another object deletes that.
    "PutObject": frozenset({"storage.objects.create", "storage.objects.delete"}),
    "CreateMultipartUpload": frozenset({"storage.multipartUploads.create", "storage.objects.create"}),
    "UploadPart": frozenset({"storage.multipartUploads.create", "storage.objects.create"}),
    "CompleteMultipartUpload": frozenset({"storage.multipartUploads.create", "storage.objects.create"}),
    "AbortMultipartUpload": frozenset({"storage.multipartUploads.abort"}),
    "ListMultipartUploads": frozenset({"storage.multipartUploads.list"}),
    "CopyObject": frozenset({"storage.objects.create", "storage.objects.get"}),
    "GetObject": frozenset({"storage.objects.get"}),
    "ListObjectsV2": frozenset({"storage.objects.list"}),
    "DeleteObject": frozenset({"storage.objects.delete"}),
    "DeleteObjects": frozenset({"storage.objects.delete"}),
}
"""By the proxy's names, as Cloud Storage documents them for methods of the JSON and of the XML API."""

DUTIES: Mapping[str, Callable[[Place, Proxy], None]] = {
    "trainer": duties.train,
    "reader": lambda place, _: duties.read(place),
    "janitor": lambda place, _: duties.tidy(place),
}


def module(**variables: Any) -> Module:
    given = {
        "project": "a-project",
        "bucket": BUCKET,
        "location": "us-central1",
        "prefix": "runs",
        **variables,
    }
    known = {
        "google_storage_bucket": {"this": {"name": BUCKET}},
        "google_project_iam_custom_role": {"this": {role: {"id": f"roles/{role}"} for role in ROLES}},
        "google_service_account": {"this": {role: {"email": f"{role}@a-project"} for role in ROLES}},
        "data": {"google_storage_project_service_account": {"this": {"email_address": "storage@google"}}},
    }
    return Module(HERE, given, known)


def granted(role: str) -> set[str]:
    each = {"key": role, "value": module().local("permissions")[role]}
    return set(module().block("resource", "google_project_iam_custom_role", "this", each=each)["permissions"])


@pytest.fixture(scope="module")
def before_gcs(gcs: GCSServer) -> Iterator[Proxy]:
    with proxied(gcs.endpoint) as proxy:
        yield proxy


@pytest.mark.parametrize("role", ROLES)
def test_a_role_may_do_what_it_has_to_and_nothing_to_spare(
    gcs: GCSServer, before_gcs: Proxy, role: str
) -> None:
    place = Place.on_gcs(gcs, gcs.new_bucket()).child("runs/run")
    if role != "trainer":
        duties.prepare(place)
    before_gcs.forget()
    DUTIES[role](place.behind(before_gcs.endpoint), before_gcs)
    requests = {name: before_gcs.seen(name) for name in PERMISSIONS}
    assert sum(map(len, requests.values())) == before_gcs.count, (
        "an operation that no permission is known for"
    )
    told = {(name, one): len(seen) for name, seen in requests.items() for one in PERMISSIONS[name]}
    duties.tell(role, granted(role), told)
    if role == "reader":  # tries to hold a lease, and reads without one where that is refused
        requests = {name: [one for one in seen if not is_of_lease(one)] for name, seen in requests.items()}
    used = [PERMISSIONS[name] for name, seen in requests.items() if seen]
    assert set[str]().union(*used) == granted(role)
    # What the condition goes by: an object's name, and the prefix of a listing.
    about = [name for seen in requests.values() for request in seen for name in names(request)]
    assert about and all(name.startswith("runs/") for name in about)


def is_of_lease(request: Request) -> bool:
    about = list(names(request))
    return bool(about) and all(READ_LEASE.fullmatch(name) for name in about)


def names(request: Request) -> Iterator[str]:
    """The names that a request is about, or the prefix of those that it lists."""
    split = urlsplit(request.target)
    query = parse_qs(split.query, keep_blank_values=True)
    if request.operation in ("ListObjectsV2", "ListMultipartUploads"):
        yield query.get("prefix", [""])[0]
    elif request.operation == "DeleteObjects":
        for found in re.findall(rb"^DELETE \S+/o/(\S+?)(?:\?\S*)? HTTP", request.body, re.MULTILINE):
            yield unquote(found.decode())
    elif request.operation == "CopyObject":
        source, _, copy = split.path.partition("/rewriteTo/")
        yield from (unquote(path.rpartition("/o/")[2]) for path in (source, copy))
    elif request.operation == "PutObject":
        (found,) = re.findall(rb'"name": "([^"]+)"', request.body)
        yield found.decode()
    elif "uploads" in query or "uploadId" in query:
        yield unquote(split.path.lstrip("/").partition("/")[2])
    else:
        yield unquote(split.path.rpartition("/o/")[2])


@pytest.mark.parametrize("role", ROLES)
def test_an_account_gets_its_role_on_the_bucket_below_the_prefix(role: str) -> None:
    each = {"key": role, "value": ()}
    member = module().block("resource", "google_storage_bucket_iam_member", "this", each=each)
    assert (member["bucket"], member["role"], member["member"]) == (
        BUCKET,
        f"roles/{role}",
        f"serviceAccount:{role}@a-project",
    )
    (condition,) = member["condition"]
    assert condition["expression"] == (
        'resource.name.startsWith("projects/_/buckets/checkpoints/objects/runs/") || '
        'api.getAttribute("storage.googleapis.com/objectListPrefix", "").startsWith("runs/")'
    )
    whole = module(prefix="").block("resource", "google_storage_bucket_iam_member", "this", each=each)
    assert whole["condition"] == []


def rendered(kind: str, **variables: Any) -> dict[str, dict[str, Any]]:
    """A resource of each role, by the name of the role."""
    return {
        role: module(**variables).block("resource", kind, "this", each={"key": role, "value": ()})
        for role in ROLES
    }


LONGEST: Final = {"project": "a" * 30, "bucket": "a" * 63, "prefix": "p" * 512}
BUCKETS: Final = (
    "abc",
    "a" * 63,
    "checkpoints",
    "checkpoints-2",
    "check_points",
    "check-points",
    "1-a_",
    "a--------b",
)


@pytest.mark.parametrize("name", [None, "b" * 22])
def test_names_and_descriptions_are_no_longer_than_google_allows(name: str | None) -> None:
    for account in rendered("google_service_account", name=name, **LONGEST).values():
        assert re.fullmatch(r"[a-z][a-z0-9-]{4,28}[a-z0-9]", account["account_id"])
        assert len(account["display_name"]) <= 100
        assert len(account["description"]) <= 256
    for role in rendered("google_project_iam_custom_role", name=name, **LONGEST).values():
        assert re.fullmatch(r"[A-Za-z0-9_.]{3,64}", role["role_id"])
    for member in rendered("google_storage_bucket_iam_member", name=name, **LONGEST).values():
        (condition,) = member["condition"]
        assert len(condition["description"]) <= 256


def test_buckets_of_one_project_have_roles_and_accounts_of_their_own() -> None:
    for kind, identifier in (
        ("google_project_iam_custom_role", "role_id"),
        ("google_service_account", "account_id"),
    ):
        given = [one[identifier] for bucket in BUCKETS for one in rendered(kind, bucket=bucket).values()]
        assert len(set(given)) == len(BUCKETS) * len(ROLES)
        assert all(re.fullmatch(r"[a-z][a-z0-9_-]{4,28}[a-z0-9]", one) for one in given), given
        named = rendered(kind, name="a-team", bucket="other")["reader"][identifier]
        assert named.replace("_", "-") == "a-team-reader"


def rules(**variables: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    bucket = module(**variables).block("resource", "google_storage_bucket", "this")
    return [(rule["action"][0], rule["condition"][0]) for rule in bucket["lifecycle_rule"]]


def test_the_bucket_is_closed_to_the_public_and_remembers_what_was_deleted() -> None:
    bucket = module().block("resource", "google_storage_bucket", "this")
    assert bucket["uniform_bucket_level_access"] is True
    assert bucket["public_access_prevention"] == "enforced"
    assert bucket["soft_delete_policy"] == [{"retention_duration_seconds": 7 * 24 * 3600}]
    assert bucket["encryption"] == []


def test_the_bucket_forgets_incomplete_uploads_after_a_day_and_old_versions() -> None:
    assert rules() == [
        ({"type": "AbortIncompleteMultipartUpload"}, {"age": 1}),
        ({"type": "Delete"}, {"days_since_noncurrent_time": 7, "with_state": "ARCHIVED"}),
    ]


def test_old_checkpoints_move_and_throw_away_ones_go_where_that_is_asked() -> None:
    moved = rules(transition={"days": 90, "storage_class": "COLDLINE"})[-1]
    assert moved == (
        {"type": "SetStorageClass", "storage_class": "COLDLINE"},
        {"age": 90, "matches_prefix": ["runs/"]},
    )
    assert rules(expiration_days=1)[-1] == ({"type": "Delete"}, {"age": 1})


def test_with_a_key_the_bucket_uses_it_and_storage_itself_may() -> None:
    key = "projects/p/locations/l/keyRings/r/cryptoKeys/k"
    with_key = module(kms_key_name=key)
    bucket = with_key.block("resource", "google_storage_bucket", "this")
    assert bucket["encryption"] == [{"default_kms_key_name": key}]
    assert with_key.block("resource", "google_kms_crypto_key_iam_member", "storage") == {
        "crypto_key_id": key,
        "role": ROLE_OF_THE_KEY,
        "member": "serviceAccount:storage@google",
    }
