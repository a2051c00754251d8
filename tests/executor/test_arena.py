"""An arena is one descriptor of memory that grows, shrinks and is followed; copies from CUDA keep order."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from cloudckpt.backends.errors import ExecutorError
from cloudckpt.backends.transfer import cuda
from cloudckpt.executor.snapshot import arena as arenas
from cloudckpt.executor.snapshot import snapshot, source_copy
from cloudckpt.executor.snapshot.arena import Arena
from cloudckpt.executor.snapshot.memory_layout import Layout, Source
from support import states
from support.snapshots import program, round_trip

MIB = 1 << 20

on_linux = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory that grows in place is Linux's")

FOLLOWER = """
import sys
from cloudckpt.executor.snapshot.arena import Arena
arena = Arena.attach(int(sys.argv[1]), int(sys.argv[2]))
print("ready", flush=True)
for line in sys.stdin:
    arena.follow(int(line))
    everything = arena.bytes_at(0, arena.nbytes)
    everything[1] = 77
    print(arena.nbytes, int(everything[0]), int(everything[-1]), flush=True)
    del everything
"""


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena()
    yield made
    made.close()


def descriptors() -> int:
    """How many are open but sockets, which tests before this one may have left to others to close."""
    gc.collect()
    links = (path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink())
    return sum(not link.name.startswith("socket:") for link in links)


def resident(arena: Arena) -> int:
    """Bytes of memory behind the descriptor."""
    return os.fstat(arena.fd).st_blocks * 512


@contextlib.contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    """Let no file of this process, shared memory included, be larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_it_grows_to_what_is_asked_for(arena: Arena) -> None:
    for nbytes in (0, 1, 3 * MIB, 40 * MIB + 1):
        arena.reserve(nbytes)
        assert nbytes <= arena.nbytes <= nbytes + 2 * MIB
        assert resident(arena) >= arena.nbytes  # the pages are there, not just promised
        arena.bytes_at(0, arena.nbytes).fill_(1)


@on_linux
def test_one_descriptor_serves_whatever_its_size(arena: Arena) -> None:
    arena.reserve(MIB)
    fd, identity, file = arena.fd, arena.identity, os.fstat(arena.fd).st_ino
    open_then = descriptors()
    for nbytes in (50 * MIB, 2 * MIB, 90 * MIB, 0, 10 * MIB):
        arena.reserve(nbytes)
        assert (arena.fd, arena.identity, os.fstat(arena.fd).st_ino) == (fd, identity, file)
        assert descriptors() == open_then


@on_linux
def test_ten_thousand_tensors_take_no_descriptor_each(arena: Arena) -> None:
    snapshot.take({"one": torch.ones(3)}, arena)
    open_then = descriptors()
    state = {str(number): torch.full((10,), number) for number in range(10_000)}
    restored = snapshot.restore(snapshot.take(state, arena), arena)
    assert descriptors() == open_then
    states.assert_bit_exact(restored, state)


def test_it_keeps_pages_that_a_somewhat_smaller_state_leaves_over(arena: Arena) -> None:
    arena.reserve(64 * MIB)
    where = arena.address
    arena.bytes_at(0, 64 * MIB).fill_(5)
    arena.reserve(33 * MIB)
    arena.reserve(64 * MIB)
    assert arena.address == where
    kept = bool(arena.bytes_at(0, 64 * MIB).eq(5).all())
    assert kept  # the same pages: nothing was given back


def test_it_gives_back_what_a_much_smaller_state_leaves_over(arena: Arena) -> None:
    arena.reserve(64 * MIB)
    arena.reserve(8 * MIB)
    assert arena.nbytes == 8 * MIB
    assert resident(arena) <= 8 * MIB
    arena.bytes_at(0, 8 * MIB).fill_(1)


def test_touch_has_every_page_mapped_and_close_gives_all_back(arena: Arena) -> None:
    arena.touch()  # before there is memory: nothing to do
    before = descriptors()
    arena.reserve(4 * MIB)
    arena.bytes_at(0, 4).fill_(9)
    arena.touch()
    assert not arena.bytes_at(0, 4 * MIB).any()
    arena.close()
    assert descriptors() == before
    with pytest.raises(ExecutorError, match="without memory"):
        arena.bytes_at(0, 1)


def test_a_tensor_that_is_left_stays_valid_when_the_arena_is_resized_and_closed(arena: Arena) -> None:
    """Its memory stays mapped; what it shows is the next snapshot's."""
    arena.reserve(2 * MIB)
    left = arena.bytes_at(0, 100).fill_(3)
    arena.reserve(20 * MIB)
    assert int(left.sum()) == 300
    arena.close()
    assert int(left.sum()) == 300


