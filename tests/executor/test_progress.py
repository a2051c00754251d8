"""Progress crosses from the checkpoint process to the trainer whole, whatever happens to the writer."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from cloudckpt.executor.progress import Progress, ProgressBoard
from support.snapshots import program

SAVES_SEEN = 5_000

WRITER = """
import os, signal, sys
from cloudckpt.executor import progress
board = progress.ProgressBoard.attach(int(sys.argv[1]))
board.begin(7, 1000)
board.phase("writing", 900)
board.stored("__0_0.distcp", 250)
board.stored("__0_1.distcp", 50)
print("written", flush=True)
sys.stdin.readline()
board.phase("committing")
print("written", flush=True)
sys.stdin.readline()
class Fatal:
    size = progress._FIELDS.size
    def pack_into(self, page, at, *fields):
        page[at : at + 8] = b"\\xff" * 8
        os.kill(os.getpid(), signal.SIGKILL)
progress._FIELDS = Fatal()
board.stored("never.distcp", 10)
"""

HAMMER = """
import sys
from cloudckpt.executor.progress import ProgressBoard
board = ProgressBoard.attach(int(sys.argv[1]))
print("ready", flush=True)
save = 0
while True:
    save += 1
    board.begin(save, save)
    board.phase("writing", 2 * save)
    board.stored(f"{save % 10}" * (1 + save % 900), 2 * save)
    board.beat()
"""


@pytest.fixture
def board() -> Iterator[ProgressBoard]:
    made = ProgressBoard()
    yield made
    made.close()


def test_another_process_is_read_as_it_goes_and_when_it_was_killed_in_the_middle(
    board: ProgressBoard,
) -> None:
    assert board.read().progress == Progress(0, 0, "waiting")
    with program(WRITER, board.fd, fds=(board.fd,)) as writer:
        assert writer.listen() == "written"
        before = board.read()
        assert before.save == 7
        assert before.progress == Progress(300, 900, "writing", "__0_1.distcp")
        assert writer.ask() == "written"
        after = board.read()
        assert after.progress == Progress(300, 900, "committing", "__0_1.distcp")
        assert before.advanced < after.advanced <= after.beat
        assert writer.ask() == ""
        assert writer.process.wait(60) == -signal.SIGKILL
    assert board.read() == after
    board.begin(8, 50)  # the next process's
    assert board.read().save == 8
    assert board.read().progress == Progress(0, 50, "planning")


def test_a_long_name_is_cut_and_a_next_save_begins_at_nothing(board: ProgressBoard) -> None:
    board.begin(1, 10)
    board.stored("é" * 5000, 10)
    name = board.read().progress.object_name
    assert name is not None
    assert set(name) == {"é"}
    board.begin(2, 20)
    assert board.read().save == 2
    assert board.read().progress == Progress(0, 20, "planning")


def test_a_reader_never_sees_half_of_a_write(board: ProgressBoard) -> None:
    """Nor of a sign of life: a moment's zero there would be taken for a process that is frozen."""
    seen: set[int] = set()
    with program(HAMMER, board.fd, fds=(board.fd,)) as writer:
        assert writer.listen() == "ready"
        while board.read().save == 0:
            pass
        last = board.read()
        while len(seen) < SAVES_SEEN:
            reading = board.read()
            save, progress = reading.save, reading.progress
            seen.add(save)
            name = f"{save % 10}" * (1 + save % 900)
            assert progress in (
                Progress(0, save, "planning"),
                Progress(0, 2 * save, "writing"),
                Progress(2 * save, 2 * save, "writing", name),
            )
            assert last.save <= save
            assert last.advanced <= reading.advanced
            assert last.beat <= reading.beat
            last = reading
            assert writer.process.poll() is None
