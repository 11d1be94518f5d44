"""Slow, obvious twin of `simulate_engine` and `simulate_cluster`: everyone ranked at every step.

It takes one step of one engine at a time, and is written from the rules of `Engine` and
`simulate_cluster` alone, with none of the simulators' parts but the cost of an execution and its
split into calls.
"""

from types import SimpleNamespace

import numpy as np

from demand import CostModel, Job, Unit
from demand.routing import ReadyUnit
from demand.simulation.engine.calls import call_groups, execution_seconds
from demand.simulation.engine.retention import LeftKV
from tests.demand.plans import before

COUNTED = ("preemptions", "prefilled_again", "swapped_blocks", "requests", "produced",
           "steps", "looked_up", "found", "findable", "held_block_seconds", "units")  # fmt: skip


class SeenTwin:
    """An engine as a router sees it, counted anew whenever it is asked."""

    def __init__(self, at, jobs, engine, find):
        self.number, self.at, self.jobs, self.engine, self.find = at.number, at, jobs, engine, find

    def calls(self):
        entries = [entry for entry in self.jobs if entry.engine is self.at]
        return [call for entry in entries for call in entry.calls if call.produced < call.made]

    @property
    def requests(self):
        return len(self.calls())

    @property
    def waiting(self):
        return sum(call.blocks == 0 for call in self.calls())

    @property
    def prompt_tokens(self):
        return sum(call.given - call.prefilled for call in self.calls())

    @property
    def kv_share(self):
        return sum(call.blocks for call in self.calls()) / self.engine.blocks

    def found_tokens(self, unit):
        entry = self.jobs[unit.job.index]
        found = sum(self.find(self.at, call)[0] for call in entry.calls)
        return found * self.engine.block_tokens


