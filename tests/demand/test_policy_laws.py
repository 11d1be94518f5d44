"""What every policy promises, on drawn jobs and workloads: thresholds, bounds, fairness."""

import math
import sys
from dataclasses import dataclass, field, fields

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from demand import DemandError, Distribution, Workload, simulate
from demand.policies import (
    EDF,
    FCFS,
    LAS,
    MLFQ,
    NEVER_SEEN,
    SERPT,
    VTC,
    Aging,
    ClassMean,
    DeadlineMix,
    DecayingLAS,
    Gittins,
    Hysteresis,
    Job,
    LeastSlack,
    Oracle,
    Policy,
    PriorityClasses,
    TimeSlice,
    VirtualTime,
)
from demand.policies.exact_thresholds import (
    ROUNDING,
    greatest_addend,
    greatest_within,
    just_below,
)
from demand.policies.wrapper import Wrapper, hook
from tests.demand.policy_zoo import POLICIES, whole_second_workloads
from tests.demand.strategies import distributions
from tests.demand.twins import fair_shares, processor_sharing

by_name = pytest.mark.parametrize("policy", POLICIES, ids=str)


@dataclass(frozen=True)
class Spied(Wrapper):
    """The policy within; notes who was served from when to when."""

    service: list = field(default_factory=list)

    def rank(self, job, now):
        return self.policy.rank(job, now)

    def next_above(self, job, threshold):
        return self.policy.next_above(job, threshold)

    def served(self, job, seconds, now):
        self.service.append((job.index, now - seconds, now))
        self.policy.served(job, seconds, now)


@dataclass(frozen=True)
class Adversary(Wrapper):
    """Ranks as wild as they come, jumping at every second of service."""

    def rank(self, job, now):
        return math.tan(1e3 * job.lottery + 7.0 * math.floor(job.attained_service)) * 100.0

    def next_above(self, job, threshold):
        return math.floor(job.attained_service) + 1.0


@st.composite
def running_jobs(draw, policy, jobs=3):
    """A job that runs, somewhere in its life, among others of its scheduler."""
    known = draw(distributions())
    state = policy.new_state()
    seconds = st.floats(0.0, 60.0)
    present = []
    for index in range(jobs):
        job = Job(
            index,
            "a",
            draw(st.sampled_from([0.0, 0.1, 17.3])),
            known,
            demand=1000.0,
            table=policy.table(known),
            deadline=draw(st.one_of(st.just(math.inf), st.floats(20.0, 200.0))),
            tenant=draw(st.sampled_from("xy")),
            priority=draw(st.integers(0, 1)),
        )
        job.state = state
        present.append(job)
    present.sort(key=lambda job: job.arrival)
    for job in present:
        policy.arrived(job, job.arrival)
    for job in present:
        job.started_at = draw(st.one_of(st.just(0.0), seconds))
        job.attained_service = job.started_at + draw(st.one_of(st.just(0.0), seconds))
        policy.served(job, job.attained_service, 100.0)
        if draw(st.booleans()):
            job.known_at = draw(st.floats(0.0, 1.0)) * job.attained_service
    present[0].running = True
    return present


def largest_quantum(policy):
    """Seconds of the longest quantum in which `policy`, or one within it, counts service; or 0."""
    if isinstance(policy, LAS | LeastSlack | VTC | DecayingLAS):
        return policy.quantum
    if isinstance(policy, MLFQ):
        return policy.quantum * policy.ratio**policy.queues
    within = (getattr(policy, each.name) for each in fields(policy))
    return max((largest_quantum(p) for p in within if isinstance(p, Policy)), default=0.0)


def looks_early(policy):
    """Whether `policy`, or one within it, answers with the end of a quantum whatever follows it.

    What the rank is then depends on the clock, which `next_above` is not told.
    """
    within = (getattr(policy, each.name) for each in fields(policy))
    return isinstance(policy, DecayingLAS | MLFQ) or any(
        looks_early(p) for p in within if isinstance(p, Policy)
    )


