"""Exceptions on their way between processes: class, text and notes are those that were raised."""

from __future__ import annotations

import pytest

from cloudckpt.backends.errors import CheckpointError, ExecutorError
from cloudckpt.executor.coordination import remote_errors
from support.injected import EXCEPTIONS


class Mute(Exception):
    """An exception without a text."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize("kind", [kind for kind in EXCEPTIONS if kind != "Unpicklable"])
def test_an_exception_arrives_with_class_text_arguments_fields_and_notes(kind: str) -> None:
    error = EXCEPTIONS[kind]()
    error.add_note("a note")
    arrived = remote_errors.loads(remote_errors.dumps(error))
    assert type(arrived) is type(error)
    assert (str(arrived), arrived.args, arrived.__notes__) == (str(error), error.args, ["a note"])
    assert vars(arrived).keys() >= vars(error).keys() - {"__notes__"}
    assert str(remote_errors.loads(remote_errors.dumps(arrived))) == str(error)


@pytest.mark.parametrize(
    ("error", "said"), [(EXCEPTIONS["Unpicklable"](), "a lock"), (Mute(), "could not be made")]
)
def test_one_that_can_not_travel_is_told_in_words(error: Exception, said: str) -> None:
    error.add_note("a note")
    arrived = remote_errors.loads(remote_errors.dumps(error))
    assert type(arrived) is CheckpointError
    assert f"{type(error).__name__}: " in str(arrived)
    assert said in str(arrived)
    assert arrived.__notes__ == ["a note"]


def test_what_is_shared_names_its_rank_once() -> None:
    shared = remote_errors.shared(remote_errors.shared(ValueError("seven"), 3), 3)
    assert [note.splitlines()[0] for note in shared.__notes__] == ["raised on rank 3"]


def test_an_interruption_is_the_others_executor_error() -> None:
    shared = remote_errors.shared(KeyboardInterrupt(), 1)
    assert isinstance(shared, ExecutorError)
    assert shared.rank == 1
    assert "rank 1 was interrupted by KeyboardInterrupt" in str(shared)
    assert isinstance(shared.__cause__, KeyboardInterrupt)
