"""What `make live` tries, and what each part of it asks of a store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_GIB: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Asked:
    """Requests and bytes of a run, about."""

    writing: int = 0
    """Requests that write or list, which S3 and GCS price alike. Deletions are free on both."""
    reading: int = 0
    up: float = 0.0
    """GiB sent."""
    down: float = 0.0
    """GiB received."""

    def __add__(self, other: Asked) -> Asked:
        return Asked(
            self.writing + other.writing,
            self.reading + other.reading,
            self.up + other.up,
            self.down + other.down,
        )


@dataclass(frozen=True, slots=True)
class Suite:
    """Tests that go to the named place."""

    name: str
    what: str
    files: tuple[str, ...]
    """Below the folder of the tests."""
    asked: Asked
    """As counted at an S3 server; `tests/test_live.py` counts again."""
    long: bool = False
    """True if its tests are long forms, which take a quarter of an hour and run only where they are named."""


SUITES: Final = (
    Suite(
        "conformance",
        "what every store promises",
        ("stores/test_live.py",),
        Asked(writing=1460, reading=300, up=0.1, down=0.1),
    ),
    Suite(
        "interoperation",
        "cloudckpt and stock DCP, both ways",
        ("test_interop.py",),
        Asked(writing=210, reading=850, up=0.1, down=0.5),
    ),
    Suite(
        "faults",
        "calls that fail, on any rank, at any time",
        ("test_faults.py",),
        Asked(writing=1000, reading=500, up=1.3, down=0.5),
    ),
    Suite(
        "races",
        "jobs that save to one place at once",
        ("test_race.py",),
        Asked(writing=240, reading=200),
    ),
    Suite(
        "crashes",
        "saves that are killed at each of their requests",
        ("test_crash.py",),
        Asked(writing=4950, reading=1850),
        long=True,
    ),
    Suite(
        "runs",
        "a Checkpointer, and saves in the background",
        ("test_checkpointer.py", "test_async_save.py"),
        Asked(writing=410, reading=350, up=0.1, down=0.1),
    ),
)


def asked_by_benchmark(gib: float, small: int, repeats: int) -> Asked:
    """What two forms ask that save and load two states, each once more than counts."""
    turns = 2 * (1 + repeats)
    size = gib + small * 16384 / _GIB
    # Stock DCP asks for each tensor by itself; the rest is parts and ranges of some MiB.
    return Asked(
        writing=round(turns * (size * 64 + 10)),
        reading=round(turns * (size * 96 + small / 8 + 10)),
        up=turns * size,
        down=turns * size,
    )
