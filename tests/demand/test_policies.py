"""Every policy on jobs small enough to rank by hand."""

import math
import warnings

import pytest

from demand import DemandError, Distribution, RankTable
from demand.policies import (
    EDF,
    FCFS,
    LAS,
    NEVER_SEEN,
    SERPT,
    VTC,
    Aging,
    ClassMean,
    DeadlineMix,
    Gittins,
    Hysteresis,
    Job,
    LeastSlack,
    Oracle,
    Policy,
    PriorityClasses,
    RequestFCFS,
    TimeSlice,
    VirtualTime,
    known_of,
)


def job_of(policy, index=0, values=(1.0, 10.0), state=None, attained=0.0, **fields):
    known = Distribution(values)
    job = Job(index, "a", fields.pop("arrival", 0.0), known, table=policy.table(known), **fields)
    job.state = policy.new_state() if state is None else state
    job.attained_service = attained
    return job


def test_request_fcfs_goes_by_the_present_request():
    job = job_of(RequestFCFS(), arrival=3.0)
    assert RequestFCFS().rank(job, 9.0) == FCFS().rank(job, 9.0) == 3.0
    job.requested = 7.0
    assert RequestFCFS().rank(job, 9.0) == 7.0
    assert FCFS().rank(job, 9.0) == 3.0


def test_las_counts_whole_quanta():
    policy = LAS(quantum=2.0)
    ranks = [policy.rank(job_of(policy, attained=a), 0.0) for a in (0.0, 1.9, 2.0, 5.0)]
    assert ranks == [0.0, 0.0, 2.0, 4.0]
    assert policy.next_above(job_of(policy, attained=1.0), 0.0) == 2.0
    assert policy.next_above(job_of(policy, attained=1.0), 2.0) == 4.0
    assert policy.next_above(job_of(policy, attained=1.0), math.inf) == math.inf


def test_least_slack_by_the_worst_case_and_by_a_quantile():
    values = [2.0] * 9 + [50.0]
    worst, typical = LeastSlack(), LeastSlack(quantile=0.9)
    assert worst.rank(job_of(worst, values=values, deadline=60.0), 0.0) == 10.0
    assert typical.rank(job_of(typical, values=values, deadline=60.0), 0.0) == 58.0
    # Slack stands still while it is served, so the rank (less `now`) rises by whole quanta.
    assert worst.rank(job_of(worst, values=values, deadline=60.0, attained=1.5), 0.0) == 11.0
    # Past 2 s the 0.9-quantile of what is left is the outlier, too.
    assert typical.rank(job_of(typical, values=values, deadline=60.0, attained=2.0), 0.0) == 12.0
    # Beyond the samples: as much again as the largest.
    assert worst.rank(job_of(worst, values=values, deadline=60.0, attained=50.0), 0.0) == 10.0
    assert worst.rank(job_of(worst, values=values), 0.0) == math.inf


def test_edf_and_the_oracle():
    assert EDF().rank(job_of(EDF(), deadline=5.0), 1.0) == 5.0
    assert Oracle().rank(job_of(Oracle(), demand=5.0, attained=2.0), 1.0) == 3.0
    with pytest.raises(DemandError, match="demand of job 0 is nan"):
        Oracle().rank(job_of(Oracle()), 0.0)


def test_gittins_options_reach_the_table():
    known = Distribution([1.0, 10.0])
    plain, coarse = Gittins(), Gittins(quantum=5.0)
    assert plain.rank(job_of(plain), 0.0) == known.gittins() == 2.0
    expected = RankTable(known, quantum=5.0).at(0.0)
    assert coarse.rank(job_of(coarse), 0.0) == expected > 2.0
    with pytest.raises(DemandError, match="variant is 'gitins'"):
        Gittins("gitins")
    with pytest.raises(DemandError, match="quantum"):
        Gittins(quantum=-1.0)


def test_only_jobs_that_do_not_run_count_the_cost_of_preemption():
    policy = Gittins(preemption_cost=3.0)
    job = job_of(policy)
    waiting = policy.rank(job, 0.0)
    job.running = True
    assert policy.rank(job, 0.0) == Gittins().rank(job_of(Gittins()), 0.0) < waiting
    assert policy.next_above(job, 2.0) == 1.0


