"""Policies against first come, first served, on the same jobs for every seed."""

import dataclasses
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from inspect import signature
from typing import Any

import numpy as np
from numpy.typing import NDArray

from demand.arguments import check_callable, check_instance, renamed_keyword, whole_number
from demand.comparison import Comparison
from demand.errors import DemandError
from demand.policies.base import Policy, check_policy
from demand.policies.fcfs import FCFS
from demand.refine.base import Estimator
from demand.refine.predictor import Predictor
from demand.simulation.engine import Engine, simulate_engine
from demand.simulation.queue.simulate import simulate
from demand.simulation.result import Result
from demand.sweep import bar, checked_workers, spread
from demand.workloads.closed_loop import ClosedLoop
from demand.workloads.workload import Workload

METRICS = {
    "mean_seconds": "completion time, mean over jobs",
    "p95_seconds": "completion time, 0.95-quantile over jobs",
    "mean_to_fcfs": "mean_seconds over that of FCFS on the same jobs",
    "p95_to_fcfs": "p95_seconds over that of FCFS on the same jobs",
    "mean_slowdown": "completion time over demand, mean over jobs with a demand",
    "preemptions": "times a running job was put back to wait; on an engine, a request",
    "deadline_misses": "share of the jobs with a deadline that missed it",
}
"""What `compare` measures for each seed."""

FURTHER = {
    "p50_seconds": "completion time, median over jobs",
    "p99_seconds": "completion time, 0.99-quantile over jobs",
    "p99_slowdown": "completion time over demand, 0.99-quantile over jobs with a demand",
    "jain": "Jain's index of demand over completion time: 1 if all jobs fare alike",
    "deadline_hits": "share of the jobs with a deadline that met it",
}
"""What `compare` measures if `also` names it."""

FURTHER_OF_ENGINE = {
    "mean_completion_steps": "steps begun from arrival to finish, mean over jobs",
    "steps": "how many the engine carried out",
    "busy_seconds": "what the steps took",
    "mean_batch": "requests in a step, on average",
    "prefilled_again": "tokens whose KV was lost and computed again",
    "swapped_blocks": "blocks copied to the host or back",
    "peak_blocks": "the most blocks held at once",
    "p50_ttft_seconds": "time to first token, median over requests",
    "p95_ttft_seconds": "time to first token, 0.95-quantile over requests",
    "p99_ttft_seconds": "time to first token, 0.99-quantile over requests",
    "p50_tbt_seconds": "time between tokens, median over all gaps",
    "p95_tbt_seconds": "time between tokens, 0.95-quantile over all gaps",
    "p99_tbt_seconds": "time between tokens, 0.99-quantile over all gaps",
    "kv_block_seconds": "blocks of KV held on the device, times the seconds they were held",
    "prefix_misses": "share of the prompt tokens whose KV was not found from a call before",
    "held_block_seconds": "blocks of KV kept from requests that wait, times the seconds of steps",
}
"""The same, where there is an engine."""

DRAWN = ("mean_to_fcfs", "p95_to_fcfs")

HIGHER_IS_BETTER = frozenset({"jain", "deadline_hits"})

REFERENCE = "FCFS"

Served = tuple[str, dict[str, dict[str, float]]]
"""What the jobs of a seed are, and what was measured of them, by arm."""