@by_name
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_next_above_is_where_a_fine_scan_finds_it(policy, data):
    job, *others = data.draw(running_jobs(policy))
    rank = policy.rank(job, 100.0)
    thresholds = [rank, just_below(policy.rank(others[0], 100.0)), policy.rank(others[1], 100.0)]
    threshold = data.draw(st.sampled_from([t for t in thresholds if rank <= t]))
    answer = policy.next_above(job, threshold)
    assert answer > job.attained_service
    start, end = job.attained_service, min(answer, job.attained_service + 150.0)
    surely_within = answer - ROUNDING * largest_quantum(policy)
    for attained in np.linspace(start, end, 301)[1:-1].tolist():
        if attained >= surely_within:  # `linspace` rounds: its last points may be the answer itself
            break
        policy.served(job, attained - job.attained_service, 100.0)
        job.attained_service = attained
        assert policy.rank(job, 100.0) <= threshold
    if answer < math.inf:
        rank = policy.rank(job, 100.0)
        in_quantum = (rank[-1] if isinstance(rank, tuple) else rank) == -math.inf
        policy.served(job, answer - job.attained_service, 100.0)
        job.attained_service = answer
        assert policy.rank(job, 100.0) > threshold or in_quantum or looks_early(policy)


def test_a_quantum_ends_where_it_was_meant_to_and_counts_a_rounding_sooner():
    policy = DeadlineMix(LeastSlack(), FCFS())
    known = Distribution([2.0])
    job = Job(0, "a", 0.0, known, table=policy.table(known), deadline=20.0, attained_service=1.0)
    job.state, job.running, job.known_at = policy.new_state(), True, 4.720326360604159e-09
    assert policy.rank(job, 100.0) == (0, 18.0)
    end = policy.next_above(job, (0, 18.0))
    assert end == 1.0 + job.known_at
    for before, rank in ((2e-9, 18.0), (1.01e-9, 18.0), (0.99e-9, 19.0), (0.0, 19.0)):
        job.attained_service = end - before
        assert policy.rank(job, 100.0) == (0, rank)


def test_the_end_of_a_doubling_a_rounding_away_is_found():
    policy = TimeSlice(Gittins(), 3.0)
    known = Distribution([15.0])
    job = Job(0, "a", 0.0, known, table=policy.table(known), attained_service=59.99999999999999)
    job.running = True
    assert policy.rank(job, 100.0) == 30.0
    assert policy.next_above(job, 30.0) == 60.0 == math.nextafter(job.attained_service, 99.0)


@given(st.floats(0.0, 1e3), st.floats(0.0, 1e3))
@example(known_at=19.57579293984869, age=94.0)  # a tie, rounded up
@example(known_at=4.720326360604159e-09, age=1.0)
@example(known_at=0.1, age=0.2)
def test_the_service_that_reaches_an_age_is_the_least(known_at, age):
    job = Job(0, "a", 0.0, Distribution([1.0]))
    job.known_at = known_at
    reached = job.attained_at(age)
    assert reached - known_at >= age > math.nextafter(reached, -1.0) - known_at


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.sampled_from([1.0, 3.0, 1e-3, 1e3]))
def test_the_inverse_of_a_rounded_sum_is_exact(threshold, offset, scale):
    def function(x):
        return offset + x / scale

    x = greatest_within(function, threshold, (threshold - offset) * scale)
    assert function(x) <= threshold < function(math.nextafter(x, math.inf))


NUMBERS = st.one_of(st.floats(-1e9, 1e9), st.floats(-1.0, 1.0), st.integers(-99, 99).map(float))


@given(NUMBERS, NUMBERS, st.sampled_from([0.0, 1.0, 1e-9]))
def test_the_greatest_addend_is_exact(other, offset, near):
    """Also where the threshold is near the other addend, and where one swallows the other."""
    threshold = other + near * offset if near else offset
    x = greatest_addend(other, threshold)
    assert x + other <= threshold < math.nextafter(x, math.inf) + other
    assert x == greatest_within(lambda x: x + other, threshold, threshold - other)


