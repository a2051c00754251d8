"""Any state, cut in any way over any ranks, comes back as it was, whatever the options."""

from __future__ import annotations

import itertools
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

import cloudckpt
from support import simulated, states
from support.simulated import Box, Chunked

pytestmark = pytest.mark.timeout(0)  # the number of examples is the bound, and the soak has many

# Explaining a failure costs more than finding it.
PHASES = [Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink]
EITHER = settings(deadline=None, phases=PHASES, suppress_health_check=[HealthCheck.too_slow])
SHORT = settings(EITHER, max_examples=25)
SOAK = settings(EITHER, max_examples=3000)


# --- what is drawn


@dataclass(frozen=True, slots=True)
class Cut:
    """How a tensor is laid over ranks: where each dimension is cut, whose each box is, and its strides."""

    cuts: tuple[tuple[int, ...], ...]
    owners: tuple[int, ...]
    layout: str

    def boxes(self, whole: Tensor, rank: int, ranks: int) -> list[Box]:
        """Return this rank's boxes, filled from ``whole``."""
        edges = [
            [0, *sorted({cut % size for cut in cuts} - {0}), size] if size else [0, 0]
            for cuts, size in zip(self.cuts, whole.shape, strict=True)
        ]
        boxes = []
        for number, box in enumerate(itertools.product(*map(itertools.pairwise, edges))):
            if self.owners[number % len(self.owners)] % ranks == rank:
                part = whole[tuple(slice(start, stop) for start, stop in box)]
                boxes.append(Box(tuple(start for start, _ in box), laid_out(part, self.layout)))
        return boxes


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor: whole on every rank, or in boxes that are saved one way and loaded another."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    saved: Cut
    loaded: Cut
    whole: bool

    @property
    def content(self) -> Tensor:
        """The global tensor."""
        return states.content(self.name, self.shape, self.dtype)


LAYOUTS = ("row-major", "transposed", "stepped", "offset")


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """Return a copy with the same elements at other places in memory."""
    if layout == "transposed":
        order = tuple(reversed(range(tensor.dim())))
        return tensor.permute(order).clone(memory_format=torch.contiguous_format).permute(order)
    if layout == "stepped" and tensor.dim():
        wide = torch.zeros((*tensor.shape[:-1], 2 * tensor.shape[-1]), dtype=tensor.dtype)[..., ::2]
        wide.copy_(tensor)
        return wide
    if layout == "offset":
        larger = torch.zeros(tensor.numel() + 3, dtype=tensor.dtype)[3:].view(tensor.shape)
        larger.copy_(tensor)
        return larger
    return tensor.clone(memory_format=torch.contiguous_format)


def cuts(dimensions: int) -> st.SearchStrategy[Cut]:
    cut = st.lists(st.integers(0, 40), max_size=2).map(tuple)
    return st.builds(
        Cut,
        cuts=st.tuples(*[cut] * dimensions),
        owners=st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple),
        layout=st.sampled_from(LAYOUTS),
    )


@st.composite
def leaves(draw: st.DrawFn) -> Leaf:
    shape = tuple(draw(st.lists(st.integers(0, 40), max_size=3)))
    return Leaf(
        name=draw(st.text("abc", max_size=3)),
        dtype=draw(st.sampled_from(states.DTYPES)),
        shape=shape,
        saved=draw(cuts(len(shape))),
        loaded=draw(cuts(len(shape))),
        whole=draw(st.booleans()),
    )


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=4,
)
keys = st.text("abcdé/ -", min_size=1, max_size=4)
nested = st.recursive(
    leaves() | plain_values,
    # DCP keeps no trace of an empty dict, and of an empty list as a value only.
    lambda inner: (
        st.dictionaries(keys, inner, min_size=1, max_size=4) | st.lists(inner, min_size=1, max_size=3)
    ),
    max_leaves=12,
)
specs = st.dictionaries(keys, nested, min_size=1, max_size=4)
world_sizes = st.integers(1, 3)
options = st.fixed_dictionaries(
    {
        "part_size": st.sampled_from([1000, 4096, 65_537, 1 << 20]),
        "concurrency": st.integers(1, 6),
        "memory_limit": st.sampled_from([1 << 20, 64 << 20]),
    }
)

