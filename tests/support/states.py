"""State dicts of every kind that a checkpoint must carry, with content that follows from the name alone.

``build(mesh)`` makes the same global state on any number of ranks, so a state that was loaded on three ranks
is compared with one that was built there, byte for byte, without asking the ranks that saved.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

State = dict[str, Any]

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
)
BIG_ROWS = 22
"""The big tensor's size in MiB: on two ranks, two or more parts each at the 5 MiB that S3 asks for."""
UNSET = "not loaded"
"""What a blank state holds where a plain value belongs."""


def world_mesh() -> DeviceMesh | None:
    """Return a one-dimensional mesh over every rank, or None without a process group."""
    if not dist.is_initialized():
        return None
    return init_device_mesh("cpu", (dist.get_world_size(),))


def build(mesh: DeviceMesh | None, *, big: bool = True) -> State:
    """Return a state of everything; without ``mesh``, what is sharded elsewhere is a whole tensor.

    Args:
        mesh: where the distributed tensors live.
        big: include a tensor of ``BIG_ROWS`` MiB, which takes several parts.
    """
    state: State = {
        "dtypes": {str(dtype).removeprefix("torch."): content(str(dtype), (5, 3), dtype) for dtype in DTYPES},
        "layouts": _layouts(),
        "shared": _shared_storage(),
        "nested": _nested(),
        "plain": _plain_values(),
        "sharded": _sharded(mesh),
        "training": training_state(mesh),
    }
    if big:
        state["big"] = distributed("big", (BIG_ROWS, 1 << 18), torch.float32, mesh, Shard(0))
    return state


def blank(mesh: DeviceMesh | None, *, big: bool = True) -> State:
    """Return the state's structure with zeros and ``UNSET`` for its content, to load into."""
    state: State = erase(build(mesh, big=big))
    return state


