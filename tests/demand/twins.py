"""Slow, obvious simulators, written without the simulator's ideas."""

import math

import numpy as np

from demand import CostModel, Job, Progress, Workload
from demand.workloads.closed_loop import ClosedLoop


def unit_step(workload: Workload, rank, servers: int) -> np.ndarray:
    """Completion times on a grid of one second: at each second, rank everyone and serve the best.

    Exact when arrivals, demands and atoms are whole seconds. `rank(i, age)` ranks job i.
    """
    arrivals, demands = workload.arrivals, workload.demands
    n = len(workload)
    age, finish = np.zeros(n), np.full(n, math.nan)
    now = 0.0
    while np.isnan(finish).any():
        present = [i for i in range(n) if arrivals[i] <= now and math.isnan(finish[i])]
        for i in sorted(present, key=lambda i: (rank(i, age[i]), i))[:servers]:
            age[i] += 1.0
            if age[i] == demands[i]:
                finish[i] = now + 1.0
        now += 1.0
    return finish - arrivals


def exhaustive(workload: Workload, rank, servers: int) -> np.ndarray:
    """Completion times by ranking everyone anew whenever anything could have changed.

    That is at every arrival, every completion, and every age of a running job at which its rank
    may jump: an atom of its distribution or a doubling of the largest one.
    """
    arrivals, demands = workload.arrivals.tolist(), workload.demands.tolist()
    n = len(workload)
    jumps = [_jumps(workload.distributions[name].values) for name in workload.applications]
    age, finish = [0.0] * n, [math.nan] * n
    now = 0.0
    while any(math.isnan(f) for f in finish):
        present = [i for i in range(n) if arrivals[i] <= now and math.isnan(finish[i])]
        chosen = sorted(present, key=lambda i: (rank(i, age[i]), i))[:servers]
        step = min((a - now for a in arrivals if a > now), default=math.inf)
        stops = {}
        for i in chosen:
            stops[i] = min([demands[i], *(x for x in jumps[i] if x > age[i])])
            step = min(step, stops[i] - age[i])
        for i in chosen:
            # Landing on an atom exactly is what makes equal ages have equal ranks.
            age[i] = stops[i] if stops[i] - age[i] <= step else age[i] + step
        reached = [a for a in arrivals if a > now and a - now <= step]
        now = reached[0] if reached else now + step
        for i in chosen:
            if age[i] >= demands[i]:
                finish[i] = now
    return np.array(finish) - np.array(arrivals)


def _jumps(atoms: np.ndarray) -> list[float]:
    largest = atoms[-1] or 1e-9
    return [*atoms.tolist(), *(largest * 2.0 ** np.arange(0, 60)).tolist()]


def second_by_second(loop, policy, servers=1, refine=None, step=1.0) -> tuple[list[float], int]:
    """Completion times in order of arrival, and preemptions, on a grid of `step` seconds.

    At each point of the grid: end what has ended, let arrive what arrives, rank everyone, and
    serve the best until the next point. Exact when all that can change anything (arrivals, ends of
    units, atoms, quanta, times of thought) falls on the grid. Takes any policy, refinement and
    open or closed loop of jobs with runs; keeps no ranks from one point to the next.
    """
    closed = isinstance(loop, ClosedLoop)
    workload = loop.jobs if closed else loop
    state = policy.new_state()
    cost = CostModel()
    arrivals = workload.arrivals.tolist()
    if closed:
        for entry, user in enumerate(loop.users):
            if user in loop.users[:entry]:
                arrivals[entry] = math.inf
    absent, present, running, order = set(range(len(workload))), [], [], []
    executed: dict[int, int] = {}
    finishes: dict[int, float] = {}
    preemptions, now = 0, 0.0

    def arrive(entry):
        name, tenant = workload.applications[entry], workload.tenants[entry]
        known = workload.distributions[name]
        job = Job(
            len(order),
            name,
            now,
            known,
            demand=float(workload.demands[entry]),
            table=policy.table(known),
            deadline=float(workload.deadlines[entry] - workload.arrivals[entry]) + now,
            tenant=tenant,
            weight=workload.weights.get(tenant, 1.0),
            priority=workload.priorities[entry],
        )
        job.state = state
        order.append(entry)
        executed[job.index] = 0
        policy.arrived(job, now)
        present.append(job)

    def finish(job):
        present.remove(job)
        running.remove(job)
        job.running = False
        finishes[job.index] = now - job.arrival
        policy.departed(job, now)
        if closed:
            entry = order[job.index]
            user = loop.users[entry]
            following = [e for e in sorted(absent) if loop.users[e] == user]
            if following:
                arrivals[following[0]] = now + loop.think_seconds[following[0]]

    def units_over(job):
        run = workload.runs[order[job.index]]
        sums = [cost.run_seconds(run[: at + 1]) for at in range(len(run))]
        return sum(end <= job.attained_service for end in sums)

    def end_units(job):
        executed[job.index] = units_over(job)
        job.requested = now
        if refine is not None:
            run = workload.runs[order[job.index]]
            left = refine(job.application, Progress(run[: executed[job.index]]))
            job.expect(left, policy.table(left))

    while absent or present:
        for job in [*running]:
            if job.attained_service >= job.demand:
                finish(job)
            elif units_over(job) > executed[job.index]:
                end_units(job)
        for entry in sorted(absent):
            if arrivals[entry] == now:
                absent.remove(entry)
                arrive(entry)
        chosen = sorted(present, key=lambda job: (policy.rank(job, now), job.index))[:servers]
        for job in present:
            if job.running and job not in chosen:
                preemptions += 1
                job.running = False
        for job in chosen:
            if not job.running:
                job.running, job.started_at = True, job.attained_service
        running = chosen
        if any(units_over(job) > executed[job.index] for job in running):
            continue  # over before it has begun: the same moment again
        for job in running:
            job.attained_service += step
        for job in running:
            policy.served(job, step, now + step)
        now += step
    return [finishes[index] for index in range(len(finishes))], preemptions


