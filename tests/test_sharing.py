"""What several ranks are about to read is read by one of them, and nothing more often than before."""

from __future__ import annotations

from collections import Counter, defaultdict

from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.backends.load.read_assignment import Offer, tasks_of
from cloudckpt.backends.transfer.byte_ranges import GAP

_MIB = 1 << 20
ranges = st.builds(lambda start, size: (start, start + size), st.integers(0, 400_000), st.integers(1, 90_000))
offers = st.dictionaries(
    st.integers(0, 4),
    st.builds(
        Offer,
        st.dictionaries(st.sampled_from(["a", "b"]), st.lists(ranges, max_size=12, unique=True)),
        st.integers(0, _MIB),
        st.integers(1, 200_000),
    ),
    min_size=1,
)


@given(offers=offers)
def test_every_range_that_several_offer_is_in_one_task_of_theirs(offers: dict[int, Offer]) -> None:
    wanted: defaultdict[tuple[str, tuple[int, int]], set[int]] = defaultdict(set)
    for rank, offer in offers.items():
        for name, its in offer.ranges.items():
            for one in its:
                wanted[name, one].add(rank)
    tasks = tasks_of(offers)
    found = Counter((task.name, one) for task in tasks for one in task.ranges)
    assert found == {key: 1 for key, ranks in wanted.items() if len(ranks) > 1}
    for task in tasks:
        assert task.reader in task.ranks
        assert all(wanted[task.name, one] == set(task.ranks) for one in task.ranges)


@given(offers=offers)
def test_a_task_is_one_request(offers: dict[int, Offer]) -> None:
    most = min(offer.most for offer in offers.values())
    for task in tasks_of(offers):
        for (_, end), (start, _) in zip(task.ranges, task.ranges[1:], strict=False):
            assert end <= start <= end + GAP
        assert len(task.ranges) == 1 or task.ranges[-1][1] - task.ranges[0][0] <= most


def test_reading_is_shared_out_by_bytes() -> None:
    pieces = [(at * 8 * _MIB, (at + 1) * 8 * _MIB) for at in range(12)]
    offer = Offer({"a": pieces}, 0, 8 * _MIB)
    tasks = tasks_of(dict.fromkeys(range(4), offer))
    assert Counter(task.reader for task in tasks) == dict.fromkeys(range(4), 3)


def test_a_rank_that_reads_much_for_itself_reads_less_for_others() -> None:
    pieces = [(at * _MIB, (at + 1) * _MIB) for at in range(16)]
    offers = {0: Offer({"a": pieces}, 100 * _MIB, _MIB), 1: Offer({"a": pieces}, 0, _MIB)}
    assert {task.reader for task in tasks_of(offers)} == {1}


def test_one_rank_alone_shares_nothing() -> None:
    assert tasks_of({3: Offer({"a": [(0, 5), (5, 9)]}, 0, _MIB)}) == []