@pytest.mark.parametrize("other", [0.0, 5.0, -5.0, 1e293, 1e300, -1e300, 1.7e308])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_greatest_addend_of_the_largest_numbers(other, sign):
    """`just_below(inf)` is such a threshold: a job with a deadline beside one without."""
    threshold = sign * sys.float_info.max
    x = greatest_addend(other, threshold)
    assert x + other <= threshold
    above = math.nextafter(x, math.inf)
    assert above == math.inf or above + other > threshold


def test_a_late_deadline_beside_none_is_served():
    known = {"a": Distribution([5.0])}
    workload = Workload([0, 1], [5, 5], "aa", known, deadlines=[math.inf, 1e300])
    assert simulate(workload, LeastSlack()).completion_times.tolist() == [10, 5]


@pytest.mark.parametrize("threshold", [-math.inf, math.inf])
def test_an_infinite_threshold_leaves_infinity_to_add(threshold):
    assert greatest_addend(5.0, threshold) == threshold


def test_just_below_reaches():
    for rank in (0.0, 3.5, math.inf, (0, 2.0), (1, 0, 5.0), (1, -math.inf), (2, 3, -math.inf)):
        below = just_below(rank)
        assert below < rank
        assert type(below) is type(rank)
    assert just_below((1, -math.inf)) == (math.nextafter(1, 0), math.inf)


RERANKING = [
    VTC(1.0),
    Aging(VTC(2.0), cap=200.0, rate=0.3),
    Hysteresis(VTC(2.0), 1.0),
    TimeSlice(VTC(1.0), 2.0),
    DeadlineMix(VTC(1.0), VTC(3.0)),
    DeadlineMix(EDF(), VTC(2.0)),
    PriorityClasses(VTC(2.0)),
]


@pytest.mark.parametrize("policy", RERANKING, ids=str)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_serving_a_job_moves_its_line_only_and_no_job_within_it(policy, data):
    served, *waiting = data.draw(running_jobs(policy, jobs=6))
    before = [policy.rank(job, 100.0) for job in waiting]
    policy.served(served, data.draw(st.floats(0.0, 20.0)), 100.0)
    after = [policy.rank(job, 100.0) for job in waiting]
    lines = [policy.line(job) for job in waiting]
    for line, rank, moved in zip(lines, before, after, strict=True):
        assert rank == moved or line == policy.line(served)
    for ranks in (before, after):
        for line in set(lines) - {None}:
            mine = [rank for own, rank in zip(lines, ranks, strict=True) if own == line]
            assert mine == sorted(mine)


@dataclass(frozen=True)
class Unnamed(Wrapper):
    """The policy within, promising nothing of lines."""

    def rank(self, job, now):
        return self.policy.rank(job, now)

    def next_above(self, job, threshold):
        return self.policy.next_above(job, threshold)


@pytest.mark.parametrize("policy", RERANKING, ids=str)
@pytest.mark.parametrize("servers", [1, 2, 3])
def test_ranking_the_first_of_each_line_is_ranking_everyone(policy, servers):
    rng = np.random.default_rng(7)
    n = 400
    workload = Workload(
        np.cumsum(rng.exponential(1.0 / servers, n)).round(1),
        rng.lognormal(-0.7, 1.0, n),
        ["a"] * n,
        {"a": Distribution([1.0])},
        tenants=rng.choice(["x", "y", "z"], n).tolist(),
        weights={"y": 2.0},
        deadlines=np.where(rng.random(n) < 0.5, np.inf, 1e3),
        priorities=rng.integers(2, size=n).tolist(),
    )
    result, expected = (simulate(workload, p, servers) for p in (policy, Unnamed(policy)))
    assert result.completion_times.tolist() == expected.completion_times.tolist()
    assert (result.events, result.preemptions) == (expected.events, expected.preemptions)
    assert result.preemptions > 10


