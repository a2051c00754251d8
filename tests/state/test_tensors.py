"""Tensors of every kind are restored as they were, or refused by name before anything is saved."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

import cloudckpt
from cloudckpt.backends.state import sparse, tensors
from cloudckpt.backends.state.tensors import refusal
from cloudckpt.executor import ProcessExecutor
from support import states
from support.snapshots import round_trip

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state:UserWarning"),
    pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning"),  # torch 2.14
]

MATRIX = torch.tensor([[0.0, 1, 0, 0], [2, 0, 3, 0], [0, 0, 0, 0], [0, 0, 0, 4]])
ZEROS = torch.zeros(4, 4)

COMPRESSED: dict[str, Callable[[Tensor], Tensor]] = {
    "csr": Tensor.to_sparse_csr,
    "csc": Tensor.to_sparse_csc,
    "bsr": lambda dense: dense.to_sparse_bsr((2, 2)),
    "bsc": lambda dense: dense.to_sparse_bsc((2, 2)),
}


def saved(tensor: Tensor, folder: Path) -> None:
    dcp.save({"x": tensor}, storage_writer=cloudckpt.StorageWriter(folder / "c"))


def loaded(into: Tensor, folder: Path) -> Tensor:
    state = {"x": into}
    dcp.load(state, storage_reader=cloudckpt.StorageReader(folder / "c"))
    assert state["x"] is into
    return state["x"]


def failure(raised: pytest.ExceptionInfo[CheckpointException]) -> BaseException:
    return raised.value.failures[0][0]


@pytest.mark.parametrize("kind", COMPRESSED)
@pytest.mark.parametrize("before", [ZEROS, torch.ones(4, 4), MATRIX], ids=["none", "all", "same"])
def test_a_compressed_sparse_tensor_is_restored_whatever_the_state_has(
    tmp_path: Path, kind: str, before: Tensor
) -> None:
    tensor = COMPRESSED[kind](MATRIX)
    if TorchVersion(torch.__version__) >= "2.15":  # DCP asks it for strides
        assert "can't plan" in str(refusal(tensor))
        return
    assert refusal(tensor) is None
    saved(tensor, tmp_path)
    again = loaded(COMPRESSED[kind](before), tmp_path)
    assert again.layout is tensor.layout
    assert torch.equal(again.values(), tensor.values())
    assert torch.equal(again.to_dense(), MATRIX)


@pytest.mark.parametrize(
    "tensor",
    [
        MATRIX.to_sparse(),
        torch.sparse_coo_tensor(
            torch.tensor([[0, 0], [1, 1]]), torch.tensor([1.0, 2.0]), (4, 4), check_invariants=True
        ),
        torch.sparse_coo_tensor(torch.tensor([[0, 3]]), torch.ones(2, 4), (4, 4), check_invariants=True),
        torch.zeros(4, 4).to_sparse(),
    ],
    ids=["coalesced", "uncoalesced", "hybrid", "empty"],
)
@pytest.mark.parametrize("before", [ZEROS, torch.ones(4, 4)], ids=["none", "all"])
def test_a_sparse_tensor_is_restored_with_its_entries(tmp_path: Path, tensor: Tensor, before: Tensor) -> None:
    assert refusal(tensor) is None
    saved(tensor, tmp_path)
    again = loaded(before.to_sparse(), tmp_path)
    assert again.is_coalesced() is tensor.is_coalesced()
    assert torch.equal(again._indices(), tensor._indices())
    assert torch.equal(again._values(), tensor._values())


@pytest.mark.filterwarnings("ignore:torch.quantize_per:UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_quantized_tensors_are_restored_with_their_scales(tmp_path: Path) -> None:
    def by_row(values: Tensor, scale: float, zero: int) -> Tensor:
        scales, zeros = torch.tensor([scale, 2 * scale]), torch.tensor([zero, 0])
        return torch.quantize_per_channel(values, scales, zeros, 0, torch.qint8)

    one = torch.quantize_per_tensor(torch.linspace(-1, 1, 8), 0.05, 7, torch.qint8)
    rows = by_row(torch.linspace(-1, 1, 8).view(2, 4), 0.1, 3)
    state = {"one": one, "rows": rows}
    assert refusal(one) is refusal(rows) is None
    dcp.save(state, storage_writer=cloudckpt.StorageWriter(tmp_path / "c"))
    again = {
        "one": torch.quantize_per_tensor(torch.zeros(8), 0.5, 0, torch.qint8),
        "rows": by_row(torch.zeros(2, 4), 1.0, 0),
    }
    dcp.load(again, storage_reader=cloudckpt.StorageReader(tmp_path / "c"))
    assert (again["one"].q_scale(), again["one"].q_zero_point()) == (0.05, 7)
    assert torch.equal(again["one"].int_repr(), one.int_repr())
    assert torch.equal(again["rows"].dequantize(), rows.dequantize())
    assert torch.equal(again["rows"].q_per_channel_scales(), rows.q_per_channel_scales())


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda base: base[:, :1].expand(4, 6),
    "expanded in front": lambda base: base[:1].expand(3, 2, 4, 4),
    "overlapping": lambda base: base.as_strided((3, 4), (1, 1)),
    "transposed": Tensor.t,
    "scattered": lambda base: base[::2, 1::2],
    "conjugated": lambda base: base.to(torch.complex64).conj(),
    "negated": lambda base: base.to(torch.complex64).conj().imag,
    "scalar": lambda base: base[1, 1],
    "empty": lambda base: base[:0],
    "zero": lambda base: torch._efficientzerotensor(base.shape),
}


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_is_restored_into_such_a_view(tmp_path: Path, view: str) -> None:
    tensor = VIEWS[view](states.content(view, (4, 4), torch.float32))
    assert refusal(tensor) is None
    saved(tensor, tmp_path)
    again = loaded(VIEWS[view](torch.zeros(4, 4)), tmp_path)
    assert states.raw_bytes(again) == states.raw_bytes(tensor)


def test_elements_that_share_memory_do_not_take_different_values(tmp_path: Path) -> None:
    saved(torch.arange(3.0), tmp_path)
    with pytest.raises(CheckpointException) as raised:
        loaded(torch.zeros(1).expand(3), tmp_path)
    assert isinstance(failure(raised), cloudckpt.ConfigurationError)
    assert "share memory" in str(failure(raised))


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LazyLinear(3)


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.ones(3)


def mapped() -> Tensor:
    kept: list[Tensor] = []

    def keep(row: Tensor) -> Tensor:
        kept.append(row)
        return row

    torch.vmap(keep)(torch.ones(2, 3))
    return kept[0]


def noted() -> Tensor:
    tensor = torch.ones(3)
    tensor.unit = "m"  # type: ignore[attr-defined]
    return tensor


REFUSED: dict[str, tuple[Callable[[], Tensor], str]] = {
    "meta": (lambda: torch.ones(3, device="meta"), "meta device"),
    "fake": (fake, "traced"),
    "functional": (lambda: torch._to_functional_tensor(torch.ones(3)), "traced"),
    "vmap": (mapped, "torch.func"),
    "lazy": (lambda: Lazy().inner.weight, "not initialized"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "nested",
    ),
    "mkldnn": (lambda: torch.ones(3).to_mkldnn(), "layout"),
    "four bits": (lambda: torch.empty(3, dtype=torch.uint4), "uint4"),  # type: ignore[attr-defined]
    "noted": (noted, "unit"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_a_tensor_that_could_not_be_restored_is_refused(kind: str) -> None:
    make, reason = REFUSED[kind]
    refused = refusal(make())
    assert refused is not None
    assert reason in refused.reason
    assert refused.hint
    assert refused.class_name


@pytest.mark.parametrize("kind", ["fake", "functional", "meta"])
def test_the_writer_refuses_a_tensor_without_data_by_its_key(tmp_path: Path, kind: str) -> None:
    with pytest.raises(CheckpointException, match="'x'") as raised:
        saved(REFUSED[kind][0](), tmp_path)
    assert isinstance(failure(raised), cloudckpt.ConfigurationError)
    assert not list(tmp_path.iterdir())


def test_what_frameworks_note_on_parameters_and_buffers_is_not_refused() -> None:
    parameter = nn.Parameter(torch.ones(3))
    parameter.sequence_parallel = True  # type: ignore[attr-defined]
    compiled = torch.ones(3)
    torch._dynamo.mark_static_address(compiled)
    assert compiled.__dict__
    for tensor in (parameter, nn.Buffer(torch.ones(3)), compiled):
        assert refusal(tensor) is None


def test_the_result_of_a_collective_is_saved_as_the_tensor_that_it_waits_for(tmp_path: Path) -> None:
    inner = states.content("reduced", (4, 2), torch.float32)
    tensor = AsyncCollectiveTensor(inner)
    assert refusal(tensor) is None
    saved(tensor, tmp_path)
    assert torch.equal(loaded(torch.zeros(4, 2), tmp_path), inner)


@pytest.mark.parametrize("dtype", states.DTYPES, ids=str)
def test_no_dtype_of_the_tests_is_refused(dtype: torch.dtype) -> None:
    assert refusal(torch.empty(3, dtype=dtype)) is None


LISTED: list[Tensor] = sparse.listed()


def listed() -> int:
    return len(LISTED)


def test_a_hundred_loads_leave_torchs_list_of_sparse_tensors_empty(tmp_path: Path) -> None:
    saved(MATRIX.to_sparse(), tmp_path)
    LISTED.clear()
    for _ in range(100):
        loaded(ZEROS.to_sparse(), tmp_path)
        assert listed() == 0


def test_a_failed_load_leaves_torchs_list_of_sparse_tensors_empty(tmp_path: Path) -> None:
    class Unregistered(Tensor):
        """After the sparse tensor, in the same archive."""

    holder = torch.ones(2).as_subclass(Unregistered)
    holder.entries = MATRIX.to_sparse()  # type: ignore[attr-defined]
    globals()["Unregistered"] = Unregistered
    Unregistered.__qualname__ = "Unregistered"
    saved(holder, tmp_path)
    LISTED.clear()
    with pytest.raises(CheckpointException) as raised:
        loaded(torch.zeros(2), tmp_path)
    assert isinstance(failure(raised), cloudckpt.UnsafeCheckpointError)
    assert listed() == 0


def test_a_snapshot_leaves_torchs_list_of_sparse_tensors_empty() -> None:
    LISTED.clear()
    with round_trip({"x": MATRIX.to_sparse(), "y": MATRIX.to_sparse_csr()}) as (_, restored):
        assert torch.equal(restored["x"].to_dense(), MATRIX)
        assert listed() == 0


def test_the_executor_refuses_what_it_can_not_save_by_its_path() -> None:
    state = {"model": {"weight": Lazy().inner.weight}}
    with ProcessExecutor() as executor:
        handle = executor.execute_save(state, storage_writer=cloudckpt.StorageWriter("memory://x"))
        with pytest.raises(cloudckpt.ConfigurationError, match=r"'model\.weight' is not initialized"):
            handle.result()


def test_refusing_is_cheap_where_nothing_is_refused() -> None:
    """No operator runs for a plain tensor: it is asked while training is blocked."""
    tensor = torch.ones(3)
    with contextlib.ExitStack() as stack:
        mode = stack.enter_context(_Counting())
        assert tensors.refusal(tensor) is None
        assert mode.calls == 0


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))
