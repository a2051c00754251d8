"""Every way to lose the answer to the commit's put: on memory, on S3 through a cutting proxy, and on GCS."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator
from typing import Any, Protocol

import pytest
from torch.distributed.checkpoint.metadata import Metadata

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import (
    CheckpointExistsError,
    CommitError,
    ObjectNotFoundError,
    StorageError,
    UnansweredError,
    UncertainCommitError,
)
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.save import commit
from cloudckpt.backends.save.commit import put_metadata
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import Condition, ObjectInfo, ObjectStore
from cloudckpt.backends.stores.memory import MemoryStore
from support.gcs import GCSServer
from support.proxy import Answer, CutRequest, LoseAnswer, Proxy, proxied
from support.servers import S3Server

NAME = ".metadata"


class Line(Protocol):
    """The connection between a coordinator and its store, as a test spoils it."""

    store: ObjectStore
    """Over the line; each request is tried once."""
    loses_refusals: bool
    """Whether an answer that is lost may be a refusal."""

    def cut_after(self) -> None:
        """Have the next put carried out, and its answer lost."""

    def cut_before(self) -> None:
        """Have the next put lost on its way."""

    def refuse(self) -> None:
        """Have the next put answered with a failure, and not carried out."""

    def deafen(self) -> None:
        """Have every read fail from now on."""

    def mend(self) -> None:
        """Let everything through again."""


class MemoryLine(MemoryStore):
    """A memory store and its line in one."""

    loses_refusals = False

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.store: ObjectStore = self
        self.mend()

    def mend(self) -> None:
        self._before: Exception | None = None
        self._after: Exception | None = None
        self._reads: Exception | None = None

    def cut_after(self) -> None:
        self._after = UnansweredError("cut")

    def cut_before(self) -> None:
        self._before = UnansweredError("cut")

    def refuse(self) -> None:
        self._before = StorageError("no")

    def deafen(self) -> None:
        self._reads = StorageError("down")

    def put(self, name: str, data: bytes, condition: Condition) -> ObjectInfo:
        if self._before is not None:
            raise self._before
        info = super().put(name, data, condition)
        if self._after is not None:
            raise self._after
        return info

    def get(self, name: str) -> tuple[bytes, ObjectInfo]:
        if self._reads is not None:
            raise self._reads
        return super().get(name)


class ProxyLine:
    """A store of moto's behind a proxy."""

    loses_refusals = True

    def __init__(self, proxy: Proxy, bucket: str, server: S3Server, retries: int = 0) -> None:
        self._proxy = proxy
        options: dict[str, Any] = {
            "endpoint_url": proxy.endpoint,
            "region": "us-east-1",
            "retries": retries,
            "storage_options": {"key": server.key, "secret": server.secret},
        }
        self.store = open_store(Target.parse(f"s3://{bucket}/{uuid.uuid4().hex}", **options))
        assert self.store.capabilities.conditional_update  # asked now, for its puts are not to be spoilt

    def cut_after(self) -> None:
        self._proxy.spoil("PutObject", [LoseAnswer()])

    def cut_before(self) -> None:
        self._proxy.spoil("PutObject", [CutRequest(0)])

    def refuse(self) -> None:
        self._proxy.spoil("PutObject", [Answer(500, "InternalError")])

    def deafen(self) -> None:
        for operation in ("GetObject", "ListObjectsV2"):
            self._proxy.spoil(operation, itertools.repeat(Answer(403, "AccessDenied")))

    def mend(self) -> None:
        self._proxy.forget()

    def puts(self) -> int:
        return len(self._proxy.seen("PutObject"))


class GCSLine:
    """A store on a GCS server that cuts off its answers itself."""

    loses_refusals = True

    def __init__(self, server: GCSServer, bucket: str, retries: int = 0) -> None:
        self._server, self._bucket = server, bucket
        target = Target.parse(
            f"gs://{bucket}/{uuid.uuid4().hex}", endpoint_url=server.endpoint, retries=retries
        )
        self.store = open_store(target)
        assert self.store.capabilities.conditional_update  # asked now, for its puts are not to be spoilt
        self._faults: list[dict[str, Any]] = []

    def _spoil(self, method: str, do: str, times: int) -> None:
        self._faults.append({"method": method, "path": f"/{self._bucket}/o", "do": do, "times": times})
        self._server.spoil(*self._faults)

    def cut_after(self) -> None:
        self._spoil("POST", "reset after", 1)

    def cut_before(self) -> None:
        self._spoil("POST", "reset before", 1)

    def refuse(self) -> None:
        self._spoil("POST", "status 500", 1)

    def deafen(self) -> None:
        self._spoil("GET", "status 503", 1000)

    def mend(self) -> None:
        self._faults.clear()
        self._server.spoil()

    def puts(self) -> int:
        where = f"/upload/storage/v1/b/{self._bucket}/o"
        return sum(
            method == "POST" and path.startswith(where) for method, path, *_ in self._server.requests()
        )


