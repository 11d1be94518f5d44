"""Policies and workloads of whole seconds, for tests that compare simulators under all of them."""

from dataclasses import dataclass

from hypothesis import strategies as st

from demand import Distribution, Execution, Job, Policy, Unit, Workload
from demand.policies import (
    EDF,
    FCFS,
    LAS,
    MLFQ,
    SERPT,
    VTC,
    Aging,
    ClassMean,
    DeadlineMix,
    DecayingLAS,
    Gittins,
    Hysteresis,
    LeastSlack,
    Oracle,
    PriorityClasses,
    RequestFCFS,
    TimeSlice,
    VirtualTime,
)
from demand.workloads.closed_loop import ClosedLoop

PLAIN = [
    FCFS(),
    RequestFCFS(),
    ClassMean(),
    SERPT(),
    Gittins(),
    Gittins(quantum=3.0),
    Gittins(preemption_cost=2.0),
    LAS(1.0),
    LAS(3.0),
    LeastSlack(),
    LeastSlack(0.5, quantum=2.0),
    EDF(),
    VTC(1.0),
    VTC(4.0),
    DecayingLAS(2.0, 3.0),
    MLFQ(1.0, 2.0, 3),
    MLFQ(2.0, 1.0, 4, starvation_seconds=6.0),
    VirtualTime(),
    VirtualTime(3.0, {"a": 40.0, "b": 7.0, "c": 19.0}),
    Oracle(),
]
WRAPPED = [
    Aging(Gittins(), cap=6.0, rate=0.5),
    Aging(LAS(2.0), cap=3.0, rate=0.1),
    Aging(VTC(2.0), cap=8.0, rate=0.3),
    Hysteresis(Gittins(), 2.0),
    Hysteresis(LAS(1.0), 1.5),
    Hysteresis(Oracle(), 0.7),
    Hysteresis(Aging(SERPT(), 9.0, 0.7), 1.3),
    TimeSlice(Gittins(), 3.0),
    TimeSlice(LAS(1.0), 4.0),
    TimeSlice(VTC(1.0), 2.0),
    TimeSlice(EDF(), 5.0),
    TimeSlice(Hysteresis(LAS(1.0), 3.0), 2.0),
    PriorityClasses(FCFS()),
    PriorityClasses(Gittins()),
    PriorityClasses(TimeSlice(Gittins(), 2.0)),
    PriorityClasses(VTC(2.0)),
    PriorityClasses(MLFQ(1.0, 2.0, 3, starvation_seconds=5.0)),
    Hysteresis(DecayingLAS(3.0, 2.0), 1.0),
    DeadlineMix(EDF(), Gittins()),
    DeadlineMix(LeastSlack(quantum=2.0), Hysteresis(LAS(1.0), 1.0)),
    DeadlineMix(EDF(), VTC(1.0)),
    DeadlineMix(TimeSlice(EDF(), 2.0), PriorityClasses(RequestFCFS())),
    PriorityClasses(DeadlineMix(LeastSlack(0.9), Aging(Gittins(), 5.0, 1.0))),
    DeadlineMix(LeastSlack(), DeadlineMix(FCFS(), SERPT())),
]
POLICIES = PLAIN + WRAPPED


@dataclass(frozen=True)
class Shy(Policy):
    """Being served makes its rank worse, at once."""

    def rank(self, job: Job, now: float) -> float:
        return job.arrival + 8.0 * job.running


_SECOND = Unit("second", "tool")


@st.composite
def whole_second_workloads(draw, max_jobs=10):
    """Jobs whose every arrival, demand, unit, atom, deadline is in whole seconds."""
    whole = st.integers(1, 12)
    known = {
        name: Distribution(draw(st.lists(whole, min_size=1, max_size=5)))
        for name in ("a", "b", "c")
    }
    jobs = draw(
        st.lists(
            st.tuples(
                st.integers(0, 25),
                st.lists(st.integers(0, 9), min_size=1, max_size=4),
                st.sampled_from("abc"),
                st.one_of(st.none(), st.integers(0, 40)),
                st.sampled_from("xyz"),
                st.integers(0, 1),
            ),
            min_size=1,
            max_size=max_jobs,
        )
    )
    jobs.sort(key=lambda job: job[0])
    arrivals, units, applications, deadlines, tenants, priorities = zip(*jobs, strict=True)
    return Workload(
        arrivals,
        [sum(seconds) for seconds in units],
        applications,
        known,
        deadlines=[
            float("inf") if d is None else a + d for a, d in zip(arrivals, deadlines, strict=True)
        ],
        tenants=tenants,
        priorities=priorities,
        runs=[[Execution(_SECOND, seconds=float(s)) for s in seconds] for seconds in units],
    )


@st.composite
def closed_loops(draw):
    """The same jobs, submitted by up to four users."""
    jobs = draw(whole_second_workloads())
    n = len(jobs)
    users = draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    thinks = draw(st.lists(st.integers(0, 6), min_size=n, max_size=n))
    return ClosedLoop(jobs, users, thinks)