def test_vtc_serves_the_tenant_with_least_service():
    policy = VTC(quantum=1.0)
    state = policy.new_state()
    first, second = (job_of(policy, i, state=state, tenant=t) for i, t in enumerate("xy"))
    for job in (first, second):
        policy.arrived(job, 0.0)
    policy.served(first, 2.5, 2.5)
    assert [policy.rank(job, 2.5) for job in (first, second)] == [2.0, 0.0]
    # `y` ends its third quantum, over the rank of `x`, after three seconds.
    second.running = True
    assert policy.next_above(second, 2.0) == 3.0
    assert policy.reranks


def test_vtc_lifts_the_counter_of_a_tenant_that_comes_back():
    policy = VTC()
    state = policy.new_state()
    x, y, back = (job_of(policy, i, state=state, tenant=t) for i, t in enumerate("xyy"))
    policy.arrived(x, 0.0)
    policy.served(x, 40.0, 40.0)
    policy.arrived(y, 40.0)
    assert state.counters == {"x": 40.0, "y": 40.0}  # not 40 s of credit
    policy.served(y, 5.0, 45.0)
    policy.departed(y, 45.0)
    policy.served(x, 15.0, 60.0)
    policy.departed(x, 60.0)
    policy.arrived(back, 100.0)  # nobody is there: as the last to leave
    assert state.counters == {"x": 55.0, "y": 55.0}


def test_vtc_counts_by_weight():
    policy = VTC()
    heavy = job_of(policy, tenant="x", weight=2.0)
    policy.arrived(heavy, 0.0)
    policy.served(heavy, 4.0, 4.0)
    assert policy.rank(heavy, 4.0) == 2.0
    assert policy.next_above(heavy, 2.0) == 2.0  # two more seconds of service


def test_virtual_time_is_the_finish_under_fair_sharing():
    policy = VirtualTime()
    state = policy.new_state()
    long = job_of(policy, 0, values=[10.0], state=state)
    short = job_of(policy, 1, values=[2.0], state=state, arrival=6.0)
    late = job_of(policy, 2, values=[2.0], state=state, arrival=8.0)
    for job in (long, short, late):
        policy.arrived(job, job.arrival)
    # Alone until 6, the clock stands at 6; two share until 8, which adds 1.
    assert [policy.rank(job, 8.0) for job in (long, short, late)] == [10.0, 8.0, 9.0]
    with pytest.raises(DemandError, match="must not go backwards"):
        policy.arrived(job_of(policy, 3, state=state), 7.0)


def test_the_virtual_clock_runs_on_when_jobs_finish_in_it():
    policy = VirtualTime()
    state = policy.new_state()
    jobs = [job_of(policy, i, values=[v], state=state) for i, v in enumerate((1.0, 3.0))]
    for job in jobs:
        policy.arrived(job, 0.0)
    third = job_of(policy, 2, values=[1.0], state=state)
    policy.arrived(third, 3.0)  # 1 at second 2, then alone at full pace: 2
    assert policy.rank(third, 3.0) == 3.0
    fourth = job_of(policy, 3, values=[1.0], state=state)
    policy.arrived(fourth, 100.0)  # both gone by virtual time 3, where the clock waits
    assert policy.rank(fourth, 100.0) == 4.0


def test_service_that_goes_backwards_is_refused():
    policy = VTC()
    for seconds in (-1.0, math.nan):
        with pytest.raises(DemandError, match="must not go backwards"):
            policy.served(job_of(policy), seconds, 0.0)


def test_aging_clips_and_adds_the_arrival():
    policy = Aging(Gittins(), cap=5.0, rate=0.5)
    assert policy.rank(job_of(policy, arrival=4.0), 0.0) == 4.0
    assert policy.rank(job_of(policy, arrival=4.0, attained=1.0), 0.0) == 7.0  # 9 s are clipped
    assert policy.overtaking_seconds == 10.0
    running = job_of(policy, arrival=4.0)
    assert policy.next_above(running, 4.0) == 1.0
    assert policy.next_above(running, 7.0) == math.inf


