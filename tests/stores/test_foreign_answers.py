"""An answer of status 200 that is not that of the request is an error of the store, and never a success."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from cloudckpt.backends.errors import CheckpointError, StorageError
from cloudckpt.backends.store import ObjectStore
from cloudckpt.backends.stores import gcs_capabilities, s3_capabilities
from cloudckpt.backends.stores.gcs import GCSStore
from cloudckpt.backends.stores.s3 import S3Store
from cloudckpt.backends.target import Target
from support.foreign import ANSWERS, OPERATIONS, WELL_FORMED, Stage, stage
from support.gcs import GCSServer
from support.proxy import Proxy, RawAnswer, Request, Spoiling, proxied
from support.servers import S3Server

_STORES = ("s3", "gcs", "gcs sessions")
_MUST_FAIL = ("empty", "blank", "a foreign document", "an empty list", "deep XML", "deep JSON")
"""Answers that no operation can do anything with."""


@dataclass(frozen=True)
class _Place:
    kind: str
    proxy: Proxy
    store: ObjectStore
    source: ObjectStore
    found: Callable[[str], bytes | None]

    def stage(self) -> Stage:
        self.proxy.forget()
        s3_capabilities.forget_servers()
        gcs_capabilities.forget_servers()
        return stage(self.store, self.source, self.found)

    def spoil(self, operation: str, answer: bytes) -> None:
        """Give an answer to every request of an operation."""

        def rule(request: Request) -> Spoiling:
            return RawAnswer(answer) if _is_of(self.kind, request, operation) else None

        self.proxy.rule(rule)


def _is_of(kind: str, request: Request, operation: str) -> bool:
    asked = request.operation
    if operation == "GetRange":
        return asked == "GetObject" and "range" in request.headers
    if kind == "s3":
        is_copy = "x-amz-copy-source" in request.headers
        return ("CopyObject" if is_copy and asked == "PutObject" else asked) == operation
    if operation in ("HeadObject", "GetObject") and asked == "GetObject":
        return ("alt=media" in request.target) == (operation == "GetObject")
    if operation == "CompleteMultipartUpload" and kind != "gcs":
        range_ = request.headers.get("content-range", "/*")
        return asked == "UploadPart" and not range_.endswith("/*")
    return asked == operation


@pytest.fixture(scope="module", params=_STORES)
def place(request: pytest.FixtureRequest) -> Iterator[_Place]:
    with ExitStack() as stack:
        if request.param == "s3":
            moto: S3Server = request.getfixturevalue("moto")
            bucket, client = moto.new_bucket(), moto.client()
            proxy = stack.enter_context(proxied(moto.endpoint))
            keys = {"key": "test", "secret": "testtest"}

            def s3(path: str) -> S3Store:
                options = {"endpoint_url": proxy.endpoint, "region": "us-east-1", "storage_options": keys}
                target = Target.parse(f"s3://{bucket}/{path}", retries=0, timeout=20.0, **options)
                return stack.enter_context(S3Store(target))

            def in_bucket(name: str) -> bytes | None:
                listed = client.list_objects_v2(Bucket=bucket, Prefix=f"run/{name}")
                if f"run/{name}" not in [one["Key"] for one in listed.get("Contents", ())]:
                    return None
                return client.get_object(Bucket=bucket, Key=f"run/{name}")["Body"].read()

            yield _Place(request.param, proxy, s3("run"), s3("source"), in_bucket)
        else:
            gcs: GCSServer = request.getfixturevalue("gcs")
            name = gcs.new_bucket(xml=request.param == "gcs")
            proxy = stack.enter_context(proxied(gcs.endpoint))

            def store(path: str) -> GCSStore:
                options = {"endpoint_url": proxy.endpoint, "retries": 0, "timeout": 20.0}
                return stack.enter_context(GCSStore(Target.parse(f"gs://{name}/{path}", **options)))

            yield _Place(
                request.param, proxy, store("run"), store("source"), lambda one: gcs.read(name, f"run/{one}")
            )


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # botocore leaves connections
def test_a_foreign_answer_is_never_a_success(place: _Place, operation: str) -> None:
    if place.kind == "gcs sessions" and operation == "ListMultipartUploads":
        pytest.skip("GCS lists no sessions")
    wrong: list[str] = []
    for kind, answer in ANSWERS.items():
        made = place.stage()
        place.spoil(operation, answer)
        count = place.proxy.count
        try:
            is_true = OPERATIONS[operation](made)
        except CheckpointError as error:
            if not isinstance(error, (StorageError, ValueError)) or error.uri is None:
                wrong.append(f"{kind}: {error!r}")
            elif kind in _MUST_FAIL and not (isinstance(error, StorageError) and error.hint):
                wrong.append(f"{kind}: no StorageError with a cure: {error!r}")
        except Exception as error:  # noqa: BLE001 - which is what the test is about
            wrong.append(f"{kind}: {type(error).__name__}: {error}")
        else:
            if (not is_true and (operation, kind) not in WELL_FORMED) or (
                kind in _MUST_FAIL and operation != "CopyObject"
            ):
                wrong.append(f"{kind}: a success that is {'none' if not is_true else 'not told'}")
        if not any(
            _is_of(place.kind, one, operation) for one in itertools.islice(place.proxy.all(), count, None)
        ):
            wrong.append(f"{kind}: no such request was made")
    assert not wrong, "\n".join(wrong)
