"""Calls that ranks don't make alike fail on every rank that makes them, soon, and name ranks and calls."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cloudckpt import Checkpointer, ConfigurationError, ExecutorError
from support import living as kept
from support.executors import until
from support.ranks import RankPool, RankPools

RANKS = 2
BRIEF = 2.0
"""Seconds of start_timeout where a rank stays away."""
LONGER = 12.0
"""Seconds of start_timeout where one stays away, and a checkpoint process has to start."""
PATIENT = 300.0
"""Seconds of start_timeout where every rank comes, to other calls."""
SOON = 60.0
"""Seconds: less than any timeout of torch's, and enough for a busy machine."""

_numbers = itertools.count()


@pytest.fixture
def pool(rank_pool: RankPools) -> Iterator[RankPool]:
    pool = rank_pool(RANKS)
    yield pool
    pool(kept.end)


def new_run(folder: Path) -> str:
    return f"file://{folder}/run-{next(_numbers)}"


def living(uri: str, start_timeout: float = PATIENT, **options: Any) -> Checkpointer:
    return kept.living(uri, start_timeout=start_timeout, **options)


def state() -> dict[str, Any]:
    return {"weight": torch.arange(6.0), "step": 1}


CALLS: dict[str, Callable[[Checkpointer], Any]] = {
    "latest_step()": lambda c: c.latest_step(),
    "all_steps()": lambda c: c.all_steps(),
    "pin(1)": lambda c: c.pin(1),
    "unpin(1)": lambda c: c.unpin(1),
    "load()": lambda c: c.load(state()),
    "warmup()": lambda c: c.warmup(),
    "warmup(state_dict)": lambda c: c.warmup(state()),
    "wait()": lambda c: c.wait(),
    "save(2)": lambda c: c.save(2, state()),
    "async_save(2)": lambda c: c.async_save(2, state()).result(),
}
"""Calls by the name that an error gives them; those of a save name its step."""


def raised(call: Callable[[Checkpointer], Any], checkpointer: Checkpointer) -> BaseException | None:
    try:
        call(checkpointer)
    except (ConfigurationError, ExecutorError) as error:
        return error
    return None


def goes_on(checkpointer: Checkpointer, tries: int = 8) -> int | None:
    """The newest step, after as many tries as a busy machine needs within a brief start_timeout."""
    for left in reversed(range(tries)):
        try:
            return checkpointer.latest_step()
        except ExecutorError:
            if not left:
                raise
    raise AssertionError


@pytest.mark.parametrize("alone", range(RANKS))
def test_a_call_on_one_rank_only_names_the_other_within_start_timeout(
    pool: RankPool, tmp_path: Path, alone: int
) -> None:
    uri = new_run(tmp_path)

    def on_rank(rank: int) -> dict[str, tuple[BaseException | None, float]]:
        found = {}
        living(uri).save(1, state())
        brief = living(uri, BRIEF)
        for name, call in CALLS.items():
            over = tmp_path / f"{name} is over"
            if rank == alone:
                began = time.monotonic()
                error = raised(call, brief)
                found[name] = error, time.monotonic() - began
                over.touch()
            until(over.exists, seconds=SOON)
            assert goes_on(brief) == 1
        return found

    for name, (error, took) in pool(on_rank)[alone].items():
        # In async_save(2), rank 0 waits for no other rank before the save itself.
        waits = name == "save(2)" or (name == "async_save(2)" and alone == 0)
        what = f"the save of step 2 of {uri}" if waits else name
        assert isinstance(error, ExecutorError), name
        assert f"rank {1 - alone} did not come to {what}" in str(error), (name, str(error))
        assert f"within start_timeout ({BRIEF:g} s)" in str(error), str(error)
        assert error.rank == 1 - alone
        assert took < SOON, name


@pytest.mark.parametrize("alone", range(RANKS))
def test_the_first_call_of_all_on_one_rank_only_names_the_other(
    pool: RankPool, tmp_path: Path, alone: int
) -> None:
    uri = new_run(tmp_path)

    def on_rank(rank: int) -> str | None:
        checkpointer = living(uri, BRIEF)
        error = None
        if rank == alone:
            error = raised(CALLS["latest_step()"], checkpointer)
            (tmp_path / "over").touch()
        until((tmp_path / "over").exists, seconds=SOON)
        assert goes_on(checkpointer) is None
        return None if error is None else str(error)

    told = pool(on_rank)[alone]
    assert told is not None
    assert f"rank {1 - alone} did not come to latest_step() within start_timeout ({BRIEF:g} s)" in told


def test_different_calls_fail_at_once_on_every_rank_with_both_named(pool: RankPool, tmp_path: Path) -> None:
    uri = new_run(tmp_path)
    pairs = [
        *itertools.pairwise([name for name in CALLS if "save" not in name]),
        ("pin(1)", "latest_step()"),
        ("load()", "wait()"),
    ]

    def on_rank(rank: int) -> list[str]:
        checkpointer = living(uri)
        checkpointer.save(1, state())
        told = []
        for pair in pairs:
            error = raised(CALLS[pair[rank]], checkpointer)
            assert isinstance(error, ConfigurationError), pair
            told.append(str(error))
            assert checkpointer.latest_step() == 1
        return told

    began = time.monotonic()
    first, second = pool(on_rank)
    assert first == second
    for (of_0, of_1), told in zip(pairs, first, strict=True):
        assert f"rank 1 calls {of_1}, and rank 0 {of_0}" in told
    assert time.monotonic() - began < SOON + PATIENT / 3


