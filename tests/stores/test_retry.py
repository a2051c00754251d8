"""Asking again and slowing down, whatever the store: with made-up requests and no time that passes."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from botocore import exceptions as boto

from cloudckpt.backends.checksums import ALGORITHMS
from cloudckpt.backends.errors import IntegrityError
from cloudckpt.backends.stores.base import Part
from cloudckpt.backends.stores.retry import Judgement, Reply, Retries, Verdict, seconds_after
from cloudckpt.backends.stores.s3.checksums import combined, contradicted, given_or_of
from cloudckpt.backends.stores.s3.verdict import judge
from cloudckpt.backends.stores.throttle import Throttle

_FINAL = Judgement(Verdict.FINAL)
_TRANSIENT = Judgement(Verdict.TRANSIENT)
_LOST = Judgement(Verdict.TRANSIENT, Reply.LOST)
_SLOW_DOWN = Judgement(Verdict.SLOW_DOWN)
_RENEW = Judgement(Verdict.RENEW)
_MISMATCH = Judgement(Verdict.MISMATCH, Reply.LOST)
_REFUSED = Judgement(Verdict.UNREACHABLE, Reply.NEVER_ASKED)


class _Failed(Exception):
    """A failure of a made-up request, with what it means."""

    def __init__(self, judgement: Judgement) -> None:
        super().__init__(judgement)
        self.judgement = judgement


def _judge(error: Exception) -> Judgement:
    return error.judgement if isinstance(error, _Failed) else _FINAL


def _request(failures: Iterable[Judgement]) -> Callable[[], str]:
    """Return a request that fails so, one attempt after another, and then succeeds."""
    remaining = iter(failures)

    def act() -> str:
        for judgement in remaining:
            raise _Failed(judgement)
        return "done"

    return act


class _Sleep:
    """Sleeps that take no time, and how long they were to be."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


@pytest.fixture
def sleep() -> _Sleep:
    return _Sleep()


@pytest.fixture
def retries(sleep: _Sleep) -> Retries:
    return Retries(_judge, Throttle(8), uuid.uuid4().hex, retries=5, seconds=1000.0, sleep=sleep)


def test_a_request_that_succeeds_is_made_once(retries: Retries, sleep: _Sleep) -> None:
    outcome = retries.outcome(_request([]))
    assert (outcome.result(), outcome.attempts, outcome.lost) == ("done", 1, False)
    assert sleep.seconds == []


def test_an_outcome_says_how_many_attempts_there_were_and_whether_an_answer_was_lost(
    retries: Retries,
) -> None:
    outcome = retries.outcome(_request([_TRANSIENT, _LOST, _SLOW_DOWN]))
    assert (outcome.result(), outcome.attempts, outcome.lost) == ("done", 4, True)
    outcome = retries.outcome(_request([_TRANSIENT, _TRANSIENT, _FINAL]))
    assert (outcome.attempts, outcome.lost) == (3, False)
    with pytest.raises(_Failed) as caught:
        outcome.result()
    assert caught.value.judgement is _FINAL
    assert retries.outcome(_request([_LOST, _FINAL])).lost


def test_a_request_that_keeps_failing_is_made_retries_and_one_times(retries: Retries) -> None:
    outcome = retries.outcome(_request([_TRANSIENT] * 100))
    assert (outcome.attempts, type(outcome.error)) == (6, _Failed)


def test_a_final_failure_is_not_waited_for(retries: Retries, sleep: _Sleep) -> None:
    assert retries.outcome(_request([_FINAL])).attempts == 1
    assert sleep.seconds == []


def test_what_speaks_another_protocol_is_asked_three_times_in_a_row_and_quickly(
    retries: Retries, sleep: _Sleep
) -> None:
    outcome = retries.outcome(_request([_MISMATCH] * 100))
    assert (outcome.attempts, outcome.lost, type(outcome.error)) == (3, True, _Failed)
    assert max(sleep.seconds) <= 1.0
    assert retries.outcome(_request([_MISMATCH, _MISMATCH])).value == "done"
    mixed = [_MISMATCH, _MISMATCH, _TRANSIENT, _MISMATCH, _MISMATCH]
    assert retries.outcome(_request(mixed)).value == "done"