def test_hysteresis_favours_the_running_job():
    policy = Hysteresis(Gittins(), margin=1.5)
    job = job_of(policy)
    assert policy.rank(job, 0.0) == 2.0
    job.running = True
    assert policy.rank(job, 0.0) == 0.5
    assert policy.next_above(job, 7.0) == 1.0  # where the rank within is 9
    assert policy.next_above(job, 7.5) == 10.0


def test_a_quantum_is_served_to_its_end():
    policy = TimeSlice(Gittins(), seconds=4.0)
    job = job_of(policy, attained=1.0)
    assert policy.rank(job, 0.0) == 9.0
    job.running, job.started_at = True, 1.0
    assert policy.rank(job, 0.0) == -math.inf
    assert policy.next_above(job, 2.0) == 5.0
    job.attained_service = 5.0
    assert policy.rank(job, 0.0) == 5.0


def test_priority_classes_come_before_ranks():
    policy = PriorityClasses(Gittins())
    first = job_of(policy, priority=0, values=[50.0])
    last = job_of(policy, priority=1, values=[1.0, 10.0])
    assert policy.rank(first, 0.0) == (0, 50.0)
    assert policy.rank(first, 0.0) < policy.rank(last, 0.0) == (1, 2.0)
    assert policy.next_above(last, (1, 2.0)) == 1.0
    assert policy.next_above(first, (1, 2.0)) == math.inf


def test_a_mix_gives_each_side_its_policy_table_and_state():
    policy = DeadlineMix(LeastSlack(), Gittins())
    timed = job_of(policy, deadline=30.0)
    free = job_of(policy)
    for job in (timed, free):
        policy.arrived(job, 0.0)
    assert policy.rank(timed, 0.0) == (0, 20.0)
    assert policy.rank(free, 0.0) == (1, 2.0)
    free.expect(Distribution([7.0]), policy.table(Distribution([7.0])))
    assert policy.rank(free, 0.0) == (1, 7.0)
    shared = DeadlineMix(EDF(), VTC())
    job = job_of(shared)
    shared.arrived(job, 0.0)
    shared.served(job, 3.0, 3.0)
    assert shared.rank(job, 3.0) == (1, 3.0)
    assert shared.reranks
    assert not policy.reranks


def test_wrappers_within_wrappers():
    mixed = DeadlineMix(EDF(), DeadlineMix(EDF(), VTC()))
    policy = PriorityClasses(mixed)
    job = job_of(policy, priority=3)
    policy.arrived(job, 0.0)
    policy.served(job, 2.0, 2.0)
    assert policy.rank(job, 2.0) == (3, 1, 1, 2.0)
    assert policy.reranks
    policy.departed(job, 2.0)


@pytest.mark.parametrize(
    "make",
    [lambda p: Aging(p, 1.0, 1.0), lambda p: Hysteresis(p, 1.0), lambda p: TimeSlice(p, 1.0)],
)
def test_what_adds_to_ranks_refuses_tuples(make):
    for within in (PriorityClasses(FCFS()), DeadlineMix(EDF(), FCFS())):
        with pytest.raises(DemandError, match="put PriorityClasses or DeadlineMix around it"):
            make(within)
    tuples = make(TupleRanks())  # which do not say so: found out when they rank
    with pytest.raises(DemandError, match="put PriorityClasses or DeadlineMix around it"):
        tuples.rank(job_of(tuples), 0.0)


class TupleRanks(Policy):
    def rank(self, job, now):
        return (0, 1.0)