@on_linux
def test_another_process_follows_every_change_of_size(arena: Arena) -> None:
    arena.reserve(2 * MIB)
    with program(FOLLOWER, arena.fd, arena.nbytes, fds=(arena.fd,)) as follower:
        assert follower.listen() == "ready"
        for turn, nbytes in enumerate((2 * MIB, 80 * MIB, 4 * MIB, 5 * MIB, 160 * MIB)):
            arena.reserve(nbytes)
            everything = arena.bytes_at(0, arena.nbytes)
            everything[0], everything[-1] = turn, 100 + turn
            assert follower.ask(arena.nbytes) == f"{arena.nbytes} {turn} {100 + turn}"
            assert int(everything[1]) == 77  # and what it writes is seen here
            del everything
        assert follower.close() == 0


@pytest.mark.parametrize(
    ("memfd", "in_place"),
    [
        pytest.param(True, True, marks=on_linux, id="memfd"),
        pytest.param(False, True, marks=on_linux, id="POSIX on Linux"),
        pytest.param(False, False, id="POSIX"),
    ],
)
def test_memory_that_is_not_there_is_an_error_and_the_next_snapshot_works(
    arena: Arena, memfd: bool, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arenas, "_GROWS_IN_PLACE", in_place)
    if not memfd:
        monkeypatch.setattr(arenas, "memory_file", lambda: None)
    before = descriptors()
    arena.reserve(2 * MIB)
    identity = arena.identity
    with file_size_limit(8 * MIB):
        with pytest.raises(ExecutorError, match=r"a snapshot needs 67,108,864 bytes .* no room") as caught:
            arena.reserve(64 * MIB)
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.hint
        assert ("memfd_create" in caught.value.hint) == (in_place and not memfd)
        assert (arena.fd, arena.nbytes) == (-1, 0)
        assert descriptors() == before
        state = {"small": torch.arange(1000)}
        restored = snapshot.restore(snapshot.take(state, arena), arena)
        states.assert_bit_exact(restored, state)
    assert arena.identity > identity  # so that the checkpoint process is sent the new descriptor


def test_posix_shared_memory_serves_where_there_is_no_memfd(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arenas, "_GROWS_IN_PLACE", False)
    monkeypatch.setattr(arenas, "memory_file", lambda: None)
    state = {"t": states.content("posix", (1000, 1000), torch.float32)}
    before = descriptors()
    with round_trip(state) as (_, restored):
        states.assert_bit_exact(restored, state)
    del restored
    assert descriptors() == before
    arena.reserve(8 * MIB)
    seen = [arena.identity]
    arena.reserve(20 * MIB)
    seen.append(arena.identity)
    assert len(set(seen)) == 2  # another segment, which has to be sent
    arena.bytes_at(0, 20 * MIB).fill_(1)
    arena.reserve(2 * MIB)
    assert arena.identity == seen[-1]
    assert descriptors() == before + 2  # its own and its mapping's: those of the first are closed
    assert str(Path(f"/proc/self/fd/{arena.fd}").readlink()).endswith(" (deleted)")  # no name is left behind


def test_arenas_are_told_apart_by_their_identities(arena: Arena) -> None:
    other = Arena()
    arena.reserve(1)
    other.reserve(1)
    assert arena.identity != other.identity
    other.close()


# No device is needed for what follows: the runtime's part is played by what notes the calls to it.

DEVICE = torch.device("cuda", 0)


class Runtime:
    """CUDA's runtime and torch's streams, noting what is asked of them in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.refuses = False

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802 - CUDA's name
        self.calls.append(f"pin {nbytes}")
        return int(self.refuses)

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802 - CUDA's name
        self.calls.append("unpin")
        return 0


class OnDevice:
    """Memory that says it is a device's."""

    device = DEVICE