def step_by_step(
    workload, policy, engine, cost=None, seed=0, engines=1, router=None, predictor=None
):
    """Completion times and steps `[n]`, with what the engines did; every step is checked."""
    cost = cost or CostModel()
    state = policy.new_state()
    lottery = np.random.default_rng(seed).random(len(workload))
    jobs, now = [], 0.0
    seen = SimpleNamespace(calls=[], batches=[], used=0, ended={}, moves=0, outside=0)
    servers = [
        SimpleNamespace(
            number=number,
            until=None,  # second at which the step under way ends
            batch=[],
            firsts=0,
            left=[],  # KV that calls left
            running=[],  # requests with a place, in order of admission; of "running_first" alone
            peak_blocks=0,
            **dict.fromkeys(COUNTED, 0),
        )
        for number in range(engines)
    ]
    remembered = None if router is None else router.new_state(engines)
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
                engine=None,
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
    retention = engine.retention

    def begun():
        return sum(at.steps for at in servers)

    def unfinished(entry):
        return [c for c in entry.calls if c.produced < c.made]

    def next_units(entry, now):
        """Start what waits for none that is not over; the job is over with its last unit."""
        if not unfinished(entry):
            entry.first_served, entry.job.running = None, False
        if len(entry.over) == len(entry.run):
            entry.finish, entry.steps = now - entry.job.arrival, begun() - entry.begun
            policy.departed(entry.job, now)
            for at in servers:
                for key in [one.key for one in at.left if one.key[0] == entry.job.index]:
                    forget(at, key)
            if router is not None:
                router.departed(entry.job, remembered)
            return
        if predictor is not None:
            foresee(entry)
        for at in range(len(entry.run)):
            if at not in entry.started and entry.over.issuperset(before(entry.run, at)):
                start(entry, at, now)

    def foresee(entry):
        """Ask what is left where calls alone come next, none of which has been served."""
        run, left = entry.run, set(range(len(entry.run))) - entry.over

        def stage(at):
            return max((stage(one) + 1 for one in before(run, at)), default=0)

        number = min(map(stage, left))
        ahead = [at for at in range(len(run)) if stage(at) == number]
        if not left.issuperset(ahead) or any(run[at].unit.kind != "llm" for at in ahead):
            return
        if attained(entry) > entry.settled:
            return
        calls = sum(run[at].parallelism for at in ahead)
        known = predictor.predict(
            SimpleNamespace(
                application=entry.job.application,
                unit=Unit(" + ".join(sorted({run[at].unit.name for at in ahead})), "llm"),
                input_tokens=sum(run[at].parallelism * run[at].input_tokens for at in ahead)
                / calls,
                parallelism=calls,
                progress=SimpleNamespace(executed=[None] * number),
            )
        )
        entry.job.expect(known, policy.table(known))

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
            route(entry, execution)
            for server in servers:
                for one in server.left:
                    if not one.kv.of_run or one.key not in map(key_of, calls):
                        continue
                    if server is entry.engine:
                        one.kv.wanted = now
                    else:
                        one.elsewhere = True
                        one.reach = min(one.reach, int(execution.shared_tokens or 0))
        else:
            entry.busy[at] = now + execution.seconds, seen.outside
            seen.outside += 1

    def end(entry, at, now):
        entry.over.add(at)
        entry.settled += execution_seconds(entry.run[at], cost)
        entry.calls = [c for c in entry.calls if c.unit != at]
        serve(entry, attained(entry), now)
        next_units(entry, now)

    def route(entry, execution):
        last_engine = entry.engine
        if router is None:
            entry.engine = servers[0]
            return
        entry.engine = None  # its calls are nowhere yet
        last = None if last_engine is None else last_engine.number
        tokens = sum(call.given for call in entry.calls)
        unit = ReadyUnit(entry.job, execution, now, len(entry.calls), tokens, last)
        views = [SeenTwin(at, jobs, engine, find) for at in servers]
        entry.engine = servers[router.choose(unit, views, remembered)]
        for call in entry.calls:
            call.server = entry.engine
        entry.engine.units += 1
        seen.moves += last_engine is not None and last_engine is not entry.engine

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
        """Ends of units that are not llm and arrivals, up to `now`.

        At one time, ends go first, in the order in which the units began.
        """
        while True:
            todo = [(e.job.arrival, 1, e.job.index, 0, e) for e in jobs if e.begun is None]
            todo += [(t, 0, nth, unit, e) for e in jobs for unit, (t, nth) in e.busy.items()]
            if not todo or min(todo, key=lambda x: x[:3])[0] > now:
                return min((t[0] for t in todo), default=np.inf)
            at, kind, _, unit, entry = min(todo, key=lambda x: x[:3])
            if kind == 1:
                entry.begun = begun()
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

    def forget(at, key):
        """No call will find it; the engine may know."""
        for one in [one for one in at.left if one.key == key and one.kv.of_run]:
            one.kv.of_run = False
            if retention.knows_ends or not one.kv.blocks:
                at.left.remove(one)

    def key_of(call):
        return call.entry.job.index, call.entry.run[call.unit].unit.name, call.number

    def leave(at, call, waits):
        if retention is None:
            return
        forget(at, key_of(call))
        application, name = call.entry.job.application, key_of(call)[1]
        blocks = call.kv // engine.block_tokens
        table = retention.table(name, workload.graphs.get(application), cost)
        kv = LeftKV(application, name, blocks, now, seen.used, waits=waits, table=table)
        kv.wanted = now if waits else None
        seen.used += 1
        if not waits:
            seen.ended[key_of(call)] = blocks
        if blocks:
            at.left.append(SimpleNamespace(key=key_of(call), kv=kv, reach=np.inf, elsewhere=False))

    def fit(at, calls):
        """Give up KV that lies in blocks that requests have."""
        while sum(one.kv.blocks for one in at.left) > engine.blocks - sum(c.blocks for c in calls):
            worst = max(at.left, key=lambda one: retention.rank(one.kv, now))
            worst.kv.blocks -= 1
            if not worst.kv.blocks:
                at.left.remove(worst)

    def find(at, call):
        """Blocks that it finds, and how many are held from it."""
        if retention is None:
            return 0, 0
        mine = [one for one in at.left if one.key == key_of(call) and one.kv.of_run]
        known = call.given + call.produced
        found = 0
        for one in mine:
            shared = known if one.kv.waits else min(shared_tokens(call), known, one.reach)
            found = min(one.kv.blocks, min(shared, known - 1) // engine.block_tokens)
        return found, held_blocks(at) if at.running else 0

    def held_blocks(at):
        if retention is None:
            return 0
        held = [one.kv for one in at.left if not one.elsewhere and retention.holds(one.kv, now)]
        return min(sum(kv.blocks for kv in held), int(retention.limit * engine.blocks))

    def shared_tokens(call):
        return min(int(call.entry.run[call.unit].shared_tokens or 0), call.given)

    def use(at, call, found):
        if retention is None:
            return
        if call.prefilled:
            at.prefilled_again -= found * engine.block_tokens
        else:
            at.looked_up += call.given
            at.found += found * engine.block_tokens
            shared = min(shared_tokens(call), call.given - 1) // engine.block_tokens
            at.findable += min(shared, seen.ended.get(key_of(call), 0)) * engine.block_tokens
        for one in at.left:
            if one.key == key_of(call) and one.kv.of_run:
                one.kv.blocks -= found
        forget(at, key_of(call))
        call.kv = found * engine.block_tokens

    def take(at, victim):
        if engine.preemption == "swap":
            victim.host = victim.blocks
            at.swapped_blocks += victim.blocks
        else:
            at.prefilled_again += victim.kv
            victim.kv = 0
        victim.blocks = 0

    def by_rank(at, calls, order, places):
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
                take(at, victim)
            call.blocks += needed
            at.swapped_blocks += call.host
            call.host = 0
            batch.append((call, n))
            budget -= n
        if engine.preemption in ("recompute", "swap"):
            holders = [c for c in order if c.blocks]
            for victim in holders[engine.max_requests :]:
                take(at, victim)
        return batch

    def give_way(at, call):
        at.running.remove(call)
        leave(at, call, waits=True)
        take(at, call)
        at.preemptions += 1

    def running_first(at, calls, order, places):
        """The same by the rules of vLLM."""
        running = at.running
        waiting = [c for c in order if c not in running]
        if engine.preemption == "recompute":
            free_places = engine.max_requests - len(running)
            worst = sorted(running, key=lambda c: places[id(c)], reverse=True)
            for better, worse in zip(waiting[free_places:], worst, strict=False):
                if not places[id(better)][1] < places[id(worse)][1]:
                    break
                give_way(at, worse)
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
                give_way(at, victim)
                lost = True
                if victim is call:
                    break
            if call not in running:
                break
            call.blocks = -(-(call.kv + n) // engine.block_tokens)
            tokens[id(call)] = n
            budget -= n
        if not lost:
            fit(at, calls)
        for call in [] if lost else order:
            if call in running:
                continue
            found, held = find(at, call)
            free = engine.blocks - sum(c.blocks for c in calls) - held
            known = call.given + call.produced
            fits = -(-known // engine.block_tokens) <= free
            if len(running) == engine.max_requests or budget == 0 or not fits:
                break
            running.append(call)
            use(at, call, found)
            tokens[id(call)] = n = min(known - call.kv, budget)
            call.blocks = -(-(call.kv + n) // engine.block_tokens)
            budget -= n
            fit(at, calls)
        fit(at, calls)
        for entry in {id(c.entry): c.entry for c in order}.values():
            runs = any(c.entry is entry for c in running)
            if runs and not entry.job.running:
                entry.job.started_at = entry.job.attained_service
            entry.job.running = runs
        return [(c, tokens[id(c)]) for c in running if id(c) in tokens]

    def form(at):
        """Begin the next step of an engine, if any of its requests gets tokens."""
        entries = [e for e in jobs if e.engine is at]
        calls = [c for e in entries for c in e.calls if c.produced < c.made]
        places = {id(c): place(c) for c in calls}
        order = sorted(calls, key=lambda c: places[id(c)])
        copied = at.swapped_blocks
        choose = running_first if engine.scheduling == "running_first" else by_rank
        at.batch = batch = choose(at, calls, order, places)
        copied = at.swapped_blocks - copied
        chosen = {id(c) for c, _ in batch}
        if engine.scheduling == "by_rank":
            at.preemptions += sum(c.last and id(c) not in chosen for c in calls)
            for call in calls:
                call.last = id(call) in chosen
        by_place = sorted(
            (e for e in entries if unfinished(e)), key=lambda e: places[id(unfinished(e)[0])]
        )
        for entry in by_place if engine.scheduling == "by_rank" else []:
            runs = any(c.last for c in unfinished(entry))
            if runs and not entry.job.running:
                entry.job.started_at = entry.job.attained_service
            entry.job.running = runs
        for call, _ in batch:
            if call.entry.first_served is None:
                call.entry.first_served = at.firsts
                at.firsts += 1
        if not batch:
            return
        seen.batches.append({(c.entry.job.index, c.unit, c.number): n for c, n in batch})
        decoding = [c for c, n in batch if c.given + c.produced - c.kv == 1 and c.produced]
        tokens = sum(n for _, n in batch)
        kv = sum(c.kv + n for c, n in batch)
        assert tokens <= engine.token_budget
        assert 1 <= len(batch) <= engine.max_requests
        held = sum(c.blocks for c in calls)
        assert held <= engine.blocks
        seconds = engine.step_seconds(tokens - len(decoding), len(decoding), kv, copied)
        at.held_block_seconds += held_blocks(at) * seconds
        at.until = now + seconds
        at.steps += 1
        for call in calls:
            call.block_seconds += call.blocks * seconds
        at.requests += len(batch)
        at.peak_blocks = max(at.peak_blocks, held)

    def end_step(at):
        """The step under way of an engine ends, and with it the units that are over."""
        at.until, running = None, at.running
        for call, n in at.batch:
            call.kv += n
            call.prefilled = max(call.prefilled, min(call.kv, call.given))
            if call.kv == call.given + call.produced:
                call.produced += 1
                call.token_seconds.append(now)
                at.produced += 1
            if call.produced == call.made:
                call.blocks = 0
                if call in running:
                    running.remove(call)
                    leave(at, call, waits=False)
        entries = [e for e in jobs if e.engine is at]
        if engine.scheduling == "running_first":
            for entry in entries:
                entry.job.running = any(c.entry is entry for c in running)
                for call in entry.calls:
                    call.last = call in running
        for entry in entries:
            if entry.calls:
                serve(entry, attained(entry), now)
        ended = []
        for call, _ in at.batch:
            one = call.entry.job.index, call.unit
            if one not in ended and not any(c.unit == call.unit for c in unfinished(call.entry)):
                ended.append(one)
        for index, unit in sorted(ended):
            end(jobs[index], unit, now)

    def has_calls(at):
        return any(c.produced < c.made for e in jobs if e.engine is at for c in e.calls)

    while True:
        upcoming = outside(now)
        ending = [at for at in servers if at.until is not None and at.until <= now]
        idle = [at for at in servers if at.until is None and has_calls(at)]
        if ending:
            end_step(ending[0])
        elif idle:
            form(idle[0])
        else:
            now = min([upcoming, *(at.until for at in servers if at.until is not None)])
            if now == np.inf:
                break
    seen.completion_times = np.array([e.finish for e in jobs])
    seen.completion_steps = np.array([e.steps for e in jobs])
    seen.servers = servers
    for name in COUNTED:
        setattr(seen, name, sum(getattr(at, name) for at in servers))
    seen.peak_blocks = max(at.peak_blocks for at in servers)
    seen.calls.sort(key=lambda c: (c.entry.job.index, c.unit, c.number))
    return seen
