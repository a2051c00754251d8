"""Hostile input: nothing runs, nothing hangs, memory stays bounded, and the error is the contract's."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

import cloudckpt
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import CheckpointError, IntegrityError
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.format import stock_archive
from cloudckpt.backends.format.pickle_limits import claims_too_much
from cloudckpt.backends.manage.gc import collect_garbage
from cloudckpt.backends.state.codec import archive as archives
from cloudckpt.backends.state.values import load_tensor, prove_safe
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import ObjectStore, Overwrite
from support import fuzz, hostile

pytestmark = pytest.mark.timeout(120)

SHORT = {
    "metadata": 1000,
    "structures": 400,
    "large": 4,
    "structured values": 80,
    "framing": 300,
    "values": 250,
    "plain": 1200,
    "checkpoint": 250,
}
LONG = {
    "metadata": 50_000,
    "structures": 100_000,
    "large": 1_000,
    "structured values": 50_000,
    "framing": 25_000,
    "values": 20_000,
    "plain": 100_000,
    "checkpoint": 8_000,
}
SEED = "FUZZ_SEED"
"""Variable with the seed of the long form."""


def fuzzed(kind: str, seed: int, count: int, folder: Path) -> dict[str, Any]:
    """Try inputs in a process of its own, and return its report."""
    command = [sys.executable, fuzz.__file__, kind, str(seed), str(count), str(folder)]
    tests = str(Path(fuzz.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": tests, "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert not done.returncode, (
        f"seed {seed}: {kind} ended with {done.returncode} at {folder}/current\n{done.stderr[-4000:]}"
    )
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize("kind", SHORT)
def test_hostile_input_is_refused_or_harmless(kind: str, tmp_path: Path) -> None:
    report = fuzzed(kind, 0, SHORT[kind], tmp_path)
    assert not report["findings"]
    assert report["count"] == SHORT[kind]
    assert len(report["outcomes"]) > 1 or kind == "large"  # of which there are few


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("kind", LONG)
def test_much_hostile_input_is_refused_or_harmless(kind: str, tmp_path: Path) -> None:
    seed = int(os.environ.get(SEED) or random.randrange(1 << 30))
    report = fuzzed(kind, seed, LONG[kind], tmp_path)
    print(report)  # noqa: T201 - a soak says what it met, and with which seed
    assert not report["findings"]


def test_the_fuzzer_hears_what_runs(tmp_path: Path) -> None:
    found = fuzzed("unguarded", 0, 5, tmp_path)["findings"]
    assert {what.partition(" ")[0] for what in found} > {"os.system", "open", "socket.connect"}


# --- what it found, and what was found on the way to it

DEEP_KEY = b"\x80\x04}N" + b"\x85" * 200_000 + b"Ns."
LAUGHING_KEY = b"\x80\x04}N" + b"2\x86" * 60 + b"Ns."
LAUGHING_KEY_BY_MEMO = b"\x80\x02}N" + b"".join(b"q%c0h%ch%c\x86" % (i, i, i) for i in range(60)) + b"Ns."
LISTS_OF_LISTS = b"]" + b"".join(b"q%c](h%ch%ce" % (i, i, i) for i in range(40))
CLAIMS = {
    "a list of lists, to be written out in an error": b"\x80\x02" + LISTS_OF_LISTS + b")R.",
    "a key nested so deep that its hash overflows the stack": DEEP_KEY,
    "a key that takes 2**60 steps to hash": LAUGHING_KEY,
    "the same by the memo": LAUGHING_KEY_BY_MEMO,
    "a large key, again and again": b"\x80\x04}q\x00N" + b"2\x86" * 12 + b"q\x01Ns" + b"h\x01Ns" * 9 + b".",
    "the same under DICT": b"\x80\x04(N" + b"2\x86" * 12 + b"Nd.",
    "the same in a frozenset": b"\x80\x04(N" + b"2\x86" * 12 + b"\x91.",
    "the same in a set": b"\x80\x04\x8f(N" + b"2\x86" * 12 + b"\x90.",
    "bytes of a length beyond the end": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 33) + b"x.",
    "a bytearray of a length beyond the end": b"\x80\x05\x96" + struct.pack("<Q", 1 << 33) + b"x.",
}


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_a_pickle_that_takes_undue_time_or_memory_is_refused_before_it_is_loaded(claim: bytes) -> None:
    assert claims_too_much(claim)
    with pytest.raises(IntegrityError, match="claims more"):
        md.load(claim, uri="memory://x")


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def with_pickle(data: bytes, pickled: bytes) -> bytes:
    return hostile.archive(hostile.records(data) | {"archive/data.pkl": pickled})


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_a_value_whose_pickle_takes_undue_time_or_memory_is_refused(claim: bytes) -> None:
    assert claims_too_much(claim)  # else what follows might hang or crash
    data = memoryview(with_pickle(saved(5), claim))
    for read in (lambda: prove_safe(data, "x"), lambda: load_tensor(data, "x", trust=False)):
        with pytest.raises(IntegrityError, match=r"claims more|calls something that is no name"):
            read()


def test_a_value_nested_deeper_than_can_be_serialised_again_is_damaged() -> None:
    nested = with_pickle(saved(5), b"\x80\x02" + b"]" * 1500 + b"a" * 1499 + b".")
    with pytest.raises(IntegrityError, match="RecursionError"):
        prove_safe(memoryview(nested), "x")


def test_an_archive_that_grows_when_it_is_read_is_refused() -> None:
    parts = hostile.records(saved(5))
    parts["archive/data.pkl"] += bytes(3 << 20)
    data = hostile.archive(parts, deflated=True)
    assert len(data) < 10_000
    with pytest.raises(IntegrityError, match="claims to hold more"):
        prove_safe(memoryview(data), "x")
    assert located(data) is None


def test_torch_that_can_not_be_asked_what_an_archive_claims_is_not_needed() -> None:
    parts = hostile.records(saved(5))
    for padding in (0, 3 << 20):
        data = hostile.archive(parts | {"archive/more": bytes(padding)}, deflated=True)
        archive = torch._C.PyTorchFileReader(io.BytesIO(data))
        without_the_question = object()  # as before torch 2.13
        told = archives.claimed(without_the_question, io.BytesIO(data))
        assert told == archives.claimed(archive, io.BytesIO(data)) >= padding


def located(data: bytes) -> stock_archive.Stored | None:
    return stock_archive.locate(0, len(data), lambda offset, size: data[offset : offset + size])


def test_a_payload_of_the_other_byte_order_is_not_read_as_it_lies() -> None:
    tensor = torch.arange(20_000, dtype=torch.int32)
    parts = hostile.records(saved(tensor))
    assert located(hostile.archive(parts)) is not None
    other = hostile.archive({**parts, "archive/byteorder": b"big"})
    assert located(other) is None
    turned = load_tensor(memoryview(other), "x", trust=False)
    assert turned[1] == 1 << 24


@pytest.mark.parametrize(
    "value",
    [
        random.Random(0).getstate(),
        tuple(range(50_000)),
        {("a", i): ((i,) * 10,) * 10 for i in range(100)},
        [((1,) * 100,) * 100] * 100,
        {frozenset({("a", 1)}): {1, 2}},
    ],
    ids=["the state of a generator", "a long tuple", "tuples as keys", "shared tuples", "sets"],
)
def test_honest_values_of_many_tuples_are_not_refused(value: Any) -> None:
    for protocol in range(6):
        assert not claims_too_much(pickle.dumps(value, protocol))
    if not isinstance(value, dict) or not any(isinstance(key, frozenset) for key in value):
        assert torch.load(prove_safe(memoryview(saved(value)), "x"), weights_only=False) == value


def test_chunks_of_a_scalar_that_are_no_sizes_are_refused() -> None:
    chunk = ChunkStorageMetadata(torch.Size([]), cast(Any, {}))
    entry = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size([]), [chunk])
    with pytest.raises(IntegrityError, match="not consistent"):
        md.load(pickle.dumps(Metadata({"x": entry}, storage_data={})), uri="memory://x")


# --- names that lead out of the checkpoint


@pytest.fixture(params=["folder", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"file://{tmp_path}/run" if request.param == "folder" else f"memory://{tmp_path.name}"


VICTIM = f"victim/__0_0.{'a' * 32}.distcp"
OUTSIDE = [
    f"../{VICTIM}",
    f"x/../../{VICTIM}",
    f"./../{VICTIM}",
    "/{root}/" + VICTIM,
    "//{root}/" + VICTIM,
]


def save(uri: str, **options: Any) -> None:
    dcp.save({"x": torch.arange(10.0)}, storage_writer=cloudckpt.StorageWriter(uri, **options))


def name_other_objects(store: ObjectStore, name: str) -> None:
    """Make a checkpoint's metadata say that its items lie in the object ``name``."""
    data, _ = store.get(md.METADATA_NAME)
    metadata: Metadata = md.load(data, uri=store.uri)
    for info in metadata.storage_data.values():
        info.relative_path = name
    store.put(md.METADATA_NAME, md.dump(metadata), Overwrite())