# --- what is made of it


def realised(spec: Any, rank: int, ranks: int, side: Callable[[Leaf], Cut]) -> Any:
    """Return a rank's state for what was drawn; ``side`` says whether as saved or as loaded."""
    if isinstance(spec, dict):
        return {key: realised(value, rank, ranks, side) for key, value in spec.items()}
    if isinstance(spec, list):
        return [realised(value, rank, ranks, side) for value in spec]
    if isinstance(spec, Leaf):
        cut = side(spec)
        if spec.whole:
            return laid_out(spec.content, cut.layout)
        return Chunked(spec.shape, spec.dtype, cut.boxes(spec.content, rank, ranks))
    return spec


def unboxed(state: Any) -> Any:
    """Return a state with the boxes of its chunked tensors in their place, to erase or to compare."""
    if isinstance(state, dict):
        return {key: unboxed(value) for key, value in state.items()}
    if isinstance(state, list):
        return [unboxed(value) for value in state]
    if isinstance(state, Chunked):
        return tuple(box.tensor for box in state.boxes)
    return state


def blanked(state: Any) -> Any:
    """Return the state with zeros for its tensors and nothing for its values."""
    if isinstance(state, dict):
        return {key: blanked(value) for key, value in state.items()}
    if isinstance(state, list):
        return [blanked(value) for value in state]
    if isinstance(state, Chunked):
        states.erase([box.tensor for box in state.boxes])
        return state
    return states.erase(state)


def roundtrip(
    spec: Any,
    worlds: tuple[int, int],
    make_writer: Callable[[], Any],
    make_reader: Callable[[], Any],
) -> None:
    saving, loading = worlds
    simulated.save(
        [realised(spec, rank, saving, lambda leaf: leaf.saved) for rank in range(saving)], make_writer
    )
    loaded = [blanked(realised(spec, rank, loading, lambda leaf: leaf.loaded)) for rank in range(loading)]
    simulated.load(loaded, make_reader)
    for rank, state in enumerate(loaded):
        expected = realised(spec, rank, loading, lambda leaf: leaf.loaded)
        states.assert_bit_exact(unboxed(state), unboxed(expected))


def ours_to_ours(spec: Any, worlds: tuple[int, int], given_options: dict[str, Any]) -> None:
    uri = f"memory://{uuid.uuid4().hex}"
    roundtrip(
        spec,
        worlds,
        lambda: cloudckpt.StorageWriter(uri, **given_options),
        lambda: cloudckpt.StorageReader(uri, **given_options),
    )


def ours_to_stock(spec: Any, worlds: tuple[int, int], given_options: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        roundtrip(
            spec,
            worlds,
            lambda: cloudckpt.StorageWriter(folder, **given_options),
            lambda: FileSystemReader(folder),
        )


def stock_to_ours(spec: Any, worlds: tuple[int, int], given_options: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        roundtrip(
            spec,
            worlds,
            lambda: FileSystemWriter(folder, sync_files=False),
            lambda: cloudckpt.StorageReader(folder, **given_options),
        )


ROUTES = [ours_to_ours, ours_to_stock, stock_to_ours]


@pytest.mark.parametrize("route", ROUTES)
@SHORT
@given(spec=specs, worlds=st.tuples(world_sizes, world_sizes), given_options=options)
def test_any_state_comes_back(
    route: Callable[..., None], spec: Any, worlds: tuple[int, int], given_options: dict[str, Any]
) -> None:
    route(spec, worlds, given_options)


@pytest.mark.soak
@pytest.mark.parametrize("route", ROUTES)
@SOAK
@given(spec=specs, worlds=st.tuples(world_sizes, world_sizes), given_options=options)
def test_any_of_thousands_of_states_comes_back(
    route: Callable[..., None], spec: Any, worlds: tuple[int, int], given_options: dict[str, Any]
) -> None:
    route(spec, worlds, given_options)
