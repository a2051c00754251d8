"""Saving from a CUDA device and loading to one: bit for bit, in order with the caller's work, pages locked.

Without a device these are skipped; the order of calls is tested without one beside the arena's tests.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem

import cloudckpt
from cloudckpt.backends.transfer import cuda
from cloudckpt.backends.transfer.buffer_pool import BufferPool
from cloudckpt.executor import ProcessExecutor
from support import states

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MIB = 1 << 20


def on_device() -> dict[str, Any]:
    """Tensors of all kinds on the device, beside some on the host."""
    square = states.content("square", (1024, 1024), torch.float32).cuda()
    return {
        "whole": states.content("whole", (3000, 1000), torch.float32).cuda(),
        "half": states.content("half", (1000, 333), torch.bfloat16).cuda(),
        "bytes": states.content("bytes", (4097,), torch.uint8).cuda(),
        "complex": states.content("complex", (300, 7), torch.complex128).cuda(),
        "transposed": square.t(),
        "columns": square[:, 100:200],
        "every third": square.view(-1)[::3],
        "conjugate": states.content("conjugate", (100, 100), torch.complex64).cuda().conj(),
        "scalar": torch.tensor(3.5, device="cuda"),
        "empty": torch.empty(0, 5, device="cuda"),
        "host": states.content("host", (500, 500), torch.float32),
        "step": 17,
    }


def blank(state: dict[str, Any]) -> dict[str, Any]:
    """Somewhere to load it: the same shapes and devices, other content."""
    return {
        name: torch.zeros_like(value) if isinstance(value, torch.Tensor) else 0
        for name, value in state.items()
    }


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return states.raw_bytes(on_host(left)) == states.raw_bytes(on_host(right))


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """It is conjugated there: a device makes any NaN of a NaN, and brings the conjugate of one with it."""
    return tensor.conj().cpu().conj() if tensor.is_conj() else tensor.cpu()


def assert_same(loaded: dict[str, Any], saved: dict[str, Any]) -> None:
    for name, value in saved.items():
        if isinstance(value, torch.Tensor):
            assert loaded[name].device == value.device
            assert same_bits(loaded[name], value), name
        else:
            assert loaded[name] == value


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each stretch of pages that is locked."""
    sizes: list[int] = []
    lock_pages = cuda.lock_pages

    def lock(address: int, nbytes: int) -> bool:
        sizes.append(nbytes)
        return lock_pages(address, nbytes)

    monkeypatch.setattr("cloudckpt.backends.transfer.buffer_pool.lock_pages", lock)
    return sizes


@pytest.mark.parametrize("memory_limit", ["8MiB", "1GiB"])
def test_what_is_on_a_device_is_saved_and_loaded_there(
    tmp_path: Path, locked: list[int], memory_limit: str
) -> None:
    state = on_device()
    uri = (tmp_path / "checkpoint").as_uri()
    dcp.save(state, storage_writer=cloudckpt.StorageWriter(uri, memory_limit=memory_limit), no_dist=True)
    assert locked, "windows of the device's tensors come to locked pages"
    locked.clear()
    loaded = blank(state)
    dcp.load(loaded, storage_reader=cloudckpt.StorageReader(uri, memory_limit=memory_limit), no_dist=True)
    assert locked, "and so does what is read for them"
    assert_same(loaded, state)


@pytest.mark.parametrize("destination", ["cuda", "cpu"])
def test_a_device_reads_what_stock_saved_from_one_and_the_other_way_round(
    tmp_path: Path, destination: str
) -> None:
    state = {name: value for name, value in on_device().items() if name not in {"conjugate", "empty"}}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "stock"), no_dist=True)
    dcp.save(state, storage_writer=cloudckpt.StorageWriter((tmp_path / "ours").as_uri()), no_dist=True)
    for reader in (
        cloudckpt.StorageReader((tmp_path / "stock").as_uri()),
        dcp.FileSystemReader(tmp_path / "ours"),
    ):
        loaded: dict[str, Any] = {
            name: torch.zeros_like(value, device=destination) if isinstance(value, torch.Tensor) else 0
            for name, value in state.items()
        }
        dcp.load(loaded, storage_reader=reader, no_dist=True)
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                assert same_bits(loaded[name], value), name


def test_a_destination_of_another_type_is_converted(tmp_path: Path) -> None:
    saved = torch.randn(777, 333, device="cuda")
    uri = (tmp_path / "checkpoint").as_uri()
    dcp.save({"t": saved}, storage_writer=cloudckpt.StorageWriter(uri), no_dist=True)
    loaded = {"t": torch.zeros(777, 333, dtype=torch.bfloat16, device="cuda")}
    dcp.load(loaded, storage_reader=cloudckpt.StorageReader(uri), no_dist=True)
    assert torch.equal(loaded["t"], saved.bfloat16())


@contextlib.contextmanager
def another_stream() -> Iterator[None]:
    """Be on a stream that waits for no other."""
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        yield


def busy() -> None:
    """Queue a good part of a second of work on the current stream."""
    square = torch.ones(8192, 8192, device="cuda")
    for _ in range(20):
        square = square @ square * 1e-4


