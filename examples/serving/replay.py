"""Recorded calls served again on a virtual clock: other orders, other loads, many more arrivals.

A call takes the processor seconds that it took when it was recorded, and brings what it brought.
"""

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from serving.applications import Task
from serving.knowledge import Knowledge
from serving.library import Page
from serving.loop import Running, VirtualClock, serve_stream
from serving.model_server import Served

from demand import FCFS, ClassMean, Execution, Gittins, Oracle, Policy, RandomOrder, Unit

POLICIES: dict[str, Policy] = {
    "FCFS": FCFS(),
    "random": RandomOrder(),
    "class mean": ClassMean(),
    "Gittins": Gittins(),
    "oracle": Oracle(),
}


def replays(
    recorded: Mapping[str, Sequence[tuple[Task, Sequence[Served]]]],
    library: Sequence[Page],
    knowledge: Knowledge,
    loads: Sequence[float],
    *,
    applications: int,
    seeds: int,
    done: Callable[[], None] = lambda: None,
) -> list[dict]:
    """Every policy on every arm at every load, the same applications and arrivals for all.

    Args:
        recorded: by arm, tasks with their calls; the first arm is the one that loads are of.
        library: the pages.
        knowledge: for the policies.
        loads: processor seconds of the first arm that arrive in a second.
        applications: of a stream, drawn from the recorded ones.
        seeds: streams.
        done: is told of each row.
    """
    first = next(iter(recorded))
    mean = statistics.fmean(sum(call.processor_seconds for call in of) for _, of in recorded[first])
    rows = []
    for load in loads:
        for arm, pool in recorded.items():
            for name, policy in POLICIES.items():
                means, p95s = [], []
                for seed in range(seeds):
                    times = _replay(
                        pool, library, knowledge, policy, mean / load, applications, seed
                    )
                    means.append(statistics.fmean(times))
                    p95s.append(statistics.quantiles(times, n=20)[-1])
                rows.append({"load": load, "arm": arm, "order": name, "means": means, "p95s": p95s})
                done()
    return rows


def _replay(
    pool: Sequence[tuple[Task, Sequence[Served]]],
    library: Sequence[Page],
    knowledge: Knowledge,
    policy: Policy,
    between: float,
    count: int,
    seed: int,
) -> list[float]:
    """Completion times of a stream drawn from recorded applications."""
    draw = random.Random(f"replay {seed}")
    second, arrivals, calls, demands = 0.0, [], {}, {}
    for number in range(count):
        task, served = pool[draw.randrange(len(pool))]
        arrivals.append((second, replace(task, number=number)))
        calls[number] = served
        demands[number] = sum(
            knowledge.cost.seconds(Execution(_UNIT, each.computed_tokens, each.new_tokens))
            for each in served
        )
        second += draw.expovariate(1.0 / between)

    def serve(running: Running, at_token: Callable[[], None]) -> Served:
        call = calls[running.task.number][len(running.served)]
        return replace(call, seconds=call.processor_seconds)

    finished = serve_stream(
        arrivals, library, serve, policy, knowledge, VirtualClock(), seed=seed, demands=demands
    )
    failed = [one.error for one in finished if one.error]
    if failed:
        raise RuntimeError(f"{len(failed)} replayed applications failed, the first by {failed[0]}")
    return [one.completion for one in finished]


_UNIT = Unit("call", "llm")