def test_what_an_error_was_raised_from_stays_when_it_is_raised_again(retries: Retries) -> None:
    """An exception that is raised while another is handled has that one as its context."""

    def act() -> None:
        try:
            raise ConnectionRefusedError
        except OSError:
            raise _Failed(_FINAL)  # noqa: B904 - as the clients do

    outcome = retries.outcome(act)
    try:
        raise KeyError
    except KeyError:
        with pytest.raises(_Failed) as caught:
            outcome.result()
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)


def test_an_interrupt_goes_through_at_once(retries: Retries) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retries.outcome(interrupted)
    assert retries.outcome(_request([])).value == "done"


def test_waits_are_random_below_a_bound_that_doubles(sleep: _Sleep) -> None:
    retries = Retries(_judge, Throttle(1), "somewhere", retries=10, seconds=1000.0, sleep=sleep)
    for _ in range(50):
        retries.outcome(_request([_TRANSIENT] * 10))
    for index in range(10):
        waits, bound = sleep.seconds[index::10], min(10.0, 0.1 * 2**index)
        assert bound / 2 < max(waits) <= bound
        assert min(waits) < bound / 4  # full jitter: from nothing on


@pytest.mark.parametrize(("after", "least"), [(0.0, 0.0), (7.0, 7.0), (10_000.0, 30.0)])
def test_the_stores_own_word_is_heeded_up_to_half_a_minute(
    retries: Retries, sleep: _Sleep, after: float, least: float
) -> None:
    retries.outcome(_request([Judgement(Verdict.SLOW_DOWN, after=after)]))
    assert least <= sleep.seconds[0] <= least + 0.1


def test_no_attempt_begins_after_the_budget_of_seconds(sleep: _Sleep) -> None:
    retries = Retries(_judge, Throttle(1), "somewhere", retries=1000, seconds=20.0, sleep=sleep)
    asked = [Judgement(Verdict.TRANSIENT, after=30.0)] * 5
    assert retries.outcome(_request(asked)).attempts == 1  # the wait alone would pass it
    assert retries.outcome(_request(asked), seconds=1000.0).attempts == 6


def test_waiting_for_other_threads_is_not_counted_against_the_budget(
    sleep: _Sleep,
) -> None:
    now = 0.0

    class SlowPace(Throttle):
        def admitted(self) -> Any:
            nonlocal now
            now += 100.0
            return super().admitted()

    retries = Retries(
        _judge, SlowPace(1), "somewhere", retries=5, seconds=15.0, sleep=sleep, clock=lambda: now
    )
    assert retries.outcome(_request([_TRANSIENT] * 3)).attempts == 4


def test_where_nothing_has_ever_answered_three_attempts_are_made(retries: Retries) -> None:
    assert retries.outcome(_request([_REFUSED] * 100)).attempts == 3
    assert retries.outcome(_request([_LOST, _REFUSED, _REFUSED, _REFUSED])).attempts == 3


@pytest.mark.parametrize("answer", [[], [_FINAL], [_TRANSIENT]])
def test_where_something_has_answered_once_all_attempts_are_made(
    retries: Retries, answer: list[Judgement]
) -> None:
    retries.outcome(_request(answer))
    assert retries.outcome(_request([_REFUSED] * 100)).attempts == 6
    other = Retries(_judge, Throttle(1), retries.place, retries=4, seconds=1000.0, sleep=_Sleep())
    assert other.outcome(_request([_REFUSED] * 100)).attempts == 5  # for every store on that server


def test_credentials_are_renewed_at_most_twice_and_not_at_the_cost_of_retries(sleep: _Sleep) -> None:
    renewed: list[bool] = []

    def renew() -> bool:
        renewed.append(True)
        return True

    retries = Retries(_judge, Throttle(1), "somewhere", retries=0, seconds=1000.0, sleep=sleep)
    assert retries.outcome(_request([_RENEW]), renew=renew).result() == "done"
    assert sleep.seconds == [0.0]
    outcome = retries.outcome(_request([_RENEW] * 100), renew=renew)
    assert (outcome.attempts, len(renewed)) == (3, 1 + 2)
    assert retries.outcome(_request([_RENEW]), renew=lambda: False).attempts == 1


