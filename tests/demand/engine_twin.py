"""Slow, obvious twin of `simulate_engine`: one step at a time, everyone ranked and sorted anew.

It is written from the rules of `Engine` alone, with none of the simulator's parts but the cost
of an execution and its split into calls.
"""

from types import SimpleNamespace

import numpy as np

from demand import CostModel, Job
from demand.simulation.engine.calls import call_groups, execution_seconds
from demand.simulation.engine.retention import LeftKV
from tests.demand.plans import before


def step_by_step(workload, policy, engine, cost=None, seed=0):
    """Completion times and steps `[n]`, with what the engine did; every step is checked."""
    cost = cost or CostModel()
    state = policy.new_state()
    lottery = np.random.default_rng(seed).random(len(workload))
    jobs, now, steps = [], 0.0, 0
    seen = SimpleNamespace(
        preemptions=0, prefilled_again=0, swapped_blocks=0, peak_blocks=0, requests=0, produced=0,
        calls=[], batches=[], used=0, looked_up=0, found=0, findable=0, held_block_seconds=0.0,
        ended={},
    )  # fmt: skip
    for i, name in enumerate(workload.applications):
        known, tenant = workload.distributions[name], workload.tenants[i]
        demand = sum(execution_seconds(e, cost) for e in workload.runs[i])
        job = Job(
            i,
            name,
            float(workload.arrivals[i]),
            known,
            demand,
            0.0,
            lottery[i],
            policy.table(known),
            float(workload.deadlines[i]),
            tenant,
            workload.weights.get(tenant, 1.0),
            workload.priorities[i],
        )
        job.state = state
        jobs.append(
            SimpleNamespace(
                job=job,
                run=workload.runs[i],
                over=set(),
                started=[],
                calls=[],
                busy={},
                asked=0,
                settled=0.0,
                first_served=None,
                arrived=None,
                finish=None,
                steps=None,
                begun=None,
            )
        )
    firsts = 0
    left, retention = [], engine.retention  # KV that calls left
    running = []  # requests with a place, in order of admission; of "running_first" alone

    def unfinished(entry):
        return [c for c in entry.calls if c.produced < c.made]

    def next_units(entry, now):
        """Start what waits for none that is not over; the job is over with its last unit."""
        if not unfinished(entry):
            entry.first_served, entry.job.running = None, False
        if len(entry.over) == len(entry.run):
            entry.finish, entry.steps = now - entry.job.arrival, steps - entry.begun
            policy.departed(entry.job, now)
            for key in [one.key for one in left if one.key[0] == entry.job.index]:
                forget(key)
            return
        for at in range(len(entry.run)):
            if at not in entry.started and entry.over.issuperset(before(entry.run, at)):
                start(entry, at, now)

    def start(entry, at, now):
        entry.started.append(at)
        if not unfinished(entry):
            entry.job.requested = now
        execution = entry.run[at]
        if execution.unit.kind == "llm":
            calls = [
                SimpleNamespace(
                    entry=entry,
                    number=k,
                    given=given,
                    made=made,
                    produced=0,
                    kv=0,
                    blocks=0,
                    host=0,
                    prefilled=0,
                    last=False,
                    unit=at,
                    turn=entry.asked + k,
                    requested=now,
                    token_seconds=[],
                    block_seconds=0.0,
                )
                for k, (given, made) in enumerate(
                    (given, made)
                    for count, given, made in call_groups(execution)
                    for _ in range(count)
                )
            ]
            entry.calls += calls
            entry.asked += len(calls)
            seen.calls += calls
            for one in left:
                if one.kv.of_run and one.key in map(key_of, calls):
                    one.kv.wanted = now
        else:
            entry.busy[at] = now + execution.seconds

    def end(entry, at, now):
        entry.over.add(at)
        entry.settled += execution_seconds(entry.run[at], cost)
        entry.calls = [c for c in entry.calls if c.unit != at]
        serve(entry, attained(entry), now)
        next_units(entry, now)

    def attained(entry):
        return (
            entry.settled
            + sum(c.prefilled for c in entry.calls) * cost.prefill_seconds_per_token
            + sum(c.produced for c in entry.calls) * cost.decode_seconds_per_token
        )

    def serve(entry, total, now):
        seconds, entry.job.attained_service = total - entry.job.attained_service, total
        if seconds > 0:
            policy.served(entry.job, seconds, now)

    def outside(now):
        """Ends of units that are not llm and arrivals, up to `now`; at one time, ends go first."""
        while True:
            todo = [(e.job.arrival, 1, e.job.index, 0, e) for e in jobs if e.begun is None]
            todo += [(t, 0, e.job.index, u, e) for e in jobs for u, t in e.busy.items()]
            if not todo or min(todo, key=lambda x: x[:3])[0] > now:
                return min((t[0] for t in todo), default=None)
            at, kind, _, unit, entry = min(todo, key=lambda x: x[:3])
            if kind == 1:
                entry.begun = steps
                policy.arrived(entry.job, at)
                next_units(entry, at)
            else:
                del entry.busy[unit]
                end(entry, unit, at)

    by_first_service = engine.scheduling == "by_rank" and engine.preemption == "none"

    def place(call):
        entry = call.entry
        if by_first_service and entry.first_served is not None:
            return (0, entry.first_served, entry.job.index, call.turn)
        rank = policy.rank(entry.job, now)
        return (int(by_first_service), rank, entry.job.index, call.turn)

    def forget(key):
        """No call will find it; the engine may know."""
        for one in [one for one in left if one.key == key and one.kv.of_run]:
            one.kv.of_run = False
            if retention.knows_ends or not one.kv.blocks:
                left.remove(one)

    def key_of(call):
        return call.entry.job.index, call.entry.run[call.unit].unit.name, call.number

    def leave(call, waits):
        if retention is None:
            return
        forget(key_of(call))
        application, name = call.entry.job.application, key_of(call)[1]
        blocks = call.kv // engine.block_tokens
        table = retention.table(name, workload.graphs.get(application), cost)
        kv = LeftKV(application, name, blocks, now, seen.used, waits=waits, table=table)
        kv.wanted = now if waits else None
        seen.used += 1
        if not waits:
            seen.ended[key_of(call)] = blocks
        if blocks:
            left.append(SimpleNamespace(key=key_of(call), kv=kv))

    def fit(calls):
        """Give up KV that lies in blocks that requests have."""
        while sum(one.kv.blocks for one in left) > engine.blocks - sum(c.blocks for c in calls):
            worst = max(left, key=lambda one: retention.rank(one.kv, now))
            worst.kv.blocks -= 1
            if not worst.kv.blocks:
                left.remove(worst)

    def find(call):
        """Blocks that it finds, and how many are held from it."""
        if retention is None:
            return 0, 0
        mine = [one.kv for one in left if one.key == key_of(call) and one.kv.of_run]
        known = call.given + call.produced
        found = 0
        for kv in mine:
            shared = known if kv.waits else min(shared_tokens(call), known)
            found = min(kv.blocks, min(shared, known - 1) // engine.block_tokens)
        return found, held_blocks() if running else 0

    def held_blocks():
        if retention is None:
            return 0
        held = sum(one.kv.blocks for one in left if retention.holds(one.kv, now))
        return min(held, int(retention.limit * engine.blocks))

    def shared_tokens(call):
        return min(int(call.entry.run[call.unit].shared_tokens or 0), call.given)

    def use(call, found):
        if retention is None:
            return
        if call.prefilled:
            seen.prefilled_again -= found * engine.block_tokens
        else:
            seen.looked_up += call.given
            seen.found += found * engine.block_tokens
            shared = min(shared_tokens(call), call.given - 1) // engine.block_tokens
            seen.findable += min(shared, seen.ended.get(key_of(call), 0)) * engine.block_tokens
        for one in left:
            if one.key == key_of(call) and one.kv.of_run:
                one.kv.blocks -= found
        forget(key_of(call))
        call.kv = found * engine.block_tokens

    def take(victim):
        if engine.preemption == "swap":
            victim.host = victim.blocks
            seen.swapped_blocks += victim.blocks
        else:
            seen.prefilled_again += victim.kv
            victim.kv = 0
        victim.blocks = 0

    def by_rank(calls, order, places):
        """What each request of the step gets, `[(request, tokens)]`."""
        budget, batch = engine.token_budget, []
        for position, call in enumerate(order):
            if len(batch) == engine.max_requests or budget == 0:
                break
            n = min(call.given + call.produced - call.kv, budget)
            needed = -(-(call.kv + n) // engine.block_tokens) - call.blocks
            free = engine.blocks - sum(c.blocks for c in calls)
            behind = [c for c in order[position + 1 :] if c.blocks]
            if free + sum(c.blocks for c in behind) < needed:
                break
            while free < needed:
                victim = behind.pop()
                free += victim.blocks
                take(victim)
            call.blocks += needed
            seen.swapped_blocks += call.host
            call.host = 0
            batch.append((call, n))
            budget -= n
        if engine.preemption in ("recompute", "swap"):
            holders = [c for c in order if c.blocks]
            for victim in holders[engine.max_requests :]:
                take(victim)
        return batch

    def give_way(call):
        running.remove(call)
        leave(call, waits=True)
        take(call)
        seen.preemptions += 1

    def running_first(calls, order, places):
        """The same by the rules of vLLM."""
        waiting = [c for c in order if c not in running]
        if engine.preemption == "recompute":
            free_places = engine.max_requests - len(running)
            worst = sorted(running, key=lambda c: places[id(c)], reverse=True)
            for better, worse in zip(waiting[free_places:], worst, strict=False):
                if not places[id(better)][1] < places[id(worse)][1]:
                    break
                give_way(worse)
        budget, tokens, lost = engine.token_budget, {}, False
        for call in tuple(running):
            if call not in running:
                continue
            n = min(call.given + call.produced - call.kv, budget)
            assert n > 0  # the budget has a token for each that runs
            while -(-(call.kv + n) // engine.block_tokens) > call.blocks + engine.blocks - sum(
                c.blocks for c in calls
            ):
                victim = max(running, key=lambda c: places[id(c)])
                budget += tokens.pop(id(victim), 0)
                give_way(victim)
                lost = True
                if victim is call:
                    break
            if call not in running:
                break
            call.blocks = -(-(call.kv + n) // engine.block_tokens)
            tokens[id(call)] = n
            budget -= n
        if not lost:
            fit(calls)
        for call in [] if lost else order:
            if call in running:
                continue
            found, held = find(call)
            free = engine.blocks - sum(c.blocks for c in calls) - held
            known = call.given + call.produced
            fits = -(-known // engine.block_tokens) <= free
            if len(running) == engine.max_requests or budget == 0 or not fits:
                break
            running.append(call)
            use(call, found)
            tokens[id(call)] = n = min(known - call.kv, budget)
            call.blocks = -(-(call.kv + n) // engine.block_tokens)
            budget -= n
            fit(calls)
        fit(calls)
        for entry in {id(c.entry): c.entry for c in order}.values():
            runs = any(c.entry is entry for c in running)
            if runs and not entry.job.running:
                entry.job.started_at = entry.job.attained_service
            entry.job.running = runs
        return [(c, tokens[id(c)]) for c in running if id(c) in tokens]

    while True:
        upcoming = outside(now)
        calls = [c for e in jobs for c in e.calls if c.produced < c.made]
        if not calls:
            if upcoming is None:
                break
            now = upcoming
            continue
        places = {id(c): place(c) for c in calls}
        order = sorted(calls, key=lambda c: places[id(c)])
        copied = seen.swapped_blocks
        form = running_first if engine.scheduling == "running_first" else by_rank
        batch = form(calls, order, places)
        copied = seen.swapped_blocks - copied
        chosen = {id(c) for c, _ in batch}
        if engine.scheduling == "by_rank":
            seen.preemptions += sum(c.last and id(c) not in chosen for c in calls)
            for call in calls:
                call.last = id(call) in chosen
        by_place = sorted(
            (e for e in jobs if unfinished(e)), key=lambda e: places[id(unfinished(e)[0])]
        )
        for entry in by_place if engine.scheduling == "by_rank" else []:
            runs = any(c.last for c in unfinished(entry))
            if runs and not entry.job.running:
                entry.job.started_at = entry.job.attained_service
            entry.job.running = runs
        for call, _ in batch:
            if call.entry.first_served is None:
                call.entry.first_served = firsts
                firsts += 1

        if not batch:
            continue
        seen.batches.append({(c.entry.job.index, c.unit, c.number): n for c, n in batch})
        decoding = [c for c, n in batch if c.given + c.produced - c.kv == 1 and c.produced]
        tokens = sum(n for _, n in batch)
        kv = sum(c.kv + n for c, n in batch)
        assert tokens <= engine.token_budget
        assert 1 <= len(batch) <= engine.max_requests
        held = sum(c.blocks for c in calls)
        assert held <= engine.blocks
        seconds = engine.step_seconds(tokens - len(decoding), len(decoding), kv, copied)
        seen.held_block_seconds += held_blocks() * seconds
        now += seconds
        steps += 1
        for call in calls:
            call.block_seconds += call.blocks * seconds
        outside(now)  # what happened during the step
        seen.requests += len(batch)
        seen.peak_blocks = max(seen.peak_blocks, held)
        for call, n in batch:
            call.kv += n
            call.prefilled = max(call.prefilled, min(call.kv, call.given))
            if call.kv == call.given + call.produced:
                call.produced += 1
                call.token_seconds.append(now)
                seen.produced += 1
            if call.produced == call.made:
                call.blocks = 0
                if call in running:
                    running.remove(call)
                    leave(call, waits=False)
        if engine.scheduling == "running_first":
            for entry in jobs:
                entry.job.running = any(c.entry is entry for c in running)
                for call in entry.calls:
                    call.last = call in running
        for entry in jobs:
            if entry.calls:
                serve(entry, attained(entry), now)
        ended = []
        for call, _ in batch:
            one = call.entry.job.index, call.unit
            if one not in ended and not any(c.unit == call.unit for c in unfinished(call.entry)):
                ended.append(one)
        for index, unit in sorted(ended):
            end(jobs[index], unit, now)
    seen.completion_times = np.array([e.finish for e in jobs])
    seen.completion_steps = np.array([e.steps for e in jobs])
    seen.steps = steps
    seen.calls.sort(key=lambda c: (c.entry.job.index, c.unit, c.number))
    return seen