def test_the_same_call_with_another_step_is_refused_with_both_named(pool: RankPool, tmp_path: Path) -> None:
    uri = new_run(tmp_path)

    def on_rank(rank: int) -> list[str]:
        checkpointer = living(uri)
        for step in (5, 6):
            checkpointer.save(step, state())
        told = [
            str(raised(lambda c: c.pin(5 + rank), checkpointer)),
            str(raised(lambda c: c.load(state(), 5 + rank), checkpointer)),
        ]
        assert checkpointer.load(state(), 5) == 5
        return told

    first, second = pool(on_rank)
    assert first == second
    pin, load = first
    assert "rank 1 calls pin(6), and rank 0 pin(5)" in pin
    assert "rank 1 is to load step 6, and rank 0 step 5" in load


@pytest.mark.parametrize("call", ["async_save", "save"])
def test_saves_of_different_steps_fail_on_every_rank_with_both_named(
    pool: RankPool, tmp_path: Path, call: str
) -> None:
    uri = new_run(tmp_path)

    def on_rank(rank: int) -> tuple[str, int | None]:
        checkpointer = living(uri)

        def save(c: Checkpointer) -> None:
            saved = getattr(c, call)(5 + rank, state())
            if call == "async_save":
                saved.result()

        error = raised(save, checkpointer)
        assert isinstance(error, ConfigurationError)
        assert checkpointer.save(7, state()).step == 7
        assert checkpointer.all_steps() == [7]
        return str(error), error.rank

    first, second = pool(on_rank)
    assert first == second
    assert first[1] == 1
    expected = f"rank 1 comes to the save of step 6 of {uri}, and rank 0 to the save of step 5 of {uri}"
    assert expected in first[0]


def test_async_save_does_not_wait_for_a_rank_that_saves_another_step(pool: RankPool, tmp_path: Path) -> None:
    uri = new_run(tmp_path)

    def on_rank(rank: int) -> None:
        checkpointer = living(uri, on_failure="warn")
        checkpointer.save(1, state())
        done = tmp_path / "rank 0 is through"
        if rank == 1:  # comes only when rank 0's call has returned
            until(done.exists, seconds=SOON)
        handle = checkpointer.async_save(2 + rank, state())
        assert rank == 1 or not handle.done()
        done.touch()
        assert isinstance(handle.exception(), ConfigurationError)
        checkpointer.wait()

    pool(on_rank)


def test_checkpointers_of_different_uris_fail_with_both_named(pool: RankPool, tmp_path: Path) -> None:
    uris = [new_run(tmp_path), new_run(tmp_path)]

    def on_rank(rank: int) -> list[str]:
        checkpointer = living(uris[rank])
        told = [
            str(raised(CALLS[name], checkpointer))
            for name in ("latest_step()", "save(2)", "async_save(2)", "load()", "warmup()", "wait()")
        ]
        assert not Path(uris[rank].removeprefix("file://")).exists()  # nothing was saved anywhere
        return told

    first, second = pool(on_rank)
    assert first == second
    latest, save, background, load, warmup, wait = first
    for told, name in ((latest, "latest_step()"), (load, "load()"), (warmup, "warmup()"), (wait, "wait()")):
        assert f"rank 1 calls {name} of {uris[1]}, and rank 0 {name} of {uris[0]}" in told
    for told in (save, background):
        assert f"rank 1 comes to the save of step 2 of {uris[1]}" in told
        assert f"rank 0 to the save of step 2 of {uris[0]}" in told


def test_ranks_that_made_different_numbers_of_calls_agree_again(pool: RankPool, tmp_path: Path) -> None:
    uri = new_run(tmp_path)

    def on_rank(rank: int) -> list[str]:
        checkpointer = living(uri, LONGER)
        checkpointer.save(1, state())
        told = []
        if rank == 1:
            calls = ("latest_step()", "async_save(2)", "wait()")
            told = [str(raised(CALLS[name], checkpointer)) for name in calls]
            (tmp_path / "over").touch()
        until((tmp_path / "over").exists, seconds=SOON)
        for step in (4, 5):
            assert checkpointer.async_save(step, state()).result().step == step
            checkpointer.wait()
            assert checkpointer.latest_step() == step
            checkpointer.pin(step)
        return told

    assert all("rank 0 did not come to" in told for told in pool(on_rank)[1])


def test_a_rank_that_is_interrupted_while_it_waits_ends_the_call_of_the_others(
    rank_pool: RankPools, tmp_path: Path
) -> None:
    uri = new_run(tmp_path)

    def waits() -> bool:
        return any("cloudckpt-meet in latest_step()" in thread.name for thread in threading.enumerate())

    def interrupt() -> None:
        until(lambda: (tmp_path / "rank 0 waits").exists() and waits(), seconds=SOON)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def tell() -> None:
        until(waits, seconds=SOON)
        (tmp_path / "rank 0 waits").touch()

    def on_rank(rank: int) -> str:
        checkpointer = living(uri)
        assert checkpointer.all_steps() == []
        told = ""
        if rank == 2:  # stays away, so that the others wait
            until((tmp_path / "over").exists, seconds=SOON)
        else:
            thread = threading.Thread(target=interrupt if rank else tell)
            thread.start()
            try:
                checkpointer.latest_step()
            except (ExecutorError, KeyboardInterrupt) as error:
                told = f"{type(error).__name__}: {error}"
            thread.join()
            (tmp_path / "over").touch()
        assert checkpointer.all_steps() == []
        kept.end(rank)
        return told

    first, second, _ = rank_pool(3)(on_rank)
    assert second.startswith("KeyboardInterrupt")
    assert first.startswith("ExecutorError: rank 1 was interrupted by KeyboardInterrupt")