def test_a_save_has_what_the_callers_stream_was_about_to_write(tmp_path: Path) -> None:
    tensor = torch.zeros(4 * MIB, device="cuda")
    uri = (tmp_path / "checkpoint").as_uri()
    with another_stream():
        busy()
        tensor.fill_(7)
        dcp.save({"t": tensor}, storage_writer=cloudckpt.StorageWriter(uri), no_dist=True)
    loaded = {"t": torch.zeros(4 * MIB)}
    dcp.load(loaded, storage_reader=cloudckpt.StorageReader(uri), no_dist=True)
    assert bool((loaded["t"] == 7).all())


def test_a_load_comes_after_what_the_callers_stream_was_about_to_write(tmp_path: Path) -> None:
    uri = (tmp_path / "checkpoint").as_uri()
    dcp.save({"t": torch.full((4 * MIB,), 7.0)}, storage_writer=cloudckpt.StorageWriter(uri), no_dist=True)
    loaded = {"t": torch.zeros(4 * MIB, device="cuda")}
    with another_stream():
        busy()
        loaded["t"].fill_(3)
        dcp.load(loaded, storage_reader=cloudckpt.StorageReader(uri), no_dist=True)
        assert bool((loaded["t"] == 7).all())


class Committing(DefaultLoadPlanner):
    """Looks at every tensor when it is told that it is complete."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        with another_stream():
            self.seen.append(bool((tensor == 7).all()))


def test_a_planner_is_told_of_a_tensor_when_its_bytes_are_there(tmp_path: Path) -> None:
    uri = (tmp_path / "checkpoint").as_uri()
    saved = {f"t{number}": torch.full((MIB,), 7.0) for number in range(20)}
    dcp.save(saved, storage_writer=cloudckpt.StorageWriter(uri), no_dist=True)
    loaded = {name: torch.zeros(MIB, device="cuda") for name in saved}
    planner = Committing()
    dcp.load(loaded, storage_reader=cloudckpt.StorageReader(uri), planner=planner, no_dist=True)
    assert planner.seen == [True] * 20


@contextlib.contextmanager
def pages(nbytes: int) -> Iterator[int]:
    """The address of some pages."""
    memory = mmap.mmap(-1, nbytes)
    held = ctypes.c_char.from_buffer(memory)
    try:
        yield ctypes.addressof(held)
    finally:
        del held
        memory.close()


def test_pages_that_can_not_be_locked_leave_no_error_to_the_next_who_uses_the_device() -> None:
    torch.zeros(1, device="cuda")
    with pages(MIB) as address:
        assert cuda.lock_pages(address, MIB)
        assert not cuda.lock_pages(address, MIB)  # they are
        assert torch.ones(5, device="cuda").sum().item() == 5
        cuda.unlock_pages(address)
        assert torch.ones(5, device="cuda").sum().item() == 5
        assert cuda.lock_pages(address, MIB)
        cuda.unlock_pages(address)


def test_locked_scratch_memory_is_unlocked_before_it_goes() -> None:
    torch.zeros(1, device="cuda")
    for _ in range(50):  # the system gives the same addresses again and again
        scratch = BufferPool(64 * MIB)
        with scratch.lent(16 * MIB, locked=True) as buffer:
            host = torch.frombuffer(buffer, dtype=torch.uint8)
            host.fill_(5)
            assert host.is_pinned()
            assert int(host.cuda()[-1]) == 5
            del host
        del buffer
        scratch.clear()


def test_many_threads_copy_at_a_time_and_each_waits_for_its_own() -> None:
    failures: list[int] = []
    targets = [torch.zeros(2 * MIB, device="cuda") for _ in range(8)]

    def copy(number: int) -> None:
        host = torch.empty(2 * MIB, pin_memory=True)
        for round_ in range(50):
            host.fill_(round_)
            with cuda.beside(targets[number]):
                targets[number].copy_(host, non_blocking=True)
            cuda.settle()
            host.fill_(-1)
            if not bool((targets[number] == round_).all()):
                failures.append(number)

    threads = [threading.Thread(target=copy, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_the_checkpoint_process_saves_a_state_on_the_device_while_it_changes(tmp_path: Path) -> None:
    state = on_device()
    expected = {
        name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()
    }
    expected["conjugate"] = state["conjugate"].resolve_conj().clone()
    with ProcessExecutor() as executor:
        for step in range(3):
            uri = (tmp_path / f"step-{step}").as_uri()
            future = executor.execute_save(state, storage_writer=cloudckpt.StorageWriter(uri))
            for value in state.values():
                if isinstance(value, torch.Tensor) and value.is_cuda:
                    value.zero_()
            future.result(120)
            loaded = blank(expected)
            dcp.load(loaded, storage_reader=cloudckpt.StorageReader(uri), no_dist=True)
            assert_same(loaded, expected)
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    value.copy_(expected[name])


def test_the_checkpoint_process_takes_no_memory_of_the_device(tmp_path: Path) -> None:
    state = {"t": torch.ones(MIB, device="cuda")}
    with ProcessExecutor() as executor:
        executor.execute_save(
            state, storage_writer=cloudckpt.StorageWriter((tmp_path / "one").as_uri())
        ).result(120)
        pid = executor.pid
        assert pid is not None
        maps = Path(f"/proc/{pid}/maps").read_text()
        opened = [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()]
    assert not [name for name in opened if "/dev/nvidia" in name]
    assert "/dev/nvidia" not in maps