@pytest.mark.parametrize("within", [None, "x", FCFS], ids=str)
def test_what_is_within_is_a_policy(within):
    for make in (
        lambda: Aging(within, 1.0, 1.0),
        lambda: Hysteresis(within, 1.0),
        lambda: TimeSlice(within, 1.0),
        lambda: PriorityClasses(within),
        lambda: DeadlineMix(within, FCFS()),
        lambda: DeadlineMix(FCFS(), within),
    ):
        with pytest.raises(DemandError, match="expected a policy, such as Gittins"):
            make()


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("arrival", [math.nan, math.inf]),
        ("deadline", [math.nan]),
        ("weight", [-1.0, 0.0, math.inf, math.nan]),
        ("attained_service", [-1.0, math.nan, math.inf]),
        ("priority", [math.nan]),
        ("demand", [-1.0]),
    ],
)
def test_a_job_is_checked(field, values):
    good = {"index": 7, "application": "a", "arrival": 0.0, "distribution": Distribution([1.0])}
    assert Job(**good).weight == 1.0
    for value in values:
        with pytest.raises(DemandError, match=f"{field} of job 7 is {value}; expected"):
            Job(**{**good, field: value})


@pytest.mark.parametrize("attained", [-1.0, math.nan])
@pytest.mark.parametrize(
    "policy", [LAS(), Oracle(), Gittins(), SERPT(), LeastSlack(), TimeSlice(FCFS(), 1.0)], ids=str
)
def test_service_that_is_no_service_is_refused(policy, attained):
    job = job_of(policy, attained=attained, demand=5.0, deadline=9.0)
    job.running = True
    with pytest.raises(DemandError, match=f"age is {attained}"):
        policy.rank(job, 0.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: LAS(x),
        lambda x: LeastSlack(quantum=x),
        lambda x: VTC(x),
        lambda x: VirtualTime(x),
        lambda x: Aging(FCFS(), x, 1.0),
        lambda x: Aging(FCFS(), 1.0, x),
        lambda x: Hysteresis(FCFS(), x),
        lambda x: TimeSlice(FCFS(), x),
    ],
)
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_settings_are_positive_and_finite(make, value):
    with pytest.raises(DemandError, match=r"expected a positive finite number"):
        make(value)


def test_a_quantile_is_a_share():
    for quantile in (-0.1, 95.0, math.nan):
        with pytest.raises(DemandError, match="quantile is"):
            LeastSlack(quantile)


def test_policies_without_what_they_need_say_so():
    bare = Job(0, "a", 0.0, Distribution([1.0]))
    for policy in (Gittins(), SERPT(), LeastSlack()):
        with pytest.raises(DemandError, match="has no table"):
            policy.rank(bare, 0.0)
    with pytest.raises(DemandError, match="has no counters"):
        VTC().rank(bare, 0.0)
    with pytest.raises(DemandError, match="has no virtual clock"):
        VirtualTime().rank(bare, 0.0)


def test_an_application_never_seen_is_ranked_by_attained_service_and_said_so():
    known = {"a": Distribution([3.0])}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert known_of("a", known) is known["a"]
    with pytest.warns(UserWarning, match="'b' was never seen before"):
        assert known_of("b", known) is NEVER_SEEN
    for policy in (ClassMean(), SERPT(), Gittins(), VirtualTime()):
        job = Job(0, "b", 0.0, NEVER_SEEN, table=policy.table(NEVER_SEEN))
        job.state = policy.new_state()
        policy.arrived(job, 0.0)
        job.attained_service = 5.0
        assert 2.5 < policy.rank(job, 5.0) <= 5.0, policy
        risen = policy.next_above(job, policy.rank(job, 5.0))
        assert 5.0 < risen <= 10.0
        job.attained_service = risen
        assert 5.0 < policy.rank(job, 5.0) == risen
    slack = LeastSlack()
    late = Job(0, "b", 0.0, NEVER_SEEN, table=slack.table(NEVER_SEEN), deadline=20.0)
    late.attained_service = 8.0
    assert 12.0 <= slack.rank(late, 0.0) <= 16.0


def test_what_was_learned_counts_from_where_it_was_learned():
    policy = Gittins()
    job = job_of(policy, attained=3.0)
    job.expect(Distribution([1.0, 10.0]), policy.table(Distribution([1.0, 10.0])))
    assert policy.rank(job, 3.0) == 2.0
    assert policy.next_above(job, 2.0) == 4.0
    assert job.prior.mean() == 5.5
    job.known_at = 0.1
    reached = job.attained_at(0.2)
    assert reached - 0.1 >= 0.2 > math.nextafter(reached, 0.0) - 0.1
