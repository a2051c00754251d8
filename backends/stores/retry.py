"""Retries: the one place where a request is repeated, for every store.

A request is given ``retries`` + 1 attempts and a budget of seconds. Between attempts it waits by exponential
back-off with full jitter, and longer where the store says how long (``Retry-After``). What a failure means
is for the store's own module to judge. Clients below must not repeat anything themselves: their attempts
would multiply with ours, and an answer lost to one of them would never be known.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final, Generic, TypeVar

import tenacity

from cloudckpt.backends.stores.throttle import Throttle
from cloudckpt.backends.system import background_log

_T = TypeVar("_T")
_log = background_log.logger(__name__)

_BACK_OFF = tenacity.wait_random_exponential(multiplier=0.1, max=10.0)
"""Seconds: anything up to 0.1, 0.2, 0.4 and so on, and from the eighth pause on up to 10."""
_LONGEST_AFTER: Final = 30.0
"""Seconds that a store's own word is heeded for."""
_TRIES_OF_A_STRANGER: Final = 3
_MISMATCHES: Final = 3
"""Attempts in a row that may meet what is no HTTP, no TLS or no trusted certificate."""
_MISMATCH_PAUSE: Final = 1.0
"""Seconds that are waited between them at most."""
_RENEWALS: Final = 2

_answered: set[str] = set()
"""Places that have answered in this process: where nothing listens now, something may be restarting."""


class Verdict(enum.Enum):
    """The treatment of a failure."""

    FINAL = "asking again gets the same answer"
    TRANSIENT = "it may pass"
    SLOW_DOWN = "it may pass, with fewer requests at a time"
    RENEW = "the credentials have expired: it may pass with new ones"
    MISMATCH = "what is there speaks no HTTP or TLS, or has no trusted certificate: it hardly passes"
    UNREACHABLE = "nothing there speaks the store's protocol: it may pass where it once did"


class Reply(enum.Enum):
    """The state of the answer to an attempt that failed."""

    CAME = "the store answered"
    LOST = "the request may have been carried out, or still be"
    NEVER_ASKED = "the request did not reach the store"


@dataclass(frozen=True, slots=True)
class Judgement:
    """The meaning of one failure."""

    verdict: Verdict
    reply: Reply = Reply.CAME
    after: float | None = None
    """Seconds that the store asks to be left alone for."""


@dataclass(frozen=True, slots=True)
class Outcome(Generic[_T]):
    """The end of a request, after one attempt or several."""

    attempts: int
    lost: bool
    """Whether the answer to any attempt was lost: it may have been carried out, also where this failed."""
    value: _T | None = None
    error: Exception | None = None
    """That of the last attempt, None for a success."""

    def result(self) -> _T:
        """Return the value, or raise the error."""
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]  # without an error there is one


