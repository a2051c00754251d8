"""A job that is restarted again and again resumes from the newest step and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import cloudckpt
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.save import stale_attempts
from cloudckpt.backends.save.save_lease import MARKER, SaveLease
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.object_names import HIDDEN_PREFIX
from cloudckpt.backends.system import process_identity
from cloudckpt.run import Run
from support.executors import until
from support.places import FOLDER, Place, new_place
from support.servers import S3Server
from support.storm_job import WAYS

ROOT = Path(__file__).parent


class Job:
    """A job whose trainers are started one after another by one process that has imported torch."""

    def __init__(self, place: Place, zygote: subprocess.Popen[str]) -> None:
        self.place = place
        self.target = Target.given("test", place.uri, place.options)
        self._zygote = zygote

    def start(self, steps: int = 1000, how: str = "") -> int:
        """Start a trainer and return its process number."""
        assert self._zygote.stdin is not None
        order = [self.place.uri, self.place.options, steps, how]
        self._zygote.stdin.write(json.dumps(order) + "\n")
        self._zygote.stdin.flush()
        return int(self.heard("started")[0])

    def heard(self, word: str) -> list[str]:
        assert self._zygote.stdout is not None
        while line := self._zygote.stdout.readline():
            first, *rest = line.split()
            if first == word:
                return rest
        raise AssertionError(f"the job ended before it said {word}")

    def markers(self) -> list[str]:
        with open_store(self.target) as store:
            return [info.name for info in store.list().objects if MARKER.fullmatch(info.name)]

    def await_marker(self, before: list[str]) -> None:
        """Return once a save has begun that none of these markers is of."""
        until(lambda: not {*self.markers()} <= {*before})

    def left(self) -> list[str]:
        """Names of what is there and belongs to no committed step: markers, data objects and open uploads."""
        with open_store(self.target) as store:
            names = [info.name for info in store.list().objects]
            named: set[str] = set()
            for name in names:
                if name.endswith(f"/{md.METADATA_NAME}"):
                    its = md.objects_of(md.load(store.get(name)[0], uri=store.uri))
                    named |= {name, *(f"{name.rpartition('/')[0]}/{one}" for one in its)}
            return sorted({*names} - named) + [p.upload.name for p in store.pending_uploads()]


@pytest.fixture(params=[pytest.param(FOLDER, marks=pytest.mark.soak), "moto"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, s3_server_named: Callable[[str], S3Server]
) -> Place:
    """An untouched place where open uploads can be listed."""
    return new_place(request.param, tmp_path, s3_server_named)


@pytest.fixture
def job(place: Place) -> Iterator[Job]:
    with subprocess.Popen(
        [sys.executable, "-m", "support.zygote"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as zygote:  # fmt: skip
        try:
            yield Job(place, zygote)
        finally:
            for child in psutil.Process(zygote.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            zygote.kill()


@pytest.mark.parametrize("restarts", [2, pytest.param(10, marks=pytest.mark.soak)])
def test_restarts_resume_from_the_newest_step_and_leave_nothing(job: Job, restarts: int) -> None:
    job.start(1)
    assert job.heard("resumed")[0] == "None"
    assert job.heard("ended") == ["0"]
    run, killed = Run(job.target), 0
    for _ in range(restarts):
        newest, before = run.newest(), job.markers()
        trainer = job.start()
        assert job.heard("resumed")[:2] == [str(newest), str(newest)]
        job.await_marker(before)
        children = psutil.Process(trainer).children(recursive=True)
        os.kill(trainer, signal.SIGKILL)
        assert job.heard("ended") == [str(-signal.SIGKILL)]
        assert not psutil.wait_procs(children, timeout=30)[1]
        killed += run.newest() == newest
    assert killed == 0 or job.left()
    newest = run.newest()
    assert newest is not None
    job.start(1, "raise")
    assert job.heard("resumed")[:2] == [str(newest), str(newest)]
    assert job.heard("ended") == ["1"]
    assert run.newest() == newest + 1
    assert job.left() == []


def test_two_ranks_that_are_restarted_resume_from_the_newest_step(moto: S3Server, tmp_path: Path) -> None:
    """One rank is killed, or raises. torchrun ends the other by SIGTERM, and is started again."""
    place = Place.on_server(moto, moto.new_bucket()).child("run")
    uri, log = f"{place.uri}?endpoint_url={moto.endpoint}&region=us-east-1", tmp_path / "log"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    for start in range(len(WAYS) + 1):
        job = subprocess.run(
            [*torchrun, "--nproc-per-node=2", ROOT / "support/storm_job.py", uri, log, str(start)],
            env=os.environ | keys | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert (job.returncode == 0) == (start == len(WAYS)), job.stderr
    starts = [tuple(map(int, line.split())) for line in log.read_text().splitlines()]
    assert len(starts) == 1 + len(WAYS)
    assert all(resumed == newest for resumed, newest in starts)
    assert starts == sorted(set(starts))
    run = Run(Target.given("test", place.uri, place.options))
    assert run.steps() == [starts[-1][0] + step for step in (0, 2, 3)]  # the one that was loaded stays
    with open_store(run.target) as store:
        assert list(store.pending_uploads()) == []
        assert [info.name for info in store.list().objects if HIDDEN_PREFIX in info.name] == []
    assert [one.pid for one in psutil.process_iter(["cmdline"]) if uri in (one.info["cmdline"] or [])] == []


def test_an_attempt_that_may_be_alive_is_not_touched(place: Place) -> None:
    """Its process lives, or nothing proves its death: on another host, or without an identity."""
    name = "step-0000000007/__0_0." + "a" * 32 + ".distcp"
    target = Target.given("test", place.uri, place.options)
    with open_store(target) as store, open_store(target.child("step-0000000007")) as own:
        upload = store.begin_upload(name)
        marker = SaveLease(own, "b" * 32, 0)
        other = SaveLease(own, "c" * 32, 0, notes={"host": "another", "process": 1 << 21})
        assert stale_attempts.remove_dead(store, "step-0000000003") == []
        marker.end()
        assert stale_attempts.remove_dead(store, "step-0000000003") == []
        assert [pending.upload.name for pending in store.pending_uploads()] == [name]
        other.end()
        dead = SaveLease(own, "d" * 32, 0, notes={"process": ended_process(), "started": 1})
        dead.leave()
        assert len(stale_attempts.remove_dead(store, "step-0000000003")) == 2
        assert list(store.pending_uploads()) == []
        store.abort_upload(upload)


def test_objects_of_a_checkpoint_that_was_set_aside_stay_and_leases_of_dead_loads_go(tmp_path: Path) -> None:
    target = Target.given("test", str(tmp_path / "run"), {})
    options: dict[str, Any] = {"progress": False, "preemption_grace": None}
    with cloudckpt.Checkpointer(tmp_path / "run", **options) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"weights": torch.full((100,), step)})
        checkpointer.rollback(1)
        folder = Run(target).folder(2)
        gone = {"process": ended_process(), "started": 1}
        with open_store(target) as store, open_store(target.child(folder)) as own:
            before = {info.name for info in store.list().objects}
            SaveLease(own, "d" * 32, 0, notes=gone).leave()
            SaveLease(own, "e" * 32, 0, name=".cloudckpt-load." + "e" * 32, notes=gone).leave()
            assert len(stale_attempts.remove_dead(store, Run(target).folder(1))) == 2
            assert {info.name for info in store.list().objects} == before
            SaveLease(own, "d" * 32, 0, notes=gone).leave()
        checkpointer.save(2, {"weights": torch.full((100,), 3)})
        with open_store(target) as store:
            assert len(stale_attempts.remove_dead(store, folder)) == 1
            left = {info.name for info in store.list().objects}
            assert before <= left and not any(MARKER.fullmatch(name) for name in left)


def ended_process() -> int:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


@pytest.mark.parametrize(
    "change",
    [
        {"host": "another"},
        {"boot": "another"},
        {"namespace": 1},
        {"boot": None},
        {"started": None},
        {"process": 0},
        {"process": "1"},
        {"process": True},
        {"process": 1 << 70},
    ],
    ids=str,
)
def test_a_death_is_proven_or_not_believed(change: dict[str, Any]) -> None:
    dead = {**process_identity.own(), "process": ended_process()}
    assert process_identity.is_dead(dead)
    assert not process_identity.is_dead({**dead, **change})
    assert not process_identity.is_dead(process_identity.own())
    assert process_identity.is_dead({**process_identity.own(), "started": 1})