def test_a_renewal_that_fails_is_what_the_request_fails_with(retries: Retries) -> None:
    def renew() -> bool:
        raise IntegrityError("no such profile")

    assert isinstance(retries.outcome(_request([_RENEW]), renew=renew).error, IntegrityError)


def _succeed(pace: Throttle, times: int) -> None:
    for _ in range(times):
        with pace.admitted():
            pass
        pace.succeeded()


def test_the_pace_is_halved_once_for_all_requests_that_were_in_flight() -> None:
    pace = Throttle(8)
    barrier = threading.Barrier(8)

    def throttled(_: int) -> None:
        with pace.admitted() as events:
            barrier.wait(10)
            pace.throttled(events)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(throttled, range(8)))
    assert pace.limit == 4
    with pace.admitted() as events:
        pace.throttled(events)
    assert pace.limit == 2


@pytest.mark.parametrize(("in_flight", "limit"), [(1, 4), (8, 4), (32, 16), (64, 32)])
def test_what_was_in_flight_is_halved_where_the_limit_is_far_above(in_flight: int, limit: int) -> None:
    pace = Throttle(64)
    with contextlib.ExitStack() as others:
        for _ in range(in_flight - 1):
            others.enter_context(pace.admitted())
        with pace.admitted() as events:
            pace.throttled(events)
    assert pace.limit == limit


def test_the_pace_never_falls_below_one_and_comes_back_with_success() -> None:
    pace = Throttle(8)
    for _ in range(10):
        with pace.admitted() as events:
            pace.throttled(events)
    assert pace.limit == 1
    limits = []
    for _ in range(1000):
        _succeed(pace, 1)
        limits.append(pace.limit)
    assert limits == sorted(limits)
    assert (limits[6], limits[-1]) == (1, 8)


def test_no_more_requests_are_let_in_than_the_pace_allows() -> None:
    pace, lock = Throttle(8), threading.Lock()
    for _ in range(2):
        with pace.admitted() as events:
            pace.throttled(events)
    assert pace.limit == 2
    in_flight, most = 0, 0

    def act(_: int) -> None:
        nonlocal in_flight, most
        with pace.admitted():
            with lock:
                in_flight += 1
                most = max(most, in_flight)
            with lock:
                in_flight -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(act, range(500)))
    assert 1 <= most <= 2


def test_all_threads_of_a_store_slow_down_when_one_is_told_to(retries: Retries) -> None:
    retries.outcome(_request([_SLOW_DOWN, _TRANSIENT]))
    assert retries.pace.limit == 4


def test_retry_after_is_read_as_seconds_or_as_a_date() -> None:
    assert seconds_after(None) is None
    assert seconds_after("soon") is None
    assert seconds_after("-1") is None
    assert seconds_after(" 120 ") == 120.0
    assert seconds_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    later = seconds_after(format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True))
    assert later is not None
    assert 50.0 < later <= 60.0


def _answer(status: int, code: str = "", operation: str = "PutObject", **headers: str) -> boto.ClientError:
    metadata: Any = {"HTTPStatusCode": status, "HTTPHeaders": headers}
    return boto.ClientError({"Error": {"Code": code}, "ResponseMetadata": metadata}, operation)


