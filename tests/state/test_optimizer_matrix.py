"""Training resumed in a fresh process equals undisturbed training to the last bit; saving changes nothing.

One job saves every combination of an optimizer, a point in time and an event. Another job, of fresh
processes, resumes each. Under FSDP2 the short form takes each optimizer with each event at one point.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support.optimizer_runs import run
from support.optimizers import (
    COMBINATIONS,
    KINDS,
    LAYOUTS,
    RESTORED,
    Combination,
    Layout,
    Results,
    Saver,
    cannot,
    table,
)

pytestmark = pytest.mark.timeout(1800)

ResultsOf = Callable[[Layout, Saver, str], Results]

one_rank: Layout = "one rank"
two_ranks: Layout = "FSDP2 on two"
FORMS: dict[str, list[Combination]] = {
    "short": [one for one in COMBINATIONS if one.short],
    "long": COMBINATIONS,
}
each_optimizer = pytest.mark.parametrize("optimizer", KINDS)
by_form = pytest.mark.parametrize(
    ("layout", "form"),
    [
        pytest.param(one_rank, "long", id="one rank"),
        pytest.param(two_ranks, "short", id="FSDP2"),
        pytest.param(two_ranks, "long", id="FSDP2, long", marks=pytest.mark.soak),
    ],
)


@pytest.fixture(scope="session")
def results_of(tmp_path_factory: pytest.TempPathFactory) -> ResultsOf:
    """Run a matrix once, when its results are first asked for."""
    known: dict[tuple[Layout, Saver, str], Results] = {}

    def get(layout: Layout, saver: Saver, form: str) -> Results:
        key = (layout, saver, form)
        if key not in known:
            known[key] = run(tmp_path_factory.mktemp("matrix"), layout, FORMS[form], saver)
        return known[key]

    return get


def told(layout: Layout, results: Results) -> list[str]:
    """Return a line for each combination that was not restored, but for what torch itself can't train."""
    return [
        f"{one.name}: {outcome}"
        for one, outcome in results.items()
        if outcome != RESTORED and cannot(layout, one) is None
    ]


@by_form
@each_optimizer
def test_a_resumed_run_equals_an_undisturbed_one(
    layout: Layout, form: str, optimizer: str, results_of: ResultsOf
) -> None:
    results = results_of(layout, "cloudckpt", form)
    own = {one: outcome for one, outcome in results.items() if one.optimizer == optimizer}

    assert own
    assert told(layout, own) == []


@by_form
def test_what_torch_cannot_train_fails_with_its_own_error_and_no_checkpoint(
    layout: Layout, form: str, results_of: ResultsOf
) -> None:
    results = results_of(layout, "cloudckpt", form)
    wrong = {
        one.name: outcome
        for one, outcome in results.items()
        if (error := cannot(layout, one)) is not None
        and not (outcome.startswith("torch: ") and error in outcome)
    }

    assert wrong == {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_matrix_finds_nothing_wrong_with_torch_save(layout: Layout, results_of: ResultsOf) -> None:
    assert told(layout, results_of(layout, "torch.save", "short")) == []


def test_the_matrix_finds_out_a_saver_that_loses_the_optimizer(results_of: ResultsOf) -> None:
    results = results_of(one_rank, "weights alone", "short")

    # What is left is as it was: before the first step an optimizer has nothing to lose.
    unnoticed = {one for one, outcome in results.items() if outcome == RESTORED}
    assert {one.point for one in unnoticed} == {0}


def test_the_table_has_a_row_for_each_optimizer(results_of: ResultsOf) -> None:
    perfect: Results = dict.fromkeys(COMBINATIONS, RESTORED)
    lost = COMBINATIONS[0]

    rows = table({one_rank: {**perfect, lost: "diverged"}}).splitlines()[2:]

    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in KINDS]
    assert rows[0].split(" | ")[1] == "not before the first step"