@dataclass(frozen=True)
class ShortestOfTenant(Policy):
    """VTC with an order of its own within a tenant, which the line it names denies."""

    fair: Policy = field(default_factory=lambda: VTC(10.0))
    reranks = True

    def line(self, job):
        return self.fair.line(job)

    def new_state(self):
        return self.fair.new_state()

    def arrived(self, job, now):
        self.fair.arrived(job, now)

    def served(self, job, seconds, now):
        self.fair.served(job, seconds, now)

    def departed(self, job, now):
        self.fair.departed(job, now)

    def rank(self, job, now):
        return self.fair.rank(job, now) + 1e-3 * job.demand


def test_a_line_that_is_not_true_is_refused():
    known = {"a": Distribution([5.0])}
    workload = Workload([0, 1, 2, 3, 3], [5, 9, 3, 1, 4], "aaaaa", known, tenants="xxxxy")
    with pytest.raises(DemandError, match="arrived earlier in the same line 'x'"):
        simulate(workload, ShortestOfTenant())


def test_a_method_of_the_instance_is_told():
    class Spy(FCFS):
        def __init__(self):
            super().__init__()
            object.__setattr__(self, "served", lambda *what: seen.append(what))

    seen = []
    simulate(Workload([0, 1], [5, 5], "aa", {"a": Distribution([5.0])}), Spy())
    assert sum(seconds for _, seconds, _ in seen) == 10.0


def test_only_who_listens_is_told():
    spied, fair = Spied(Gittins()), VTC(1.0)
    assert hook(Hysteresis(Gittins(), 1.0), "served") is None
    assert hook(Hysteresis(spied, 1.0), "served") == spied.served
    assert hook(spied, "arrived") is None
    assert hook(PriorityClasses(Aging(fair, 5.0, 1.0)), "departed") == fair.departed


INNER = [Gittins(), SERPT(), LAS(1.0), Oracle(), VTC(1.0), Adversary(FCFS())]


@pytest.mark.parametrize("inner", INNER, ids=str)
@settings(max_examples=40, deadline=None)
@given(
    workload=whole_second_workloads(max_jobs=14),
    cap=st.floats(0.01, 50.0),
    bound=st.floats(0.5, 30.0),
)
def test_aging_bounds_who_may_overtake(inner, workload, cap, bound):
    policy = Spied(Aging(inner, cap=cap, rate=cap / bound))
    result = simulate(workload, policy)
    finish = workload.arrivals + result.completion_times
    for index, start, end in policy.service:
        waiting = (workload.arrivals < workload.arrivals[index] - bound - 1e-9) & (finish > start)
        assert end == start or not waiting.any()
    # One server: nobody waits longer than for the work there is, and that of `bound` more seconds.
    backlog = backlog_at_arrivals(workload)
    for i, arrival in enumerate(workload.arrivals):
        later = (np.arange(len(workload)) > i) & (workload.arrivals <= arrival + bound + 1e-9)
        assert result.completion_times[i] <= backlog[i] + workload.demands[later].sum() + 1e-9


def backlog_at_arrivals(workload):
    """Work present just after each arrival, its own included; the same for all busy orders."""
    free, backlog = 0.0, []
    for arrival, demand in zip(workload.arrivals, workload.demands, strict=True):
        free = max(free, arrival) + demand
        backlog.append(free - arrival)
    return backlog


