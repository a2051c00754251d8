"""The last call is the same on every rank, whenever the notice comes, and waits for no trainer."""

from __future__ import annotations

import random
import threading
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from cloudckpt.executor.coordination.final_step import FinalStep
from cloudckpt.executor.coordination.rendezvous import MeetingPlace

RANKS = 4
PATIENCE = 30.0


@pytest.fixture
def store() -> TCPStore:
    patience = timedelta(seconds=PATIENCE)
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=patience)


class Job:
    """Ranks as threads, which meet in every step as in a collective, and make one call in each."""

    def __init__(self, store: TCPStore, prefix: str, seed: int) -> None:
        self.heard: list[str] = []
        self.calls = [0] * RANKS
        self.last: list[int | None] = [None] * RANKS
        self.collective = threading.Barrier(RANKS)
        self._rng = random.Random(seed)
        places = [
            MeetingPlace.at_store(rank, RANKS, "127.0.0.1", store.port, prefix) for rank in range(RANKS)
        ]
        self.agreements = [FinalStep(place, self.heard.append, PATIENCE) for place in places]

    def run(self) -> None:
        asked = {rank: self._rng.randrange(1, 60) for rank in self._rng.sample(range(RANKS), 2)}
        seeds = [self._rng.random() for _ in range(RANKS)]
        threads = [
            threading.Thread(target=self._train, args=(rank, asked.get(rank), seeds[rank]))
            for rank in range(RANKS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for one in self.agreements:
            one.close()

    def _train(self, rank: int, asked: int | None, seed: float) -> None:
        rng = random.Random(seed)
        agreement = self.agreements[rank]
        while True:
            self.collective.wait(PATIENCE)
            if rng.random() < 0.2:
                threading.Event().wait(rng.random() * 0.003)
            self.calls[rank] += 1
            if not agreement.passes(PATIENCE):
                self.last[rank] = self.calls[rank]
                return
            if self.calls[rank] == asked:
                agreement.give_notice(f"SIGTERM {rank}")


SEEDS = [*range(4), *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(4, 100))]


@pytest.mark.parametrize("seed", SEEDS)
def test_ranks_that_wait_for_each_other_stop_at_the_same_call(store: TCPStore, seed: int) -> None:
    job = Job(store, f"job-{seed}", seed)
    job.run()
    assert None not in job.last and len(set(job.last)) == 1
    assert len(job.heard) == RANKS
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("cloudckpt-not")]


def test_every_call_after_the_last_is_one_as_well() -> None:
    alone = FinalStep(None, lambda _: None, PATIENCE)
    assert alone.passes(PATIENCE) and alone.passes(PATIENCE)
    alone.give_notice("SIGTERM 0")
    assert not alone.passes(PATIENCE)
    assert not alone.passes(PATIENCE)


def test_without_a_rank_that_could_agree_calls_pass(store: TCPStore) -> None:
    place = MeetingPlace.at_store(0, 2, "127.0.0.1", store.port, "alone")
    heard = threading.Event()
    agreement = FinalStep(place, lambda _: heard.set(), PATIENCE)
    agreement.give_notice("SIGTERM 0")
    assert heard.wait(PATIENCE)
    assert agreement.passes(0.01)
    agreement.close()