@pytest.fixture(params=["memory", "moto", "gcs"])
def line(request: pytest.FixtureRequest) -> Iterator[Line]:
    if request.param == "memory":
        yield MemoryLine(Target.parse(f"memory://lost-{uuid.uuid4().hex}"))
        return
    if request.param == "gcs":
        gcs: GCSServer = request.getfixturevalue("gcs")
        cut = GCSLine(gcs, gcs.new_bucket())
        yield cut
        cut.mend()
        return
    moto: S3Server = request.getfixturevalue("s3_server_named")("moto")
    with proxied(moto.endpoint) as proxy:
        yield ProxyLine(proxy, moto.new_bucket(), moto)


def metadata_of(save_id: str) -> bytes:
    metadata = Metadata({}, storage_data={})
    md.add_extras(metadata, save_id, "0", {})
    return md.dump(metadata)


def put(store: ObjectStore, save_id: str, previous: commit.Previous | None = None) -> None:
    put_metadata(store, NAME, metadata_of(save_id), save_id, previous)


def committed(line: Line) -> str | None:
    line.mend()
    try:
        return md.save_id_of(md.load(line.store.get(NAME)[0], uri=line.store.uri))
    except ObjectNotFoundError:
        return None


@pytest.fixture(params=["created", "overwritten"])
def previous(request: pytest.FixtureRequest, line: Line) -> commit.Previous | None:
    """What is there when a save begins: nothing, or the checkpoint that it overwrites."""
    if request.param == "overwritten":
        put(line.store, "old")
    return commit.find_previous(line.store, NAME)


def test_ours_is_read_back(line: Line, previous: commit.Previous | None) -> None:
    line.cut_after()
    put(line.store, "ours", previous)
    assert committed(line) == "ours"


def test_what_never_arrived_may_still_come(line: Line, previous: commit.Previous | None) -> None:
    line.cut_before()
    with pytest.raises(UncertainCommitError):
        put(line.store, "ours", previous)
    assert committed(line) == ("old" if previous else None)


@pytest.mark.parametrize("cut", ["cut_before", "cut_after"])
def test_another_s_is_read_back(line: Line, previous: commit.Previous | None, cut: str) -> None:
    """An overwrite can't be obeyed any more; what was to be created can, once the other is deleted."""
    put(line.store, "theirs", previous)
    getattr(line, cut)()
    told = cut == "cut_after" and not line.loses_refusals
    with pytest.raises(CheckpointExistsError if previous or told else UncertainCommitError):
        put(line.store, "ours", previous)
    assert committed(line) == "theirs"


def test_nothing_is_read_back_where_something_was(line: Line) -> None:
    put(line.store, "old")
    previous = commit.find_previous(line.store, NAME)
    line.store.delete([NAME])
    line.cut_before()
    with pytest.raises(CommitError) as caught:
        put(line.store, "ours", previous)
    assert type(caught.value) is CommitError
    assert committed(line) is None


@pytest.mark.parametrize("cut", ["cut_before", "cut_after", "refuse"])
def test_what_can_not_be_read_back_is_uncertain(
    line: Line, previous: commit.Previous | None, cut: str
) -> None:
    getattr(line, cut)()
    line.deafen()
    with pytest.raises(UncertainCommitError):
        put(line.store, "ours", previous)
    assert committed(line) == ("ours" if cut == "cut_after" else "old" if previous else None)


def test_a_refusal_that_is_an_answer_is_a_failure(line: Line, previous: commit.Previous | None) -> None:
    line.refuse()
    with pytest.raises(CommitError) as caught:
        put(line.store, "ours", previous)
    assert type(caught.value) is CommitError
    assert committed(line) == ("old" if previous else None)


@pytest.fixture(params=["moto", "gcs"])
def patient_line(request: pytest.FixtureRequest) -> Iterator[ProxyLine | GCSLine]:
    """A line whose store tries again."""
    if request.param == "gcs":
        gcs: GCSServer = request.getfixturevalue("gcs")
        yield GCSLine(gcs, gcs.new_bucket(), retries=3)
        return
    moto: S3Server = request.getfixturevalue("s3_server_named")("moto")
    with proxied(moto.endpoint) as proxy:
        yield ProxyLine(proxy, moto.new_bucket(), moto, retries=3)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("cut", ["cut_before", "cut_after"])
def test_with_retries_a_lost_answer_is_no_error(
    patient_line: ProxyLine | GCSLine, overwrite: bool, cut: str
) -> None:
    """The repetition succeeds, or is refused because the first try won."""
    line = patient_line
    if overwrite:
        put(line.store, "old")
    previous = commit.find_previous(line.store, NAME)
    before = line.puts()
    getattr(line, cut)()
    put(line.store, "ours", previous)
    assert line.puts() >= before + 2
    assert committed(line) == "ours"