@renamed_keyword("refine", "estimator")
def compare(
    workload: Callable[..., Workload | ClosedLoop],
    policies: Sequence[Policy] | Mapping[str, Policy],
    seeds: Iterable[int],
    *,
    servers: int = 1,
    engine: Engine | None = None,
    estimator: Estimator | None = None,
    predictor: Predictor | None = None,
    also: Sequence[str] = (),
    workers: int | str = 1,
    progress: bool = True,
    seed: int = 0,
) -> Comparison:
    """Serve the jobs of every seed under FCFS and under each policy.

    All arms serve what is drawn of a seed, so that they share arrivals and demands. Each run starts
    anew: what a policy remembers of one is gone in the next. A worker serves whole seeds, and has
    copies of the arguments; the numbers are those of one process.

    Args:
        workload: called with `seed=`, gives the jobs of that seed, such as
            `functools.partial(hermes_mix, load=0.9, jobs=2000)`. To compare on one recorded
            workload, let the seed draw its arrivals (`with_arrivals`) or take another part of it.
        policies: what to compare, each named by its class and by what it has other than the
            defaults: "Gittins", "LAS(quantum=20.0)". Or a mapping that gives names. `FCFS()` is the
            reference, whether it is among them or not.
        seeds: at least two, of the workloads and of what `RandomOrder` draws.
        servers: how many jobs are served at once, by `simulate`.
        engine: serves the runs of the jobs in batches instead, by `simulate_engine`.
        estimator: a `DemandEstimator`, or any other answer to how much is left, for all arms alike.
        predictor: what says it from a call before its first token, for all arms.
        also: what to measure besides `METRICS`, of `FURTHER`, and of `FURTHER_OF_ENGINE` where
            there is an engine.
        workers: how many processes serve at once, by joblib, or a Ray cluster, "ray://HOST:PORT";
            see `demand.sweep.spread`.
        progress: whether to show a bar, where tqdm is installed.
        seed: of the intervals.

    Returns:
        A `Comparison` over seeds, FCFS first. What a workload does not have is left out:
        `deadline_misses` where no job has a deadline, slowdowns where none has a demand.

    Raises:
        DemandError: a workload that is no function of a seed, no policies, what is no policy, two
            arms of one name, fewer than two seeds (an interval over one would have no width, and
            `simulate(...).summary()` gives its figures), a seed given twice, servers that are not a
            whole number of at least 1 or are given beside an engine, an unknown metric, workers
            that are none; before anything runs. Later, seeds that change nothing, a cluster that
            cannot be reached, and as `simulate` or `simulate_engine`, with a note of the run.
    """
    _check_workload(workload)
    arms = _named(policies)
    drawn_by = _distinct(seeds)
    seed = whole_number("seed", seed, least=0)
    servers = whole_number("servers", servers, least=1)
    if engine is not None:
        check_instance("engine", engine, Engine, "an engine, such as Engine(max_requests=64)")
        if servers != 1:
            raise DemandError(
                f"servers is {servers} and an engine is given, which serves by its own limits: "
                "give Engine(max_requests=...), or servers alone"
            )
    metrics = _metrics(also, engine)
    workers = checked_workers(workers)
    seeds_served = _Seeds(workload, arms, servers, engine, estimator, predictor)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    described = ""
    if workers == 1:
        serving = seeds_served.one_by_one(drawn_by, progress)
    else:
        serving = spread(
            seeds_served, drawn_by, workers, named=_seed, what="seeds", progress=progress
        )
    with closing(serving) as served:
        for count, (each, (jobs, figures)) in enumerate(zip(drawn_by, served, strict=True), 1):
            described = described or jobs
            for name, found in figures.items():
                rows[name].append(found)
            if count == 2 and all(_alike(one, two) for one, two in rows.values()):
                raise DemandError(
                    f"seeds {drawn_by[0]} and {each} gave the same under every policy; expected "
                    "workload to draw other jobs for another seed: pass its seed= on"
                )
    settings = {
        "workload": described,
        "policies": {name: repr(policy) for name, policy in arms.items()},
        "seeds": list(drawn_by),
        "servers": servers if engine is None else None,
        "engine": None if engine is None else _settings_of(engine),
        "estimator": None if estimator is None else repr(estimator),
        "predictor": None if predictor is None else repr(predictor),
        "seed": seed,
    }
    return Comparison(_measured(rows, metrics), "seeds", HIGHER_IS_BETTER, settings, seed, DRAWN)


class _Seeds:
    """Draws the jobs of a seed, and serves them under every arm."""

    def __init__(
        self,
        workload: Callable[..., Workload | ClosedLoop],
        arms: dict[str, Policy],
        servers: int,
        engine: Engine | None,
        estimator: Estimator | None,
        predictor: Predictor | None,
    ) -> None:
        self._workload, self._arms, self._servers = workload, arms, servers
        self._engine, self._estimator, self._predictor = engine, estimator, predictor

    def __call__(self, seed: int, advance: Callable[[], Any] = lambda: None) -> Served:
        """What the jobs are, and what was measured under each arm; an error says of which."""
        at = "the jobs were drawn"
        try:
            jobs = self._workload(seed=seed)
            figures = {}
            for name, policy in self._arms.items():
                at = f"{name!r} served them"
                figures[name] = _figures(self._served(jobs, policy, seed))
                advance()
        except Exception as error:
            error.add_note(f"of seed {seed}, when {at}")
            raise
        return repr(jobs), figures

    def one_by_one(self, seeds: Sequence[int], progress: bool) -> Generator[Served, None, None]:
        """In this process, with a bar of the runs."""
        with bar(len(seeds) * len(self._arms), "runs", progress) as advance:
            for seed in seeds:
                yield self(seed, advance)

    def _served(self, jobs: Workload | ClosedLoop, policy: Policy, seed: int) -> Result:
        if self._engine is None:
            return simulate(jobs, policy, self._servers, seed, self._estimator, self._predictor)
        return simulate_engine(
            jobs,
            policy,
            self._engine,
            estimator=self._estimator,
            predictor=self._predictor,
            seed=seed,
        )


def _seed(seed: int) -> str:
    return f"seed {seed}"


def _settings_of(engine: Engine) -> dict[str, Any]:
    """Its fields; the rule of retention by its repr, since its fields do not say which it is."""
    rule = engine.retention
    return dataclasses.asdict(engine) | {"retention": None if rule is None else repr(rule)}


def _figures(result: Result) -> dict[str, float]:
    """What one run measured, but for what is relative to another."""
    summary = result.summary()
    return summary | {"deadline_misses": 1.0 - summary["deadline_hits"]}


def _alike(first: dict[str, float], second: dict[str, float]) -> bool:
    return np.array_equal(list(first.values()), list(second.values()), equal_nan=True)


