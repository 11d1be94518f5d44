import pytest

from demand import (
    NEVER_SEEN,
    DemandError,
    Distribution,
    Execution,
    Gittins,
    Job,
    PDGraph,
    Progress,
    RankTable,
    Unit,
    Workload,
    simulate,
)
from demand.refine import CurrentUnit, NearestRuns, NoRefinement
from demand.refine.estimator import DemandEstimator, unseen

WORK, ASK = Unit("work", "tool"), Unit("ask", "human")


def worked(*seconds):
    return [Execution(WORK, seconds=float(s)) for s in seconds]


def graph():
    return PDGraph.fit([worked(1, 2), worked(3, 4), worked(5)], name="known")


def test_it_asks_the_refinement_of_the_application():
    estimator = DemandEstimator({"known": graph()}, NearestRuns(k=2))
    progress = Progress(worked(1))
    assert estimator("known", progress) == NearestRuns(k=2).remaining(graph(), progress)
    assert estimator("known") == NearestRuns(k=2).remaining(graph())
    assert not estimator.fallbacks


def test_an_application_never_seen_is_ranked_by_attained_service_and_said_so():
    estimator = DemandEstimator({"known": graph(), "empty": PDGraph()})
    assert estimator("empty") == unseen()
    assert estimator.fallbacks.pop(("empty", "application")) == 1
    ranks = []
    for attained in (0.0, 1.0, 10.0, 100.0):
        progress = Progress(current="work", attained_seconds=attained) if attained else Progress()
        ranks.append(RankTable(estimator("new", progress)).at(0.0))
    assert ranks == sorted(ranks)
    assert all(a / 2 < rank <= a for rank, a in zip(ranks[1:], (1, 10, 100), strict=True))
    assert ranks[0] > 0.0
    assert estimator.fallbacks == {("new", "application"): 4}


def test_what_is_known_of_an_unseen_application_ages_as_it_is_served():
    table = RankTable(unseen())
    assert all(age / 2 < table.at(age) <= age for age in (0.001, 1.0, 3.0, 1e5))


def test_a_unit_never_seen_leaves_the_units_out_of_account():
    estimator = DemandEstimator({"known": graph()}, CurrentUnit())
    asked = [*worked(1), Execution(ASK, seconds=0.5)]
    expected = NoRefinement().remaining(graph(), Progress(asked))
    assert estimator("known", Progress(asked)) == expected
    assert estimator("known", Progress(worked(1), "ask", 0.5)) == expected
    assert estimator.fallbacks == {("known", "unit"): 2}


def test_it_learns():
    estimator = DemandEstimator({"known": graph()}, CurrentUnit())
    before = estimator("known")
    estimator.observe("known", worked(100, 100))
    assert estimator("known").values.max() > before.values.max()
    estimator.observe("new", worked(7))
    assert estimator("new").values.tolist() == [7.0]
    assert not estimator.fallbacks
    with pytest.raises(DemandError, match="run is empty"):
        estimator.observe("other", [])
    assert "other" not in estimator.graphs


def test_it_counts_the_critical_path():
    calls = Execution(WORK, parallelism=4, seconds=2.0, longest_seconds=5.0)
    estimator = DemandEstimator({"fan": PDGraph.fit([[calls]])}, parallel_calls="critical_path")
    assert estimator("fan").values.tolist() == [5.0]
    progress = Progress([calls])
    assert 2.5 < estimator("new", progress).mean() <= 5.0


def test_refinement_beyond_all_samples_leaves_the_rank_to_attained_service():
    """Twenty units of ten seconds, of which no run was ever seen: each end tells nothing."""
    unit = Unit("step", "tool")
    runs = [[Execution(unit, seconds=10.0)] * 20, [Execution(unit, seconds=6.0)]]
    workload = Workload([0.0, 100.0], [200.0, 6.0], ["new", "new"], {"new": NEVER_SEEN}, runs=runs)
    estimator = DemandEstimator({})
    told = simulate(workload, Gittins(), estimator=estimator)
    assert told.completion_times.tolist() == simulate(workload, Gittins()).completion_times.tolist()
    assert told.completion_times[1] == 6.0  # the newcomer has attained less at every moment
    assert estimator.fallbacks["new", "application"] > 0


def test_a_job_does_not_look_nearly_done_as_it_is_served_beyond_all_samples():
    known = Distribution([1.0])
    job = Job(0, "a", 0.0, known, attained_service=1.0, table=RankTable(known))
    assert known.condition(1.0).gittins(0.999) == pytest.approx(0.001)  # the trap
    job.expect(known.condition(1.0), RankTable(known.condition(1.0)))
    job.attained_service = 1.999
    assert Gittins().rank(job, 0.0) == known.gittins(1.999) == 1.0
