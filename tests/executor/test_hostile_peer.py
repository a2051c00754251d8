"""A client of the job's store that is no rank: it writes and deletes every key that the library uses."""

from __future__ import annotations

import pickle
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from torch.distributed import DistError, TCPStore

from cloudckpt.executor.coordination import wire_format
from cloudckpt.executor.coordination.consensus import Agreement, AttemptResult, RankStatus
from support.commanded import Rank
from support.processes import unused_port

OPTIONS: Final = {"save_timeout": 10.0, "start_timeout": 10.0}
BOUND: Final = 60.0
"""Seconds that a save may take: its deadlines, and a new process on a busy machine."""
ROOM: Final = 512 << 20
"""Bytes that a rank may grow by."""


class Canary:
    """Leaves a file where it is unpickled."""

    def __init__(self, at: Path) -> None:
        self.at = at

    def __reduce__(self) -> Any:
        return Path.touch, (self.at,)


Plant = Callable[[TCPStore, str, random.Random], None]


def _garbage(store: TCPStore, key: str, rng: random.Random) -> None:
    store.set(key, "".join(rng.choices('abc{}[]"0', k=60)))


def _huge(store: TCPStore, key: str, _: random.Random) -> None:
    store.set(key, "x" * (7 << 20))


def _foreign(store: TCPStore, key: str, rng: random.Random) -> None:
    message = rng.choice(
        [
            Agreement(rng.randrange(99)),
            Agreement(1, refusal=b"{}"),
            AttemptResult(sound=True),
            AttemptResult(sound=False, failure=b"nothing"),
            RankStatus(rng.randrange(99), "the save of step 1", None),
        ]
    )
    store.set(key, wire_format.text(message))


def _deleted(store: TCPStore, key: str, _: random.Random) -> None:
    store.delete_key(key)


def _pickled(canary: Path) -> Plant:
    data = pickle.dumps(Canary(canary)).hex()

    def plant(store: TCPStore, key: str, _: random.Random) -> None:
        store.set(key, data)

    return plant


PLANTS: dict[str, Plant | None] = {
    "garbage": _garbage,
    "huge values": _huge,
    "messages of other kinds": _foreign,
    "nothing": _deleted,
    "pickles": None,
}


SHORT: Final = {"garbage", "pickles"}
"""What `make test` tries."""


@contextmanager
def attacked(port: int, plant: Plant, seed: int) -> Iterator[list[str]]:
    """Replace each message of the library in the store, again and again, during the block."""
    over, hit, rng = threading.Event(), list[str](), random.Random(seed)

    def attack() -> None:
        store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20))
        while not over.wait(0.002):
            for key in store.list_keys():
                # Counters are the store's own: it does not survive text where it adds.
                if "cloudckpt" in key and _is_message(key):
                    with suppress(DistError):
                        plant(store, key, rng)
                        hit.append(key)

    thread = threading.Thread(target=attack, name="attack")
    thread.start()
    try:
        yield hit
    finally:
        over.set()
        thread.join()


def _is_message(key: str) -> bool:
    parts = key.split("/")
    counters = {"joined", "reported", "seen-by", "seen", "came", "executors", "left", "arrived", "read"}
    return not counters.intersection(parts[-2:])


@pytest.mark.parametrize(
    "what", [what if what in SHORT else pytest.param(what, marks=pytest.mark.soak) for what in PLANTS]
)
def test_a_client_of_the_store_that_is_no_rank_costs_saves_and_nothing_more(
    what: str, tmp_path: Path
) -> None:
    canary = tmp_path / "ran"
    plant = PLANTS[what] or _pickled(canary)
    port = unused_port()
    with ExitStack() as stack:
        uri = f"file://{tmp_path}/run"
        ranks = [stack.enter_context(Rank(rank, ("127.0.0.1", port), uri, OPTIONS)) for rank in range(2)]
        for rank in ranks:
            assert "ready" in rank.answer()
        assert [one["done"]["error"] for one in saved(ranks, 1)] == [[], []]
        before = [rank.memory for rank in ranks]
        with attacked(port, plant, 28) as hit:
            attacked_saves = [saved(ranks, step) for step in (2, 3)]
        assert hit
        for reports in attacked_saves:
            for told in reports:
                assert "done" in told, told
                assert told["done"]["seconds"] < BOUND
        for rank, bytes_before in zip(ranks, before, strict=True):
            assert rank.memory < bytes_before + ROOM
        assert not canary.exists()
        # Calls that an attack left half made are over by the second save after it.
        after = [saved(ranks, step) for step in (4, 5, 6)]
        assert [one["done"]["error"] for one in after[-1]] == [[], []], (attacked_saves, after)


def saved(ranks: list[Rank], step: int) -> list[dict[str, Any]]:
    for rank in ranks:
        rank.ask("save", step)
    return [rank.answer() for rank in ranks]