@pytest.fixture
def runtime(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    noted = Runtime()

    class Stream:
        def __init__(self, device: torch.device | None = None) -> None:
            self.device = device

        def wait_stream(self, other: object) -> None:
            noted.calls.append(f"side waits for {other}")

        def synchronize(self) -> None:
            noted.calls.append("synchronize")

    @contextlib.contextmanager
    def current(stream: Stream) -> Iterator[None]:
        assert stream.device == DEVICE
        noted.calls.append("enter side")
        yield
        noted.calls.append("leave side")

    copy_bytes: Any = source_copy._as_bytes

    def as_bytes(source: Source, arena: Arena, offset: int, *, non_blocking: bool) -> None:
        if source.memory.device.type == "cpu":
            copy_bytes(source, arena, offset, non_blocking=non_blocking)
        else:
            noted.calls.append(f"copy to {offset}, {non_blocking=}")

    monkeypatch.setattr(cuda, "_cudart", lambda: noted)
    monkeypatch.setattr(cuda, "_forget_error", lambda: noted.calls.append("forget the error"))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the caller's on {device}")
    monkeypatch.setattr(torch.cuda, "stream", current)
    monkeypatch.setattr(source_copy, "_as_bytes", as_bytes)
    yield noted
    arena.close()  # which asks to unpin


def of_device(*offsets: int) -> Layout:
    sources = [Source(cast("Any", OnDevice()), 0, 64) for _ in offsets]
    return Layout([], sources, list(offsets), 64 * len(offsets))


def test_device_copies_follow_the_callers_work_on_a_stream_of_their_own_and_are_awaited(
    arena: Arena, runtime: Runtime
) -> None:
    arena.reserve(1)
    source_copy.copy(of_device(0, 64), arena)
    assert runtime.calls == [
        f"pin {arena.nbytes}",
        "side waits for the caller's on cuda:0",
        "enter side",
        "copy to 0, non_blocking=True",
        "copy to 64, non_blocking=True",
        "leave side",
        "synchronize",
    ]


def test_pages_are_pinned_once_and_anew_only_when_the_arena_is_resized(
    arena: Arena, runtime: Runtime
) -> None:
    arena.reserve(1)
    for _ in range(3):
        source_copy.copy(of_device(0), arena)
    assert [call for call in runtime.calls if "pin" in call] == [f"pin {arena.nbytes}"]
    assert arena.pinned
    runtime.calls.clear()
    arena.reserve(10 * MIB)
    assert runtime.calls == ["unpin"]  # before the pages go
    source_copy.copy(of_device(0), arena)
    arena.close()
    assert [call for call in runtime.calls if "pin" in call] == ["unpin", f"pin {10 * MIB}", "unpin"]


def test_pages_that_can_not_be_pinned_are_copied_to_all_the_same(arena: Arena, runtime: Runtime) -> None:
    runtime.refuses = True
    arena.reserve(1)
    source_copy.copy(of_device(0), arena)
    assert not arena.pinned
    assert runtime.calls[1] == "forget the error"  # or the trainer's next kernel would be said to have failed
    assert runtime.calls[-1] == "synchronize"
    arena.close()
    assert "unpin" not in runtime.calls


def test_a_copy_that_fails_leaves_none_under_way(
    arena: Arena, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_args: Any, **_options: Any) -> None:
        raise RuntimeError("out of memory on the device")

    monkeypatch.setattr(source_copy, "_as_bytes", fails)
    arena.reserve(1)
    with pytest.raises(RuntimeError, match="out of memory"):
        source_copy.copy(of_device(0), arena)
    assert runtime.calls[-1] == "synchronize"


def test_a_state_in_host_memory_asks_nothing_of_cuda(arena: Arena, runtime: Runtime) -> None:
    snapshot.take({"host": torch.ones(2 * MIB), "small": torch.ones(3)}, arena)
    assert runtime.calls == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, to copy from it for real")
def test_tensors_of_a_real_device_come_back_as_the_callers_stream_left_them() -> None:
    device = torch.device("cuda")
    host = states.content("device", (2048, 2048), torch.float32).nan_to_num(0)
    whole = torch.zeros(2048, 2048, device=device)
    state = {"whole": whole, "rows": whole[3:9], "column": whole[:, 7], "host": host}
    arena = Arena()
    for factor in (1.0, 2.0):
        expected = host * factor
        square = torch.ones(4096, 4096, device=device)
        for _ in range(20):
            square = square @ square * 1e-4  # keeps the stream busy, so that a copy that did not wait is seen
        whole.copy_(host.to(device) * factor, non_blocking=True)
        taken = snapshot.take(state, arena)
        whole.zero_()
        torch.cuda.synchronize()
        assert arena.pinned
        restored = snapshot.restore(taken, arena)
        assert torch.equal(restored["whole"], expected)
        assert torch.equal(restored["rows"], expected[3:9])
        assert torch.equal(restored["column"], expected[:, 7])
        assert torch.equal(restored["host"], host)
    arena.close()