def _measured(
    rows: dict[str, list[dict[str, float]]], metrics: Sequence[str]
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Numbers by arm and metric, `[seeds]`, without what the workload does not have."""
    columns = {
        arm: {name: np.array([row[name] for row in found], float) for name in found[0]}
        for arm, found in rows.items()
    }
    reference = next(iter(columns.values()))
    for mine in columns.values():
        for what in ("mean", "p95"):
            with np.errstate(divide="ignore", invalid="ignore"):  # jobs without a demand take none
                ratio = mine[f"{what}_seconds"] / reference[f"{what}_seconds"]
            mine[f"{what}_to_fcfs"] = ratio
    there = [name for name in metrics if not np.isnan(reference[name]).all()]
    return {arm: {name: mine[name] for name in there} for arm, mine in columns.items()}


def _check_workload(workload: object) -> None:
    """Refuse what cannot be asked for the jobs of a seed."""
    if isinstance(workload, Workload | ClosedLoop):
        raise DemandError(
            f"workload is one {type(workload).__name__}, and seeds would change nothing but what "
            "RandomOrder draws; expected a function of seed: give one that draws its arrivals, as "
            'lambda seed: with_arrivals(workload, times, "resampled", seed), or call simulate'
        )
    expected = "a function of seed, such as functools.partial(hermes_mix, load=0.9, jobs=2000)"
    check_callable("workload", workload, expected)
    assert callable(workload)
    try:
        signature(workload).bind(seed=0)
    except TypeError as error:
        raise DemandError(
            f"workload is {workload!r:.200}, which cannot be called as workload(seed=0) "
            f"({error}); expected {expected}"
        ) from error


def _named(policies: Sequence[Policy] | Mapping[str, Policy]) -> dict[str, Policy]:
    """Arms by name, each name once, first come, first served before all others."""
    if isinstance(policies, Mapping):
        pairs = list(policies.items())
    elif isinstance(policies, list | tuple):
        for at, policy in enumerate(policies):
            check_policy(f"policies[{at}]", policy)
        pairs = [(_name(policy), policy) for policy in policies]
    else:
        given = f"the class {policies.__name__}" if isinstance(policies, type) else repr(policies)
        raise DemandError(
            f"policies is {given:.200}; expected a list of policies, such as [Gittins()], or a "
            "mapping that names them"
        )
    if not pairs:
        raise DemandError("policies is empty; expected at least one, such as [Gittins()]")
    arms: dict[str, Policy] = {}
    for name, policy in pairs:
        if not isinstance(name, str):
            raise DemandError(f"an arm is named {name!r}; expected text")
        check_policy(f"policy {name!r}", policy)
        if name in arms:
            raise DemandError(f"two arms are named {name!r}: give a mapping of names to policies")
        arms[name] = policy
    reference = next((name for name, policy in arms.items() if isinstance(policy, FCFS)), None)
    if reference is None and REFERENCE in arms:
        raise DemandError(
            f"the arm {REFERENCE!r} is {arms[REFERENCE]!r}; expected another name for it: that one "
            "is of the reference, FCFS()"
        )
    return {reference or REFERENCE: FCFS()} | arms


def _name(policy: Policy) -> str:
    """Class of a policy, and what it has other than the defaults."""
    name = type(policy).__name__
    if not dataclasses.is_dataclass(policy):
        return name
    said = []
    for field in dataclasses.fields(policy):
        value = getattr(policy, field.name)
        if isinstance(value, Policy):
            said.append(_name(value))
        elif value != field.default:
            said.append(f"{field.name}={value!r}")
    return f"{name}({', '.join(said)})" if said else name


def _distinct(seeds: Iterable[int]) -> tuple[int, ...]:
    """At least two seeds, each once."""
    if isinstance(seeds, str | bytes) or not isinstance(seeds, Iterable):
        raise DemandError(f"seeds is {seeds!r:.200}; expected whole numbers, such as range(8)")
    found = tuple(whole_number(f"seeds[{at}]", each, least=0) for at, each in enumerate(seeds))
    repeated = next((each for at, each in enumerate(found) if each in found[:at]), None)
    if repeated is not None:
        raise DemandError(f"seed {repeated} is given twice; expected each once: its jobs are one")
    if len(found) < 2:
        raise DemandError(
            f"seeds are {list(found)}; expected at least two, an interval over fewer having no "
            "width: for one, take simulate(workload(seed=0), policy).summary()"
        )
    return found


def _metrics(also: Sequence[str], engine: Engine | None) -> list[str]:
    """Names of what is measured, in the order of the table."""
    known = FURTHER if engine is None else FURTHER | FURTHER_OF_ENGINE
    if isinstance(also, str) or not isinstance(also, Sequence):
        raise DemandError(f"also is {also!r:.200}; expected a list of {', '.join(known)}")
    for name in also:
        if name not in known:
            where = "" if engine or name not in FURTHER_OF_ENGINE else " without an engine"
            raise DemandError(
                f"also has {name!r}, which is not to be had{where}; expected of {', '.join(known)}"
            )
    return list(dict.fromkeys([*METRICS, *also]))