@pytest.fixture(params=OUTSIDE)
def leading_out(request: pytest.FixtureRequest, run: str) -> str:
    """A checkpoint whose items lie in an object beside it, byte for byte as they should be."""
    save(f"{run}/step-1")
    root = open_store(Target.parse(run))
    with open_store(Target.parse(f"{run}/step-1")) as store, root:
        (data,) = (info.name for info in store.list().objects if info.name.endswith(".distcp"))
        root.put(VICTIM, store.get(data)[0], Overwrite())
        name_other_objects(store, request.param.format(root=Target.parse(run).path.strip("/")))
    return run


def assert_untouched(run: str) -> None:
    with open_store(Target.parse(run)) as root:
        assert root.stat(VICTIM).size > 40


def test_an_object_outside_the_checkpoint_is_not_read(leading_out: str) -> None:
    state = {"x": torch.zeros(10)}
    with pytest.raises(CheckpointException) as caught:
        dcp.load(state, storage_reader=cloudckpt.StorageReader(f"{leading_out}/step-1"))
    ((failure, _),) = caught.value.failures.values()
    assert isinstance(failure, IntegrityError)
    assert not state["x"].any()


def test_an_object_outside_the_checkpoint_is_not_deleted_by_overwriting(leading_out: str) -> None:
    save(f"{leading_out}/step-1", overwrite=True)
    assert_untouched(leading_out)
    state = {"x": torch.zeros(10)}
    dcp.load(state, storage_reader=cloudckpt.StorageReader(f"{leading_out}/step-1"))
    assert torch.equal(state["x"], torch.arange(10.0))


