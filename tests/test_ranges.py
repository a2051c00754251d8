"""Boxes of stored tensors become few reads that cover what is wanted and little else."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.backends import strides
from cloudckpt.backends.transfer.byte_ranges import Extent, Piece, Request, cut, merge, whole_slices

boxes = st.lists(st.tuples(st.integers(1, 7), st.integers(0, 6), st.integers(0, 7)), max_size=4)


@given(box=boxes, most=st.integers(1, 60), gap=st.integers(0, 30), order=st.randoms(use_true_random=False))
def test_pieces_cover_the_box_once_and_touch_the_right_elements(
    box: list[tuple[int, int, int]], most: int, gap: int, order: object
) -> None:
    shape = [size for size, _, _ in box]
    dims = list(range(len(shape)))
    order.shuffle(dims)  # type: ignore[attr-defined]
    memory = torch.arange(1, 1 + max(1, torch.Size(shape).numel()))
    inverse = sorted(dims, key=dims.__getitem__)
    stored = memory[: torch.Size(shape).numel()].reshape([shape[d] for d in dims]).permute(inverse)
    for dim, (size, start, length) in enumerate(box):
        first = min(start, size)
        stored = stored.narrow(dim, first, min(length, size - first))
    out = torch.zeros(stored.shape, dtype=memory.dtype)
    for piece in cut(tuple(stored.shape), stored.stride(), int(stored.storage_offset()), most, gap):
        where = tuple(slice(at, at + n) for at, n in zip(piece.starts, piece.lengths, strict=True))
        assert not out[where].any(), "a piece covers what another did"
        raw = memory[piece.first : piece.first + piece.span]
        out[where] = raw.as_strided(piece.lengths, stored.stride(), raw.storage_offset())
        assert piece.span <= most or all(n == 1 for n in piece.lengths) or piece.span == 1
    assert torch.equal(out, stored)


def test_rows_that_lie_together_are_one_read() -> None:
    pieces = list(cut((100, 64), (64, 1), 640, 1 << 20, 16))
    assert [(p.first, p.span) for p in pieces] == [(640, 6400)]


def test_distant_rows_are_read_one_by_one_and_near_ones_together() -> None:
    assert len(list(cut((10, 8), (1000, 1), 0, 1 << 20, 16))) == 10
    assert len(list(cut((10, 8), (12, 1), 0, 1 << 20, 16))) == 1


@given(
    ranges=st.lists(
        st.tuples(
            st.integers(20, 500), st.integers(1, 40), st.booleans(), st.integers(0, 20), st.integers(0, 20)
        ),
        max_size=30,
    ),
    most=st.integers(1, 200),
    gap=st.integers(0, 20),
)
def test_every_extent_gets_exactly_its_bytes(
    ranges: list[tuple[int, int, bool, int, int]], most: int, gap: int
) -> None:
    blob = bytes(i % 253 for i in range(600))
    got: dict[int, bytes] = {}
    direct: dict[int, bytearray] = {}
    extents: list[Extent] = []
    read: dict[int, bytes] = {}
    for number, (start, size, straight, lead, trail) in enumerate(ranges):
        if straight:
            direct[number] = bytearray(size)
            extents.append(
                Extent(start, size, lambda: None, into=memoryview(direct[number]), lead=lead, trail=trail)
            )
        else:
            take = functools.partial(keep, got, number)
            extents.append(Extent(start, size, lambda: None, deliver=take, lead=lead, trail=trail))
    requests = list(merge(extents, most, gap))
    for request in requests:
        for extent, views in serve(request, blob):
            read[next(n for n, one in enumerate(extents) if one is extent)] = b"".join(views)
    got |= {number: bytes(data) for number, data in direct.items()}
    assert got == {number: blob[start : start + size] for number, (start, size, *_) in enumerate(ranges)}
    assert read == {
        number: blob[start - lead : start + size + trail]
        for number, (start, size, _, lead, trail) in enumerate(ranges)
    }
    for request in requests:
        for one, other in itertools.pairwise(request.extents):
            assert 0 <= other.begin - one.end <= gap


def keep(got: dict[int, bytes], number: int, data: memoryview) -> None:
    got[number] = bytes(data)


def serve(request: Request, blob: bytes) -> Iterator[tuple[Extent, tuple[memoryview, ...]]]:
    buffers, arrivals = request.buffers(memoryview(bytearray(request.buffered)))
    at = request.start
    for buffer in buffers:
        buffer[:] = blob[at : at + len(buffer)]
        at += len(buffer)
    for extent, arrival in zip(request.extents, arrivals, strict=True):
        assert request.start + arrival.start == extent.begin
        if extent.deliver is not None:
            extent.deliver(arrival.body)
        yield extent, arrival.views


def test_small_neighbours_share_a_request_and_a_large_gap_parts_them() -> None:
    extents = [Extent(start, 10, lambda: None, deliver=lambda _: None) for start in (0, 12, 30, 5000)]
    assert [len(request.extents) for request in merge(extents, 1 << 20, 64)] == [3, 1]


@pytest.mark.parametrize("straight", [True, False])
def test_a_request_is_longer_only_where_its_bytes_need_no_memory(straight: bool) -> None:
    into = memoryview(bytearray(64)) if straight else None
    extents = [Extent(at * 64, 64, lambda: None, into) for at in range(32)]
    sizes = [request.size for request in merge(extents, 256, longest=lambda: 1024)]
    assert sizes == ([1024] * 2 if straight else [256] * 8)


@given(kinds=st.lists(st.tuples(st.booleans(), st.integers(1, 100), st.integers(0, 9)), max_size=60))
def test_no_request_needs_more_memory_for_being_longer(kinds: list[tuple[bool, int, int]]) -> None:
    extents, at = [], 0
    for straight, size, lead in kinds:
        into = memoryview(bytearray(size)) if straight else None
        extents.append(Extent(at + lead, size, lambda: None, into=into, lead=lead))
        at += lead + size
    for request in merge(extents, 200, longest=lambda: 1000):
        assert request.size <= 1000
        assert request.buffered <= 200


@pytest.mark.parametrize("shape", [(), (0,), (3,), (3, 0), (2, 3, 4), (1, 5, 1)])
def test_row_major_strides_are_torch_s(shape: tuple[int, ...]) -> None:
    assert strides.row_major(shape) == torch.empty(shape).stride()


def test_dense_means_without_hole_or_overlap_in_any_order() -> None:
    assert strides.is_dense((3, 4), (4, 1))
    assert strides.is_dense((3, 4), (1, 3))
    assert strides.is_dense((), ())
    assert strides.is_dense((1, 4), (99, 1))
    assert strides.is_dense((0, 4), (7, 7))
    assert not strides.is_dense((3, 4), (8, 1))
    assert not strides.is_dense((3, 4), (0, 1))


@given(box=boxes, most=st.integers(1, 60), gap=st.integers(0, 30))
def test_pieces_of_whole_slices_are_the_same_for_all_boxes_side_by_side(
    box: list[tuple[int, int, int]], most: int, gap: int
) -> None:
    """Whatever part of each slice a box has, and however much more it reads for it, it stays inside."""
    shape = tuple(size for size, _, _ in box)
    if 0 in shape:
        return
    whole = torch.empty(shape)
    starts = tuple(min(start, size - 1) for size, start, _ in box)
    lengths = tuple(max(1, min(n, size - at)) for (size, _, n), at in zip(box, starts, strict=True))
    first = sum(at * stride for at, stride in zip(starts, whole.stride(), strict=True))
    for piece in cut(lengths, whole.stride(), first, most, gap):
        lead, trail = whole_slices(piece, whole.stride(), piece.first, whole.numel())
        assert lead >= 0 <= trail
        assert piece.first - lead >= 0
        assert piece.first + piece.span + trail <= whole.numel()


def test_columns_are_cut_alike_and_need_the_same_slices() -> None:
    rows, columns = 100, 64
    halves = [list(cut((rows, 32), (columns, 1), at, 10 * columns, 64)) for at in (0, 32)]
    for left, right in zip(*halves, strict=True):
        ranges = []
        for piece in (left, right):
            lead, trail = whole_slices(piece, (columns, 1), piece.first, rows * columns)
            ranges.append((piece.first - lead, piece.first + piece.span + trail))
        assert ranges[0] == ranges[1]


def test_one_element_spread_over_a_tensor_has_no_slices() -> None:
    assert whole_slices(Piece((0,), (600,), 0, 1), (0,), 0, 1) == (0, 0)
    assert whole_slices(Piece((0, 0), (5, 10), 0, 41), (10, 0), 0, 41) == (0, 0)