_URL = {"endpoint_url": "http://127.0.0.1:1"}
_MEANINGS: list[tuple[Exception, Judgement]] = [
    (_answer(503, "SlowDown", **{"retry-after": "3"}), Judgement(Verdict.SLOW_DOWN, after=3.0)),
    (_answer(200, "SlowDown"), _SLOW_DOWN),
    (_answer(429), _SLOW_DOWN),
    (_answer(500, "InternalError"), _TRANSIENT),
    (_answer(502), _LOST),
    (_answer(504), _LOST),
    (_answer(507), _TRANSIENT),
    (_answer(409, "OperationAborted"), _TRANSIENT),
    (_answer(409, "BucketNotEmpty"), _FINAL),
    (_answer(400, "RequestTimeout"), _TRANSIENT),
    (_answer(400, "ExpiredToken"), _RENEW),
    (_answer(403, "RequestExpired"), _RENEW),
    (_answer(400, "400", "HeadObject"), _RENEW),
    (_answer(400, "400"), _FINAL),
    (_answer(403, "SignatureDoesNotMatch"), _FINAL),
    (_answer(501, "NotImplemented"), _FINAL),
    (boto.EndpointConnectionError(**_URL), _REFUSED),
    (boto.ConnectTimeoutError(**_URL), _REFUSED),
    (boto.SSLError(error=OSError(), **_URL), Judgement(Verdict.UNREACHABLE, Reply.LOST)),
    (boto.ReadTimeoutError(**_URL), _LOST),
    (boto.ConnectionClosedError(**_URL), _LOST),
    (TimeoutError(), _LOST),
    (ConnectionResetError(), _LOST),
    (boto.NoCredentialsError(), Judgement(Verdict.FINAL, Reply.NEVER_ASKED)),
    (ValueError(), Judgement(Verdict.FINAL, Reply.NEVER_ASKED)),
]


@pytest.mark.parametrize(("error", "meaning"), _MEANINGS, ids=itertools.count())
def test_what_a_failure_of_s3_means(error: Exception, meaning: Judgement) -> None:
    assert judge(error) == meaning
    if isinstance(error, boto.ClientError):  # s3fs wraps an answer into an error of Python's
        wrapped, again = OSError("by s3fs"), TimeoutError("by fsspec")
        wrapped.__cause__, again.__cause__ = error, wrapped
        assert (judge(wrapped), judge(again)) == (meaning, meaning)


_DATA = bytes(range(256)) * 40


def _parts(algorithm: str, *cuts: int) -> list[Part]:
    ends = [0, *cuts, len(_DATA)]
    pieces = [_DATA[start:end] for start, end in itertools.pairwise(ends)]
    of = functools.partial(given_or_of, algorithm, None)
    return [
        Part(number, len(piece), "", of([memoryview(piece)]))
        for number, piece in reversed(list(enumerate(pieces, 1)))
    ]


@pytest.mark.parametrize("algorithm", ["crc64nvme", "crc32c"])
@pytest.mark.parametrize("cuts", [(), (1,), (1000, 1000, 5000), (len(_DATA),)])
def test_checksums_of_parts_combine_into_that_of_the_whole(algorithm: str, cuts: tuple[int, ...]) -> None:
    assert combined(_parts(algorithm, *cuts)) == ALGORITHMS[algorithm].text(ALGORITHMS[algorithm].of(_DATA))


def test_parts_without_one_algorithm_combine_into_nothing() -> None:
    mixed = [*_parts("crc64nvme", 10)[:1], *_parts("crc32c", 10)[1:]]
    assert combined(mixed) is None
    assert combined([Part(1, 3)]) is None
    assert combined([*_parts("crc32c"), Part(2, 3)]) is None
    assert combined([]) is None


@pytest.mark.parametrize("algorithm", ["crc64nvme", "crc32c"])
def test_only_a_wrong_checksum_of_the_whole_object_contradicts_its_parts(algorithm: str) -> None:
    parts, name = _parts(algorithm, 5000), f"Checksum{algorithm.upper()}"
    right = ALGORITHMS[algorithm].text(ALGORITHMS[algorithm].of(_DATA)).partition(":")[2]
    wrong = given_or_of(algorithm, None, [memoryview(b"other")]).partition(":")[2]
    full = {"ChecksumType": "FULL_OBJECT"}
    says_nothing: list[dict[str, str]] = [
        {},
        full,
        {**full, name: right},
        {**full, name: f"{wrong}-2"},
        {**full, name: "not base64"},
        {**full, name: "AAA="},
        {**full, "ChecksumSHA256": wrong},
        {"ChecksumType": "COMPOSITE", name: wrong},
        {name: wrong},
    ]
    for answer in says_nothing:
        assert contradicted(answer, parts) is None, answer
    said = contradicted({**full, name: wrong}, parts)
    assert said is not None
    assert wrong in said
    assert right in said
    assert contradicted({**full, name: wrong}, [Part(1, 3)]) is None