def test_an_object_outside_the_checkpoint_is_not_garbage(leading_out: str) -> None:
    for older_than in (timedelta(0), timedelta(days=1)):
        garbage = collect_garbage(f"{leading_out}/step-1", older_than=older_than)
        assert garbage.objects == ()
        assert_untouched(leading_out)


@pytest.mark.parametrize("name", [".metadata", "notes.txt", "sub/__0_0.distcp", "step-2"])
def test_overwriting_deletes_nothing_but_data_objects_of_the_checkpoint(run: str, name: str) -> None:
    save(f"{run}/step-1")
    with open_store(Target.parse(f"{run}/step-1")) as store:
        if name != md.METADATA_NAME:
            store.put(name, b"not ours", Overwrite())
        name_other_objects(store, name)
        save(f"{run}/step-1", overwrite=True)
        assert store.stat(name).size > 0


@pytest.mark.parametrize("name", [n for n in hostile.NAMES if isinstance(n, str)], ids=ascii)
def test_whatever_an_object_is_called_loading_stays_below_the_checkpoint(run: str, name: str) -> None:
    save(f"{run}/step-1")
    try:
        with open_store(Target.parse(f"{run}/step-1")) as store:
            name_other_objects(store, name)
    except UnicodeEncodeError:
        pytest.skip("no pickle holds this name")
    state = {"x": torch.zeros(10)}
    with pytest.raises(CheckpointException) as caught:
        dcp.load(state, storage_reader=cloudckpt.StorageReader(f"{run}/step-1"))
    ((failure, _),) = caught.value.failures.values()
    assert isinstance(failure, CheckpointError), repr(failure)
