import numpy as np
import pytest

from demand import CostModel, DemandError, Execution, PDGraph, Progress, Unit
from demand.graph.given_units import GivenUnit

TRY, CHECK = Unit("try", "tool"), Unit("check", "search")


def seconds_of(unit, *seconds):
    return [Execution(unit, seconds=s) for s in seconds]


def given(unit, seconds, **successors):
    return GivenUnit(unit, seconds_of(unit, *seconds), successors)


def retrying(p_again=0.25):
    """1 or 3 s of try, then 10 s of check; back to try with p_again."""
    return PDGraph.from_units(
        [
            given(TRY, [1.0, 3.0], check=1.0),
            given(CHECK, [10.0], **{"try": p_again, "end": 1.0 - p_again}),
        ],
        {"try": 1.0},
        name="retrying",
    )


def test_given_probabilities_are_kept_exactly():
    graph = retrying()
    assert graph.branches("start") == {"try": 1.0}
    assert graph.branches("check") == {"end": 0.75, "try": 0.25}
    assert graph.units == (TRY, CHECK)
    assert [e.seconds for e in graph.samples("try")] == [1.0, 3.0]
    assert graph.runs == ()
    assert repr(graph) == "PDGraph('retrying', 2 units, given)"


def test_walks_follow_the_given_probabilities():
    """A geometric number of rounds of 12 s in the mean: 16 s."""
    remaining = retrying().remaining(walks=40_000)
    assert remaining.mean() == pytest.approx(16.0, rel=0.01)
    assert remaining.survival(13.0) == pytest.approx(0.25, abs=0.01)
    later = retrying().remaining(Progress(current="check", attained_seconds=4.0), walks=40_000)
    assert later.survival(6.0) == pytest.approx(0.25, abs=0.01)


def test_drawn_runs_follow_the_given_probabilities():
    runs = retrying().draw_runs(4000, seed=2)
    learned = PDGraph.fit(runs, window=4000)
    assert learned.branches("check")["try"] == pytest.approx(0.25, abs=0.03)
    assert np.mean([e.seconds == 1.0 for e in learned.samples("try")]) == pytest.approx(
        0.5, abs=0.03
    )
    assert all(run[0].unit == TRY and run[-1].unit == CHECK for run in runs)
    assert runs == retrying().draw_runs(4000, seed=2)


def test_round_trip(tmp_path):
    graph = retrying()
    graph.save(tmp_path / "graph.json")
    again = PDGraph.load(tmp_path / "graph.json")
    assert again.remaining() == graph.remaining()
    assert again.branches("check") == graph.branches("check")
    assert (again.name, again.units, again.cost) == ("retrying", graph.units, CostModel())


def test_entries_may_branch_and_zero_probabilities_are_no_branches():
    graph = PDGraph.from_units(
        [given(TRY, [1.0], end=1.0, check=0.0), given(CHECK, [10.0], end=1.0)],
        {"try": 0.5, "check": 0.5},
    )
    assert graph.branches("try") == {"end": 1.0}
    assert set(graph.remaining().values) == {1.0, 10.0}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: given(TRY, [1.0], end=0.9), "sum 0.9; expected 1"),
        (lambda: given(TRY, [1.0], end=1.0 + 1e-4), "probability 1.0001; expected 0 to 1"),
        (lambda: given(TRY, [1.0], end=1.5, check=-0.5), "probability 1.5"),
        (lambda: given(TRY, [1.0], end=np.nan), "probability nan"),
        (lambda: given(TRY, [1.0]), "sum 0; expected 1"),
        (lambda: given(TRY, [], end=1.0), "no executions"),
        (lambda: GivenUnit(TRY, seconds_of(CHECK, 1.0), {"end": 1.0}), "execution of Unit"),
        (lambda: PDGraph.from_units([], {}), "distinct names, at least one"),
        (
            lambda: PDGraph.from_units([given(TRY, [1.0], end=1.0)] * 2, {"try": 1.0}),
            "distinct names",
        ),
        (
            lambda: PDGraph.from_units([given(TRY, [1.0], end=1.0)], {"try": 0.5}),
            "entries have probabilities of sum 0.5",
        ),
        (
            lambda: PDGraph.from_units([given(TRY, [1.0], end=1.0)], {"end": 1.0}),
            "the start is followed by 'end', which is not a unit",
        ),
        (
            lambda: PDGraph.from_units([given(TRY, [1.0], gone=1.0)], {"try": 1.0}),
            "unit 'try' is followed by 'gone'",
        ),
        (lambda: retrying(p_again=1.0), "from .* the end cannot be reached"),
        (lambda: retrying().observe(seconds_of(TRY, 1.0)), "does not learn"),
        (lambda: retrying().columns(), "remembers no runs"),
        (lambda: retrying().remaining(Progress(current="gone")), "'gone' is not in the graph"),
        (lambda: retrying(p_again=0.999).draw_runs(9, max_units=3), "not over after 3 units"),
    ],
)
def test_bad_input_is_refused(make, says):
    with pytest.raises(DemandError, match=says):
        make()