@pytest.mark.parametrize("inner", INNER, ids=str)
@settings(max_examples=30, deadline=None)
@given(workload=whole_second_workloads(), seconds=st.integers(1, 8))
def test_a_quantum_bounds_preemptions(inner, workload, seconds):
    policy = Spied(TimeSlice(inner, float(seconds)))
    result = simulate(workload, policy)
    assert result.preemptions <= sum(d // seconds for d in workload.demands)
    for index in range(len(workload)):
        mine = [(start, end) for i, start, end in policy.service if i == index and end > start]
        stretches = []
        for start, end in mine:
            if stretches and stretches[-1][1] == start:
                stretches[-1][1] = end
            else:
                stretches.append([start, end])
        assert all(end - start >= seconds - 1e-9 for start, end in stretches[:-1])


@pytest.mark.parametrize("inner", INNER, ids=str)
@settings(max_examples=20, deadline=None)
@given(workload=whole_second_workloads())
def test_a_margin_beyond_all_ranks_preempts_nobody(inner, workload):
    assert simulate(workload, Hysteresis(inner, 1e9)).preemptions == 0


@settings(max_examples=100, deadline=None)
@given(workload=whole_second_workloads(max_jobs=14))
def test_under_virtual_time_no_job_finishes_later_than_if_all_shared(workload):
    """The theorem of the fair sojourn protocol: exact demands, one server, equal weights."""
    assume((workload.demands > 0).all())
    exact = Workload(
        workload.arrivals,
        workload.demands,
        [str(i) for i in range(len(workload))],
        {str(i): Distribution([d]) for i, d in enumerate(workload.demands)},
    )
    result = simulate(exact, VirtualTime())
    assert (result.completion_times <= processor_sharing(exact) + 1e-6).all()


@settings(max_examples=60, deadline=None)
@given(workload=whole_second_workloads())
def test_edf_meets_all_deadlines_that_any_order_meets(workload):
    assume(np.isfinite(workload.deadlines).any())
    timed = np.isfinite(workload.deadlines)
    only = Workload(
        workload.arrivals[timed],
        workload.demands[timed],
        np.array(workload.applications)[timed].tolist(),
        workload.distributions,
        deadlines=workload.deadlines[timed],
    )
    others = [FCFS(), Gittins(), Oracle(), LeastSlack(quantum=1.0)]
    if any(simulate(only, other).deadline_hits == 1.0 for other in others):
        assert simulate(only, EDF()).deadline_hits == 1.0


@dataclass(frozen=True)
class Gaps(Wrapper):
    """Notes how far the counters of present tenants are apart, whenever a job is served."""

    gaps: list = field(default_factory=list)

    def rank(self, job, now):
        return self.policy.rank(job, now)

    def next_above(self, job, threshold):
        return self.policy.next_above(job, threshold)

    def served(self, job, seconds, now):
        self.policy.served(job, seconds, now)
        counters = [job.state.counters[t] for t, jobs in job.state.present.items() if jobs]
        self.gaps.append(max(counters) - min(counters))


@settings(max_examples=60, deadline=None)
@given(
    workload=whole_second_workloads(max_jobs=14),
    quantum=st.sampled_from([0.5, 1.0, 3.0]),
    weight=st.sampled_from([1.0, 2.5]),
)
def test_counters_of_present_tenants_stay_within_a_quantum(workload, quantum, weight):
    weighted = Workload(
        workload.arrivals,
        workload.demands,
        workload.applications,
        workload.distributions,
        tenants=workload.tenants,
        weights={"x": weight},
    )
    policy = Gaps(VTC(quantum))
    simulate(weighted, policy)
    assert all(gap <= quantum * (1 + 1e-6) for gap in policy.gaps)


@pytest.mark.parametrize("servers", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_virtual_counters_equal_their_twin_on_any_number_of_servers(seed, servers):
    rng = np.random.default_rng(seed)
    workload = Workload(
        np.cumsum(rng.exponential(1.0 / servers, 60)),
        rng.lognormal(0.0, 1.0, 60),
        ["a"] * 60,
        {"a": Distribution([1.0])},
        tenants=rng.choice(["x", "y", "z"], 60).tolist(),
        weights={"y": 2.0},
    )
    expected = fair_shares(workload, 0.7, servers)
    result = simulate(workload, VTC(0.7), servers)
    np.testing.assert_allclose(result.completion_times, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("policy", [ClassMean(), SERPT(), Gittins()], ids=str)
def test_applications_never_seen_are_served_by_attained_service(policy):
    """Equal to least attained service in steps of doublings: short jobs overtake long ones."""
    workload = Workload([0.0, 0.0, 5.0], [40.0, 30.0, 1.0], "abb", dict.fromkeys("ab", NEVER_SEEN))
    result = simulate(workload, policy)
    assert result.completion_times[2] < 4.0
    assert result.preemptions > 10
    assert result.events < 300