def processor_sharing(workload: Workload) -> np.ndarray:
    """Completion times when all jobs present share one server evenly."""
    arrivals = workload.arrivals.tolist()
    left = dict(enumerate(workload.demands.tolist()))
    finish = np.full(len(workload), math.nan)
    now = 0.0
    while left:
        present = [i for i in left if arrivals[i] <= now]
        step = min((a - now for a in arrivals if a > now), default=math.inf)
        step = min([step, *(left[i] * len(present) for i in present)])
        for i in present:
            left[i] -= step / len(present)
            if left[i] <= 1e-12:
                finish[i] = now + step
                del left[i]
        reached = [a for a in arrivals if a > now and a - now <= step]
        now = reached[0] if reached else now + step
    return finish - workload.arrivals


def fair_shares(workload: Workload, quantum: float, servers: int) -> np.ndarray:
    """Completion times under virtual counters, all compared whenever one completes a quantum."""
    arrivals, demands = workload.arrivals.tolist(), workload.demands.tolist()
    tenants = workload.tenants
    weight = {tenant: workload.weights.get(tenant, 1.0) for tenant in tenants}
    counters = dict.fromkeys(tenants, 0.0)
    age, finish = [0.0] * len(arrivals), [math.nan] * len(arrivals)
    arrived, last, now = 0, tenants[0], 0.0
    while any(math.isnan(f) for f in finish):
        present = [i for i in range(arrived) if math.isnan(finish[i])]
        while arrived < len(arrivals) and arrivals[arrived] <= now:
            tenant, others = tenants[arrived], {tenants[i] for i in present}
            if tenant not in others:
                floor = min((counters[other] for other in others), default=counters[last])
                counters[tenant] = max(counters[tenant], floor)
            present.append(arrived)
            arrived += 1
        level = {tenant: math.floor(c / quantum + 1e-9) for tenant, c in counters.items()}
        chosen = sorted(present, key=lambda i: (level[tenants[i]], i))[:servers]
        pace = {t: sum(tenants[i] == t for i in chosen) / weight[t] for t in set(tenants)}
        steps = [demands[i] - age[i] for i in chosen]
        steps += [((level[t] + 1) * quantum - counters[t]) / pace[t] for t in pace if pace[t]]
        steps += [a - now for a in arrivals[arrived : arrived + 1]]
        step = min(steps)
        for i in chosen:
            age[i] += step
            counters[tenants[i]] += step / weight[tenants[i]]
        now += step
        if arrived < len(arrivals) and math.isclose(now, arrivals[arrived], rel_tol=1e-12):
            now = arrivals[arrived]
        for i in chosen:
            if age[i] >= demands[i] - 1e-9:
                finish[i], last = now, tenants[i]
    return np.array(finish) - np.array(arrivals)
