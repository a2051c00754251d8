"""BufferPool memory stays within its limit, is used again, and never lent twice at a time."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

from cloudckpt.backends.transfer.buffer_pool import BufferPool

MIB = 1 << 20


def test_a_buffer_has_the_size_asked_for_and_is_used_again() -> None:
    scratch = BufferPool(8 * MIB)
    with scratch.lent(2 * MIB) as first:
        assert first.nbytes == 2 * MIB
        first[0] = 7
    with scratch.lent(2 * MIB - 100) as again:
        assert again.nbytes == 2 * MIB - 100
        assert again[0] == 7, "fresh memory is zero"
    scratch.clear()
    with scratch.lent(2 * MIB) as fresh:
        assert fresh[0] == 0
    with scratch.lent(0) as nothing:
        assert nothing.nbytes == 0


def test_what_is_lent_and_what_is_idle_stay_within_the_limit_and_apart() -> None:
    limit, most = 4 * MIB, 0
    scratch = BufferPool(limit)
    lock = threading.Lock()

    def use(number: int) -> None:
        nonlocal most
        with scratch.lent(random.Random(number).randrange(1, MIB)) as buffer:
            buffer[0] = buffer[-1] = number % 256
            with lock:
                held = scratch._held + sum(one.size for one in scratch._idle)
                most = max(most, held)
            assert (buffer[0], buffer[-1]) == (number % 256, number % 256)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(500)))
    # A buffer may be a quarter larger than what it is lent for.
    assert 0 < most <= limit * 5 / 4


def test_one_that_asks_for_more_than_the_limit_gets_it_and_it_is_not_kept() -> None:
    scratch = BufferPool(MIB)
    with scratch.lent(3 * MIB) as large:
        assert large.nbytes == 3 * MIB
    assert scratch._idle == []