class Retries:
    """Makes the requests of one store in one process. Safe to use from several threads.

    Args:
        judge: says what an exception of a request means.
        pace: what the store's threads slow down by.
        place: names the server, the same for all stores on it.
        retries: attempts after the first.
        seconds: budget of a request, waiting included, after which no attempt begins. Waiting for the
            requests of other threads does not count.
        sleep: what to wait with.
        clock: what to tell the seconds by.
    """

    def __init__(
        self,
        judge: Callable[[Exception], Judgement],
        pace: Throttle,
        place: str,
        *,
        retries: int,
        seconds: float,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.judge = judge
        self.pace = pace
        self.place = place
        self.retries = retries
        self.seconds = seconds
        self.clock = clock
        self._sleep = sleep

    def outcome(
        self,
        act: Callable[[], _T],
        *,
        renew: Callable[[], bool] = lambda: False,
        seconds: float | None = None,
    ) -> Outcome[_T]:
        """Make a request until it succeeds, fails for good, or the attempts or seconds are spent.

        ``act`` is one attempt. ``renew`` gets new credentials and says whether there are any; it is called at
        most twice, and what follows it is no retry. ``seconds`` is a budget other than the usual one.
        """
        call = _Call(self, renew, self.seconds if seconds is None else seconds)
        retrying = tenacity.Retrying(
            retry=call.may_pass, wait=call.pause, stop=call.is_spent, sleep=self._sleep, reraise=True
        )
        try:
            value = retrying(lambda: call.attempt(act))
        except Exception as error:  # noqa: BLE001 - every failure is the caller's, with what led to it
            return Outcome(call.attempts, call.lost, error=error)
        return Outcome(call.attempts, call.lost, value)


class _Call:
    """One request: its attempts so far, and what is to come of them."""

    def __init__(self, retries: Retries, renew: Callable[[], bool], seconds: float) -> None:
        self.attempts = 0
        self.lost = False
        self._retries = retries
        self._renew = renew
        self._renewals = 0
        self._mismatches = 0
        """The attempts so far whose verdict was MISMATCH, without another verdict since."""
        self._ends = retries.clock() + seconds
        self._judged = Judgement(Verdict.FINAL)

    def attempt(self, act: Callable[[], _T]) -> _T:
        pace, place = self._retries.pace, self._retries.place
        self._judged = Judgement(Verdict.FINAL)  # of what is not an Exception
        asked = self._retries.clock()
        with pace.admitted() as events:
            self._ends += self._retries.clock() - asked
            self.attempts += 1
            try:
                value = act()
            except Exception as error:
                # To raise it again while another exception is handled would replace its context.
                error.__cause__ = error.__cause__ or error.__context__
                self._judged = self._retries.judge(error)
                self._mismatches = self._mismatches + 1 if self._judged.verdict is Verdict.MISMATCH else 0
                self.lost |= self._judged.reply is Reply.LOST
                if self._judged.reply is Reply.CAME:
                    _answered.add(place)
                if self._judged.verdict is Verdict.SLOW_DOWN:
                    pace.throttled(events)
                raise
        _answered.add(place)
        pace.succeeded()
        return value

    def may_pass(self, _state: tenacity.RetryCallState) -> bool:
        if self._judged.verdict is not Verdict.RENEW:
            return self._judged.verdict is not Verdict.FINAL
        if self._renewals == _RENEWALS or not self._renew():
            return False
        self._renewals += 1
        return True

    def pause(self, state: tenacity.RetryCallState) -> float:
        if self._judged.verdict is Verdict.RENEW and self._renewals == 1:
            return 0.0
        if self._judged.verdict is Verdict.MISMATCH:
            return min(_BACK_OFF(state), _MISMATCH_PAUSE)
        # The jitter comes on top of the store's own word, or all clients that got it would come back at once.
        return min(self._judged.after or 0.0, _LONGEST_AFTER) + _BACK_OFF(state)

    def is_spent(self, state: tenacity.RetryCallState) -> bool:
        verdict, pause = self._judged.verdict, state.upcoming_sleep
        allowed = self._retries.retries + 1 + self._renewals
        if verdict is Verdict.UNREACHABLE and self._retries.place not in _answered:
            allowed = min(allowed, _TRIES_OF_A_STRANGER)
        if self._mismatches >= _MISMATCHES:
            return True
        spent = self.attempts >= allowed or self._retries.clock() + pause > self._ends
        if not spent:
            said = type(state.outcome and state.outcome.exception()).__name__
            _log.debug("%s: attempt %d failed (%s), again in %.2f s", verdict, self.attempts, said, pause)
        return spent


def seconds_after(header: str | None) -> float | None:
    """Return what a ``Retry-After`` header asks for, in seconds or as a date; None where it says nothing."""
    if header is None:
        return None
    with_digits = header.strip()
    if with_digits.isdecimal():
        return float(with_digits)
    try:
        date = parsedate_to_datetime(header)
    except ValueError:
        return None
    # A date without a zone is in UTC, as all dates of HTTP are.
    aware = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (aware - datetime.now(UTC)).total_seconds())
