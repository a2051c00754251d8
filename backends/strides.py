"""Arithmetic of shapes and strides, in elements."""

from __future__ import annotations

from collections.abc import Sequence


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor of this shape."""
    strides: list[int] = []
    step = 1
    for length in reversed(shape):
        strides.append(step)
        step *= max(length, 1)
    return tuple(reversed(strides))


def span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last of a strided box, both counted; 0 for an empty box."""
    if 0 in shape:
        return 0
    return 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return True if the elements fill their span of memory, in any order, without a hole or an overlap."""
    if 0 in shape:
        return True
    step = 1
    for stride, length in sorted(zip(strides, shape, strict=True)):
        if length == 1:
            continue
        if stride != step:
            return False
        step *= length
    return True


def same_order(shape: Sequence[int], one: Sequence[int], other: Sequence[int]) -> bool:
    """Return True if two strides lay a shape out alike; dimensions of length one don't count."""
    return all(a == b for length, a, b in zip(shape, one, other, strict=True) if length > 1)


def repeats(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return True if a dimension repeats the same elements, as ``expand`` makes them."""
    return any(stride == 0 and length > 1 for length, stride in zip(shape, strides, strict=True))
