"""Bounds that save ranking: the last running job is found, and no job is ranked in vain."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demand.simulation.bounded_ranks import BoundedRanks, threshold


@dataclass(eq=False)
class Running:
    """A job that stands at `truly`, of which a simulator may know a bound or the place."""

    truly: tuple
    bound: tuple | None = None
    exact: bool = False
    place: tuple = field(default=(float("nan"), 0))


@st.composite
def running_jobs(draw):
    ranks = draw(st.lists(st.integers(0, 9), min_size=0, max_size=8))
    jobs = []
    for index, rank in enumerate(ranks):
        job = Running((rank, index))
        known = draw(st.sampled_from(["nothing", "bound", "place"]))
        if known == "place":
            job.place = job.bound = job.truly
            job.exact = True
        elif known == "bound":
            job.bound = (rank + draw(st.sampled_from([0.0, 0.5, 4.0])), index)
        jobs.append(job)
    return jobs


@given(jobs=running_jobs(), place=st.tuples(st.integers(0, 9), st.just(99)))
def test_the_last_is_found_and_those_that_surely_go_before_it_are_not_ranked(jobs, place):
    ranked = []

    def rank(job, now):
        assert not job.exact, "ranked twice"
        job.place = job.bound = job.truly
        job.exact = True
        ranked.append(job)

    bounds = {job: job.bound for job in jobs}
    candidates = [job for job in jobs if job.bound is None or job.bound > place]
    last = BoundedRanks(rank).last_after(candidates, place, now=0.0)
    expected = max((job for job in jobs if job.truly > place), key=lambda j: j.truly, default=None)
    assert last is expected
    for job in ranked:
        surely_before = bounds[job] is not None and last is not None and bounds[job] < last.place
        assert not surely_before


@pytest.mark.parametrize(
    ("rank", "index", "best", "best_index", "halfway", "expected"),
    [
        (1.0, 0, 3.0, 1, True, 2.0),
        (1.0, 0, 3.0, 1, False, 3.0),  # arrived first: goes first at equal rank
        (1.0, 2, 3.0, 1, False, 2.9999999999999996),
        (3.0, 0, 3.0, 1, True, 3.0),
        ((0, 1.0), 0, (0, 3.0), 1, True, (0, 2.0)),
        ((0, 1.0), 0, (1, 3.0), 1, True, (0, float("inf"))),  # to the end of its class
        ((0, 1.0), 2, (0, 3.0), 1, False, (0, 2.9999999999999996)),
    ],
)
def test_the_threshold_is_halfway_to_the_best_waiting_or_just_before_it(
    rank, index, best, best_index, halfway, expected
):
    assert threshold(rank, index, best, best_index, halfway) == expected
