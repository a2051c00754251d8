"""Nothing of ours waits in a handler, and messages come whole and in order where somebody reads them."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator

import pytest

from cloudckpt.backends.system import background_log

NAME = "cloudckpt.tests.background"


class Blocked(logging.Handler):
    """A handler that waits until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.messages: list[str] = []
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.go.wait(60)
        self.messages.append(record.getMessage())
        self.records.append(record)


@pytest.fixture
def handlers() -> Iterator[list[logging.Handler]]:
    real = logging.getLogger(NAME)
    added: list[logging.Handler] = []
    real.propagate = False
    yield added
    background_log.flush(10)
    for handler in added:
        real.removeHandler(handler)


def fill(pipe: int) -> int:
    """Fill a pipe, and return with how many bytes."""
    os.set_blocking(pipe, False)
    filled = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            filled += os.write(pipe, b"x" * 4096)
    os.set_blocking(pipe, True)
    return filled


def add(handlers: list[logging.Handler], handler: logging.Handler) -> None:
    handlers.append(handler)
    logging.getLogger(NAME).addHandler(handler)


def test_a_thread_of_ours_does_not_wait_for_a_handler_and_what_is_too_much_is_counted(
    handlers: list[logging.Handler],
) -> None:
    blocked = Blocked()
    add(handlers, blocked)
    log = background_log.logger(NAME)
    count = 3 * background_log._MOST

    def many() -> None:
        for number in range(count):
            log.warning("%d", number)

    thread = threading.Thread(target=many, name="cloudckpt-test")
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    blocked.go.set()
    assert background_log.flush(60)
    kept = [int(message) for message in blocked.messages if message.isdigit()]
    assert kept == sorted(set(kept)) and len(kept) >= background_log._MOST
    assert sum("dropped" in message for message in blocked.messages) == 1


def test_a_full_pipe_delays_messages_and_blocks_nobody_who_ends(handlers: list[logging.Handler]) -> None:
    read, write = os.pipe()
    filled = fill(write)
    with os.fdopen(write, "w", buffering=1) as stream:
        handler = logging.StreamHandler(stream)
        add(handlers, handler)
        log = background_log.logger(NAME)
        for number in range(10):
            log.warning("message %d", number)
        assert not background_log.flush(0.1)
        # As the interpreter's end does: no thread holds the handler's lock while it waits.
        assert handler.lock is not None and handler.lock.acquire(timeout=30)
        handler.lock.release()
        left = filled
        while left:
            left -= len(os.read(read, min(left, 65536)))
        while not background_log.flush(60):
            pass
        logging.getLogger(NAME).removeHandler(handler)
    with os.fdopen(read) as lines:
        assert lines.read().splitlines() == [f"message {number}" for number in range(10)]


def test_a_message_of_the_program_is_written_when_its_call_returns(
    handlers: list[logging.Handler],
) -> None:
    at_once = Blocked()
    at_once.go.set()
    add(handlers, at_once)
    background_log.logger(NAME).warning("%s", "now")
    assert at_once.messages == ["now"]


def test_levels_and_places_are_those_of_the_logger_by_that_name(handlers: list[logging.Handler]) -> None:
    handler = Blocked()
    handler.go.set()
    add(handlers, handler)
    log = background_log.logger(NAME)
    real = logging.getLogger(NAME)
    real.setLevel(logging.ERROR)
    log.warning("not told")
    log.error("told")
    real.setLevel(logging.NOTSET)
    (record,) = handler.records
    assert (record.name, record.module, record.getMessage()) == (NAME, "test_background_log", "told")
