"""Recorded calls served again on a virtual clock: other orders, other loads, many more arrivals.

A call takes the seconds that it took by the clock of the run, and brings what it brought.
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

from demand import FCFS, ClassMean, Gittins, Oracle, Policy, RandomOrder

POLICIES: dict[str, Policy] = {
    "FCFS": FCFS(),
    "random": RandomOrder(),
    "class mean": ClassMean(),
    "Gittins": Gittins(),
    "oracle": Oracle(),
}


Recorded = Sequence[tuple[Task, Sequence[Sequence[Served]]]]
"""Tasks, each with one or more recordings of the same calls."""
Drawn = list[tuple[Task, list[Served]]]


def replays(
    recorded: Mapping[str, Recorded],
    library: Sequence[Page],
    knowledge: Mapping[str, Knowledge],
    loads: Sequence[float],
    *,
    applications: int,
    seeds: int,
    done: Callable[[], None] = lambda: None,
) -> list[dict]:
    """Every policy on every arm at every load, the same applications and arrivals for all.

    Each stream is of a bootstrap sample of what was recorded: of the tasks, and of the recordings
    of each. Thus streams differ as other tasks and other recordings would.

    Args:
        recorded: by arm, the same tasks for all; the first arm is the one that loads are of.
        library: the pages.
        knowledge: for the policies, by arm.
        loads: seconds of the first arm that arrive in a second.
        applications: of a stream, drawn from the sample.
        seeds: streams.
        done: is told of each row.

    Returns:
        Rows of `load`, `arm`, `own_load` (the seconds of this arm that arrive in a second),
        `order`, and of each stream the mean and the 95th percentile of the completion times.
    """
    drawn = {arm: [_sample(arm, pool, s) for s in range(seeds)] for arm, pool in recorded.items()}
    means_of = {arm: [_mean_seconds(each) for each in of] for arm, of in drawn.items()}
    first = means_of[next(iter(recorded))]
    rows = []
    for load in loads:
        for arm, samples in drawn.items():
            own = statistics.fmean(m / f for m, f in zip(means_of[arm], first, strict=True)) * load
            for name, policy in POLICIES.items():
                means, p95s = [], []
                for seed, sample in enumerate(samples):
                    between = first[seed] / load
                    times = _replay(
                        sample, library, knowledge[arm], policy, between, applications, seed
                    )
                    means.append(statistics.fmean(times))
                    p95s.append(statistics.quantiles(times, n=20)[-1])
                row = {"load": load, "arm": arm, "own_load": own, "order": name}
                rows.append({**row, "means": means, "p95s": p95s})
                done()
    return rows


def _sample(arm: str, pool: Recorded, seed: int) -> Drawn:
    """As many tasks, drawn with replacement and alike for all arms; each call by the mean of its
    recordings, which are drawn so as well."""
    draw, recordings = random.Random(f"sample {seed}"), random.Random(f"recordings {arm} {seed}")
    drawn = []
    for task, recorded in draw.choices(pool, k=len(pool)):
        some = recordings.choices(recorded, k=len(recorded))
        calls = [
            replace(of[0], seconds=statistics.fmean(each.seconds for each in of))
            for of in zip(*some, strict=True)
        ]
        drawn.append((task, calls))
    return drawn


def _mean_seconds(drawn: Drawn) -> float:
    """Of an application."""
    return statistics.fmean(sum(call.seconds for call in calls) for _, calls in drawn)


def _replay(
    pool: Drawn,
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
        demands[number] = sum(each.seconds for each in served)
        second += draw.expovariate(1.0 / between)

    def serve(running: Running, at_token: Callable[[], None]) -> Served:
        return calls[running.task.number][len(running.served)]

    finished = serve_stream(
        arrivals,
        library,
        serve,
        policy,
        knowledge,
        VirtualClock(),
        seed=seed,
        demands=demands if isinstance(policy, Oracle) else None,
    )
    failed = [one.error for one in finished if one.error]
    if failed:
        raise RuntimeError(f"{len(failed)} replayed applications failed, the first by {failed[0]}")
    return [one.completion for one in finished]