def content(name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return random bits, NaNs and all, that ``name``, ``shape`` and ``dtype`` alone decide."""
    return _content(name, tuple(shape), dtype).clone()


@functools.cache
def _content(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    key = hashlib.sha256(repr((name, shape, dtype)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, dtype=torch.uint8, generator=generator).bool()
    count = dtype.itemsize * torch.Size(shape).numel()
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def distributed(
    name: str, shape: Sequence[int], dtype: torch.dtype, mesh: DeviceMesh | None, placement: Placement
) -> Tensor:
    """Return ``content`` as a DTensor, cut locally: not every type travels over gloo."""
    whole = content(name, shape, dtype)
    if mesh is None:
        return whole
    local = _local_part(whole, mesh, [placement])
    return DTensor.from_local(
        local.clone(), mesh, [placement], run_check=False, shape=whole.shape, stride=whole.stride()
    )


def _local_part(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    sizes, offsets = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
    part = whole
    for dim, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
        part = part.narrow(dim, min(offset, part.shape[dim]), size)
    return part


def _layouts() -> State:
    matrix = content("layout base", (12, 10), torch.float32)
    wide = content("wide", (4096,), torch.float32)
    waves = content("waves", (6, 4), torch.complex64)
    return {
        "zero_dimensional": content("zero_dimensional", (), torch.float32),
        "one_element_of_many": wide[77],
        "empty": content("empty", (0,), torch.float32),
        "empty_matrix": content("empty_matrix", (0, 3), torch.bfloat16),
        "empty_slice": matrix[3:3],
        "transposed": content("transposed", (5, 7), torch.float32).t(),
        "transposed_bfloat16": content("transposed", (5, 7), torch.bfloat16).t(),
        "permuted": content("permuted", (2, 3, 4), torch.int64).permute(2, 0, 1),
        "channels_last": content("channels_last", (2, 3, 4, 5), torch.float32).to(
            memory_format=torch.channels_last
        ),
        "rows": matrix[2:6],
        "columns": matrix[:, 1:3],
        "every_other_column": matrix[:, ::2],
        "every_third_row": matrix[::3],
        "stepped_float8": content("stepped", (6, 8), torch.float8_e4m3fn)[::2, 1::3],
        "conjugated": waves.conj(),
        "negated": waves.conj().imag,
        "parameter": nn.Parameter(content("parameter", (3, 2), torch.float32)),
    }


def _shared_storage() -> State:
    base = content("shared base", (8, 6), torch.float32)
    tied = content("tied", (9,), torch.bfloat16)
    return {
        "base": base,
        "middle": base[2:5],
        "column": base[:, 3],
        "flat": base.view(-1),
        "as_bytes": base.view(torch.uint8),
        "tied": tied,
        "tied_again": tied,
    }


def _nested() -> State:
    return {
        "list": [content("list 0", (2,), torch.float32), {"inner": content("list 1", (3,), torch.int8)}, 7],
        "deep": {"a": {"b": {"c": content("deep", (1, 1), torch.float64), "d": "leaf"}}},
        "dots.in.keys": {"a/b": content("dots", (2, 2), torch.float32), "ü": 1},
        "tuple": (content("in a tuple", (2, 3), torch.float32), "beside a tensor"),
    }


def _plain_values() -> State:
    return {
        "int": 12_345_678_901_234_567_890,
        "negative": -3,
        "float": 0.1,
        "infinity": float("-inf"),
        "str": "naïve ✓",
        "empty_str": "",
        "bytes": bytes(range(256)),
        "none": None,
        "true": True,
        "tuple": (1, "two", (3.0, None)),
        "list": [1, 2, [3, "four"]],
        "complex": 1 + 2j,
    }


def _sharded(mesh: DeviceMesh | None) -> State:
    def make(name: str, shape: Sequence[int], dtype: torch.dtype, placement: Placement) -> Tensor:
        return distributed(name, shape, dtype, mesh, placement)

    return {
        "rows": make("rows", (6, 4), torch.float32, Shard(0)),
        "uneven_rows": make("uneven_rows", (7, 3), torch.bfloat16, Shard(0)),
        "fewer_rows_than_ranks": make("fewer_rows_than_ranks", (1, 5), torch.float32, Shard(0)),
        "columns": make("columns", (4, 9), torch.float32, Shard(1)),
        "columns_float8": make("columns_float8", (3, 11), torch.float8_e4m3fn, Shard(1)),
        "middle": make("middle", (2, 5, 3), torch.int64, Shard(1)),
        "bool_rows": make("bool_rows", (5,), torch.bool, Shard(0)),
        "complex_rows": make("complex_rows", (4, 2), torch.complex64, Shard(0)),
        "replicated": make("replicated", (3, 5), torch.float32, Replicate()),
        "replicated_float8": make("replicated_float8", (7,), torch.float8_e5m2, Replicate()),
    }


def training_state(mesh: DeviceMesh | None) -> State:
    """Return model and AdamW state of a small network, wrapped by FSDP2 where there is a mesh."""
    model = nn.Sequential(nn.Linear(17, 13), nn.LayerNorm(13), nn.Linear(13, 5, bias=False))
    if mesh is not None:
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.8, 0.95))
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state: State = {"model": model_state, "optimizer": optimizer_state}
    _fill(state, "training")
    return state


def _fill(value: Any, name: str) -> None:
    """Give every tensor of a nested state the content that its name decides."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _fill(inner, f"{name}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _fill(inner, f"{name}.{index}")
    elif isinstance(value, DTensor):
        whole = content(name, value.shape, value.dtype)
        value.to_local().detach().copy_(_local_part(whole, value.device_mesh, value.placements))
    elif isinstance(value, Tensor):
        value.detach().copy_(content(name, value.shape, value.dtype))


def erase(value: Any) -> Any:
    """Zero every tensor of a nested state in place and put ``UNSET`` for its plain values."""
    if isinstance(value, Mapping):
        return {key: erase(inner) for key, inner in value.items()}
    if isinstance(value, list) and any(isinstance(inner, Tensor | Mapping | list) for inner in value):
        # Lists without tensors or mappings are one value to DCP, and lists in lists are walked in vain.
        return [erase(inner) for inner in value] if _is_walked(value) else UNSET
    if isinstance(value, Tensor):
        local = local_tensor(value)
        local.copy_(torch.zeros(local.shape, dtype=local.dtype))
        return value
    return UNSET


def _is_walked(value: list[Any]) -> bool:
    """Say whether DCP flattens this list into items of its own."""
    return any(
        isinstance(inner, Tensor | Mapping) or (isinstance(inner, list) and _is_walked(inner))
        for inner in value
    )


def local_tensor(value: Tensor) -> Tensor:
    """Return the tensor, or the part of a DTensor, that this rank holds, off the autograd graph."""
    return value.to_local().detach() if isinstance(value, DTensor) else value.detach()


def raw_bytes(tensor: Tensor) -> bytes:
    """Return a tensor's elements in logical order, as bytes."""
    if local_tensor(tensor).numel() == 0:
        return b""
    plain = local_tensor(tensor).resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_bit_exact(actual: Any, expected: Any) -> None:
    """Assert that two nested states are equal in structure, types, shapes and every bit."""
    differences = compare(actual, expected)
    assert not differences, "\n".join(differences)


def compare(actual: Any, expected: Any) -> list[str]:
    """Return a line for every leaf at which two nested states differ."""
    return _differences(actual, expected, "state")


def _differences(actual: Any, expected: Any, path: str) -> list[str]:
    if isinstance(expected, Tensor):
        return _tensor_differences(actual, expected, path)
    if isinstance(expected, Mapping):
        if not isinstance(actual, Mapping) or list(actual) != list(expected):
            return [f"{path}: {actual!r} instead of the keys {list(expected)}"]
        pairs = [(f"{path}.{key}", actual[key], expected[key]) for key in expected]
    elif isinstance(expected, list | tuple):
        if type(actual) is not type(expected) or len(actual) != len(expected):
            return [f"{path}: {actual!r} instead of {expected!r}"]
        pairs = [(f"{path}.{index}", actual[index], expected[index]) for index in range(len(expected))]
    else:
        same = type(actual) is type(expected) and actual == expected
        return [] if same else [f"{path}: {actual!r} instead of {expected!r}"]
    return [found for name, left, right in pairs for found in _differences(left, right, name)]


def _tensor_differences(actual: Any, expected: Tensor, path: str) -> list[str]:
    if type(actual) is not type(expected):
        return [f"{path}: a {type(actual).__name__} instead of a {type(expected).__name__}"]
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        found = f"{actual.dtype} {tuple(actual.shape)}"
        return [f"{path}: {found} instead of {expected.dtype} {tuple(expected.shape)}"]
    if raw_bytes(actual) != raw_bytes(expected):
        return [f"{path}: other bytes ({expected.dtype} {tuple(expected.shape)})"]
    return []
