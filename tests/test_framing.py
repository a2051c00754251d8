"""Items made without copying are the items that stock torch writes and reads."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.backends.format.tensor_archive import encode_bytes, encode_tensor
from cloudckpt.backends.transfer.segments import Gathered, Segment, View, part_size_of, windows

BASE = torch.arange(7 * 12 * 5, dtype=torch.float32).reshape(7, 12, 5)
TENSORS = {
    "float32": BASE,
    "bfloat16": BASE.bfloat16(),
    "float8": BASE.to(torch.float8_e4m3fn),
    "int8": BASE.to(torch.int8),
    "int64": BASE.long(),
    "bool": BASE % 3 == 0,
    "complex64": torch.complex(BASE, -BASE),
    "conjugate": torch.complex(BASE, -BASE).conj(),
    "negated imaginary": torch.complex(BASE, BASE).conj().imag,
    "0-d": torch.tensor(3.5),
    "empty": torch.empty(0, 3),
    "empty transposed": torch.empty(3, 0).t(),
    "square transposed": BASE[0, :5].t(),
    "transposed": BASE.permute(2, 0, 1),
    "channels last": torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "row slice of a larger storage": BASE[2:5],
    "every second column": BASE[:, ::2],
    "inner slice": BASE[1:6, 3:9, 1:4],
    "scattered and transposed": BASE[:, ::3].permute(1, 2, 0),
    "expanded": torch.arange(4.0).expand(3, 4),
    "requires grad": BASE.clone().requires_grad_(),
    "parameter": torch.nn.Parameter(BASE.clone()),
    "sparse": torch.eye(4).to_sparse(),
}


def item_bytes(tensor: torch.Tensor, part_size: int) -> bytes:
    return b"".join(
        bytes(buffer)
        for window in windows(encode_tensor(tensor).segments, part_size)
        for buffer in window.buffers(memoryview(bytearray(window.gathered)))
    )


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("part_size", [97, 1 << 20])
def test_torch_load_reads_an_item_back_bit_for_bit(name: str, part_size: int) -> None:
    tensor = TENSORS[name].detach()
    loaded = torch.load(io.BytesIO(item_bytes(tensor, part_size)), weights_only=True)
    assert loaded.dtype == tensor.dtype
    assert loaded.shape == tensor.shape
    if tensor.layout is not torch.strided:
        loaded, tensor = loaded.to_dense(), tensor.to_dense()
    plain = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    assert torch.equal(loaded.contiguous().reshape(-1).view(torch.uint8), plain)


@pytest.mark.parametrize("name", TENSORS)
def test_an_item_is_as_long_as_torch_save_makes_it(name: str) -> None:
    tensor = TENSORS[name].detach()
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    stock = io.BytesIO()
    exact = tensor.layout is not torch.strided or tensor.untyped_storage().nbytes() == tensor.nbytes
    torch.save(tensor if exact else tensor.clone(), stock)
    assert len(item_bytes(TENSORS[name], 1 << 20)) == len(stock.getvalue())


def test_a_dense_tensor_is_sent_from_its_own_memory() -> None:
    for tensor in (BASE, BASE.permute(2, 0, 1), BASE[2:5]):
        payload = encode_tensor(tensor).segments[1]
        assert isinstance(payload, View)
        tensor.mul_(1)  # the view is of live memory: a change in the tensor shows in it
        before = bytes(payload.data)
        tensor.add_(1)
        assert bytes(payload.data) != before


def test_a_tensor_on_a_device_is_gathered_window_by_window() -> None:
    """No device is at hand: a meta tensor takes the same way up to the copy itself."""
    tensor = torch.empty(1 << 20, device="meta").reshape(1 << 10, 1 << 10).t()
    item = encode_tensor(tensor)
    assert isinstance(item.segments[1], Gathered)
    assert item.payload is not None
    assert item.payload.stride == (1, 1 << 10)
    (first, *_) = windows(item.segments, 1 << 16)
    assert first.cost < 1 << 17


def test_a_value_serialised_by_the_planner_is_taken_as_it_is() -> None:
    segments = encode_bytes(io.BytesIO(b"abc")).segments
    assert b"".join(bytes(one.window(0, one.nbytes, memoryview(b""))) for one in segments) == b"abc"


@given(
    lengths=st.lists(st.integers(0, 50), max_size=20),
    size=st.integers(1, 60),
    spare=st.integers(0, 20),
)
def test_windows_cover_every_byte_once_in_order(lengths: list[int], size: int, spare: int) -> None:
    whole = bytes(i % 251 for i in range(sum(lengths)))
    segments, at = [], 0
    for length in lengths:
        segments.append(View(memoryview(whole[at : at + length])))
        at += length
    cut = list(windows(segments, size, spare))
    assert b"".join(bytes(b) for w in cut for b in w.buffers(memoryview(b""))) == whole
    assert [w.offset for w in cut] == [size * index for index in range(len(cut))]
    assert all(w.nbytes == size for w in cut[:-1])
    # The last one is longer only where the rest would be a window of its own otherwise.
    assert len(cut) == max(bool(whole), -(-(len(whole) - spare) // size))


@given(
    start=st.integers(0, 1200),
    length=st.integers(1, 700),
    step=st.integers(1, 4),
)
def test_a_window_on_a_scattered_tensor_gathers_exactly_its_bytes(start: int, length: int, step: int) -> None:
    tensor = BASE[:, ::step].permute(1, 2, 0)
    whole = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    start = min(start, len(whole) - 1)
    stop = min(start + length, len(whole))
    gathered = Gathered(tensor)
    scratch = memoryview(bytearray(gathered.gathered(start, stop)))
    assert bytes(gathered.window(start, stop, scratch)) == whole[start:stop]


def _value(nbytes: int) -> View:
    return View(memoryview(bytes(nbytes)), borrowed=False)


@pytest.mark.parametrize(
    ("first", "size"),
    [
        ([View(memoryview(bytes(500)))], 400),  # the caller's own memory
        ([_value(10), View(memoryview(bytes(500))), _value(2)], 400),  # with framing
        ([_value(13), View(memoryview(bytes(500)))], 100),  # values that are held
        ([Gathered(torch.empty(500, dtype=torch.uint8))], 100),
        ([View(memoryview(bytes(200))), Gathered(torch.empty(500, dtype=torch.uint8))], 100),
        ([View(memoryview(bytes(400))), Gathered(torch.empty(500, dtype=torch.uint8))], 400),  # seen too late
        ([], 400),
    ],
)
def test_parts_are_longer_only_where_they_need_no_memory(first: list[Segment], size: int) -> None:
    segments, chosen = part_size_of(iter(first), 100, 400)
    assert chosen == size
    assert list(segments) == first


def test_no_more_is_taken_than_tells_the_size_of_parts() -> None:
    def made() -> Iterator[Segment]:
        yield _value(50)
        pytest.fail("a value was made before the one ahead of it was sent")

    _, chosen = part_size_of(made(), 100, 400)
    assert chosen == 100
