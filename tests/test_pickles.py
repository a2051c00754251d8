"""A pickle that claims more memory than it can need is known before it is loaded."""

from __future__ import annotations

import pickle
import pickletools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.backends.errors import IntegrityError
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.format.pickle_limits import claims_too_much

BOMBS = {
    "long binput": b"\x80\x04Nr\xff\xff\xff\x7f.",
    "behind a string": b"\x80\x04\x8c\x03abcr\xff\xff\xff\x7f.",
    "behind lines": b"cposix\nr\xff\xff\xff\nNr\xff\xff\xff\x7f.",
    "put": b"Np4294967295\n.",
    "in a frame": b"\x80\x04\x95\x07\x00\x00\x00\x00\x00\x00\x00Nr\xff\xff\xff\x7f.",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_memo_bomb_is_refused(bomb: bytes) -> None:
    assert claims_too_much(bomb)
    with pytest.raises(IntegrityError):
        md.load(bomb, uri="memory://x")


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.sampled_from("rp.\n"),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
)


@given(value=plain, protocol=st.integers(0, 5))
def test_no_honest_pickle_is_refused(value: Any, protocol: int) -> None:
    assert not claims_too_much(pickle.dumps(value, protocol=protocol))


@given(value=plain, protocol=st.integers(0, 5), seed=st.integers(0, 1 << 30))
def test_a_bomb_anywhere_between_instructions_is_found(value: Any, protocol: int, seed: int) -> None:
    honest = pickle.dumps(value, protocol=protocol)
    places = [position for _, _, position in pickletools.genops(honest) if position is not None][1:]
    at = random.Random(seed).choice(places)
    assert claims_too_much(honest[:at] + b"r\xff\xff\xff\x7f" + honest[at:])


@given(data=st.binary(max_size=200))
def test_any_bytes_get_an_answer(data: bytes) -> None:
    claims_too_much(data)


def test_metadata_of_a_real_checkpoint_passes(tmp_path: Path) -> None:
    dcp.save({f"t{i}": torch.zeros(i) for i in range(200)}, checkpoint_id=tmp_path / "stock")
    data = (tmp_path / "stock" / ".metadata").read_bytes()
    assert not claims_too_much(data)
    assert not claims_too_much(pickle.dumps(pickle.loads(data), protocol=2))


@pytest.mark.parametrize("instruction", [b"u", b"d", b"\x90"], ids=["SETITEMS", "DICT", "ADDITEMS"])
def test_long_text_that_is_compared_again_and_again_is_refused_where_it_ends_the_pickle(
    instruction: bytes,
) -> None:
    """Two keys that are equal and not one object are compared byte by byte, each time."""
    text = b"X\x00\x00\x10\x00" + b"a" * (1 << 20)
    start = {b"u": b"}(", b"d": b"(", b"\x90": b"\x8f("}[instruction]
    pair = b"h\x00Nh\x01N" if instruction != b"\x90" else b"h\x00h\x01"
    data = text + b"q\x000" + text + b"q\x010" + start + pair * 10_000 + instruction + b"."
    assert claims_too_much(data)
    assert claims_too_much(data, strictly=True)
