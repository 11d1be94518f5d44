"""Totals drawn once for all questions: against the exact distribution, found by enumeration."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demand import DemandError, Distribution, Execution, PDGraph, Progress, Unit
from demand.graph.walk_table import WalkTable
from demand.refine import CurrentUnit

UNITS = [Unit(name, "tool") for name in "abc"]


def took(name, seconds):
    return Execution(UNITS["abc".index(name)], seconds=float(seconds))


def enumerated(arrays, first):
    """Every total with its probability: all walks side by side, until none is worth mentioning."""
    weights = np.full(first.seconds.size, 1.0) if first.weights is None else first.weights
    at: dict[tuple[int, float], float] = {}
    for seconds, node, weight in zip(first.seconds, first.successors, weights, strict=True):
        place = int(node), float(seconds)
        at[place] = at.get(place, 0.0) + weight / weights.sum()
    done: dict[float, float] = {}
    while at:
        going: dict[tuple[int, float], float] = {}
        for (node, total), mass in at.items():
            if node == 0:
                done[total] = done.get(total, 0.0) + mass
                continue
            own = slice(arrays.offsets[node], arrays.offsets[node + 1])
            size = own.stop - own.start
            shares = np.full(size, 1 / size) if arrays.weights is None else arrays.weights[own]
            for seconds, after, share in zip(
                arrays.seconds[own], arrays.successors[own], shares, strict=True
            ):
                if mass * share > 1e-13:
                    place = int(after), total + float(seconds)
                    going[place] = going.get(place, 0.0) + mass * share
        at = going
    values = np.array(sorted(done))
    return values, np.array([done[value] for value in values])


ROUNDING = 1e-9
"""Seconds by which sums of some numbers in two orders may differ here."""


def furthest(answer, values, masses):
    """Largest difference of the two distribution functions, but for the rounding of the sums.

    An atom that stands a unit in the last place beside its own is no difference in probability: so
    the smaller of the two is asked a little beyond the place where the greater one is.
    """
    exact, found = (
        (values, np.append(0.0, np.cumsum(masses))),
        (
            answer.values,
            np.append(0.0, np.cumsum(answer.weights)),
        ),
    )
    points = np.union1d(values, answer.values)

    def at(function, places):
        return function[1][np.searchsorted(function[0], places, "right")]

    return max(
        (at(one, points) - at(other, points + ROUNDING)).max()
        for one, other in ((exact, found), (found, exact))
    )


def bound(walks, probability):
    return math.sqrt(math.log(2 / probability) / (2 * walks))


ten = st.lists(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 6)), min_size=1, max_size=3),
    min_size=1,
    max_size=5,
)


@settings(max_examples=40, deadline=None)
@given(ten, st.integers(0, 5), st.sampled_from([None, 2.0]), st.integers(0, 99))
def test_every_answer_is_within_the_bound_of_the_exact_distribution(drawn, age, half_life, seed):
    """Before the first unit, between units and in mid-unit, at a probability of 1e-9 to fail."""
    runs = [[took(*one) for one in run] for run in drawn]
    graph = PDGraph.fit(runs, half_life_runs=half_life)
    arrays = graph.walk_arrays()
    for progress in (
        Progress(),
        Progress(runs[0][:1]),
        Progress(current=drawn[0][0][0], attained_seconds=float(age)),
        Progress(runs[-1][:1], current=drawn[0][0][0], attained_seconds=age + 0.5),
    ):
        values, masses = enumerated(arrays, arrays.first_draws(progress, "sum"))
        answer = graph.remaining(progress, walks=5000, seed=seed)
        assert furthest(answer, values, masses) <= bound(5000, 1e-9) + 1e-6
        spread = math.sqrt(max(masses @ values**2 - (masses @ values) ** 2, 0.0))
        mean = answer.values @ answer.weights
        assert abs(mean - masses @ values) <= 7 * spread / math.sqrt(5000) + 1e-6


def test_a_second_visit_is_no_other_than_the_first():
    """From `a` on half of the walks go round once more, each time: the total is geometric.

    Beyond its samples the unit has 0.27 s left, to which 1 is added in other orders by the table.
    """
    graph = PDGraph.fit([[took("a", 0), took("b", 1), took("a", 0)]])
    progress = Progress([took("a", 0)], current="a", attained_seconds=0.5)
    answer = graph.remaining(progress, walks=5000)
    left = float(graph.walk_arrays().unfinished(2, 0.5).seconds[0])
    rounds = np.arange(40)
    values, masses = left + rounds, 0.5 ** (rounds + 1.0)
    assert furthest(answer, values, masses) <= bound(5000, 1e-9)


def test_what_is_off_by_more_than_rounding_is_seen():
    answer = Distribution([1.0, 2.0])
    assert furthest(answer, np.array([1.0, 2.0]), np.array([0.5, 0.5])) == 0.0
    assert furthest(answer, np.array([1.0 + 1e-13, 2.0]), np.array([0.5, 0.5])) == 0.0
    assert furthest(answer, np.array([1.001, 2.0]), np.array([0.5, 0.5])) == 0.5
    assert furthest(answer, np.array([1.0, 2.0]), np.array([0.3, 0.7])) == pytest.approx(0.2)


def loops():
    """From each unit there is a way back; totals have a long tail."""
    return PDGraph.fit(
        [[took("a", 1), took("b", 4), took("a", 3), took("c", 2)], [took("a", 2), took("c", 9)],
         [took("b", 1), took("b", 2), took("b", 7)], [took("c", 1), took("a", 5)]]
    )  # fmt: skip


def test_the_bound_fails_as_rarely_as_it_says_and_the_mean_has_its_standard_error():
    graph, walks, seeds = loops(), 150, 400
    arrays = graph.walk_arrays()
    progress = Progress([took("a", 3)], current="b", attained_seconds=1.5)
    first = arrays.first_draws(progress, "sum")
    values, masses = enumerated(arrays, first)
    mean = masses @ values
    spread = math.sqrt(masses @ values**2 - mean**2)
    off, means = [], []
    for seed in range(seeds):
        answer = graph.remaining(progress, walks=walks, seed=seed)
        off.append(furthest(answer, values, masses))
        means.append(answer.values @ answer.weights)
    for probability in (0.5, 0.05):
        failed = np.mean(np.array(off) > bound(walks, probability))
        assert failed <= probability + 4 * math.sqrt(probability / seeds)
    assert np.mean(means) == pytest.approx(mean, abs=4 * spread / math.sqrt(walks * seeds))
    assert np.std(means) == pytest.approx(spread / math.sqrt(walks), rel=0.15)


def test_walks_ahead_are_drawn_once_and_only_where_needed():
    arrays = loops().walk_arrays()
    table = WalkTable(arrays, 50, 3, 1000)
    node = arrays.nodes["b"]
    rest = table.rest(node)
    assert rest is table.rest(node)
    assert set(table._rest) == {arrays.nodes["end"], node}
    assert table.rest(arrays.nodes["a"]).tolist() != rest.tolist()
    again = WalkTable(arrays, 50, 3, 1000)
    assert again.rest(node).tolist() == rest.tolist()
    assert WalkTable(arrays, 50, 4, 1000).rest(node).tolist() != rest.tolist()


def test_answers_in_any_order_are_the_same():
    asked = [Progress(current=name, attained_seconds=0.5) for name in "abc"]
    refined = CurrentUnit().fit(loops())
    forth = [refined.remaining(progress) for progress in asked]
    refined = CurrentUnit().fit(loops())
    back = [refined.remaining(progress) for progress in reversed(asked)]
    assert forth == back[::-1]
    assert forth == [loops().remaining(progress) for progress in asked]


def test_a_walk_that_does_not_end_is_given_up():
    graph = loops()
    with pytest.raises(DemandError, match="walks are not over after 1 units"):
        graph.remaining(Progress(current="a", attained_seconds=0.5), max_units=1)
    with pytest.raises(DemandError, match="walks are not over after 0 units"):
        graph.remaining(max_units=0)
