"""Checkpoints of each kind, as a release writes them: made once, kept, and loaded by every later release.

    PYTHONPATH=tests python -m support.released tests/fixtures

writes ``release-VERSION.zip`` there, named for the version of the package. Run it when a release is made, and
never again for that release.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import cloudckpt
from support import released_content as content
from support import released_states as made
from support.states import compare, world_mesh

STEP = 5


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of state: how it is built, how many ranks save it, and whether loading takes ``trust``."""

    build: made.Build
    ranks: int = 1
    trust: bool = False

    @property
    def name(self) -> str:
        """The run that holds it."""
        return self.build.__name__

    def state(self, mesh: DeviceMesh | None, *, blank: bool = False) -> content.State:
        """Build it with its content, or blank, to load into."""
        return self.build(content.Content(blank=blank), mesh)


_ON_ONE = (
    made.tensors,
    made.nested,
    made.values,
    made.adamw,
    made.sgd,
    made.adafactor,
    made.two_optimizers,
    made.milestones,
    made.schedulers,
    made.scaler,
    made.replace_torch_save,
    made.accelerate,
    made.hf_trainer,
    made.lightning,
)
_ON_TWO = (made.demo, made.ddp, made.fsdp2, made.titan, made.sharded)
KINDS = {
    kind.name: kind
    for kind in (
        *(Kind(build) for build in _ON_ONE),
        Kind(made.trusted, trust=True),
        *(Kind(build, ranks=2) for build in _ON_TWO),
    )
}


def write(folder: Path) -> Path:
    """Save every kind, and return the archive of the runs."""
    archive = folder / f"release-{cloudckpt.__version__}.zip"
    with tempfile.TemporaryDirectory() as scratch:
        runs = Path(scratch) / "runs"
        save(runs, None)
        meeting = str(Path(scratch) / "meeting")
        spawn = multiprocessing.get_context("spawn")
        ranks = [spawn.Process(target=_save_on, args=(rank, meeting, runs)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        if any(rank.exitcode for rank in ranks):
            raise SystemExit("a rank failed")
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
            for file in sorted(runs.rglob("*")):
                if file.is_file():
                    packed.write(file, file.relative_to(runs))
    return archive


def save(runs: Path, mesh: DeviceMesh | None) -> None:
    """Save what as many ranks as these save."""
    ranks = 1 if mesh is None else mesh.size()
    for kind in KINDS.values():
        if kind.ranks == ranks:
            with cloudckpt.Checkpointer(runs / kind.name, progress=False) as checkpointer:
                checkpointer.save(STEP, kind.state(mesh))


def differences(runs: Path, name: str, mesh: DeviceMesh | None) -> list[str]:
    """Load a kind into a blank state, and return a line for each leaf that is not what was saved."""
    kind = KINDS[name]
    loaded = kind.state(mesh, blank=True)
    with cloudckpt.Checkpointer(runs / name, progress=False, trust=kind.trust) as checkpointer:
        assert checkpointer.load(loaded) == STEP
    return compare(content.described(loaded), content.described(kind.state(mesh)))


def differences_on(rank: int, runs: Path, name: str) -> list[str]:
    """The same on a rank of a group."""
    return differences(runs, name, world_mesh())


@contextmanager
def _group(rank: int, meeting: str) -> Iterator[None]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(meeting, 2), rank=rank, world_size=2)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _save_on(rank: int, meeting: str, runs: Path) -> None:
    with _group(rank, meeting):
        save(runs, world_mesh())


if __name__ == "__main__":
    written = write(Path(sys.argv[1]))
    sys.stdout.write(f"{written}: {written.stat().st_size / 1024:.0f} KiB\n")
