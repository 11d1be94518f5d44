"""Units side by side: what it gives on an engine, what a graph of stages knows, and deadlines.

    python examples/experiments/side_by_side.py --out docs/results

Five generated applications: plans of tools with a join, planned again now and then (as LLMCompiler,
arXiv 2312.04511), a map over chunks and its reduction (as Parrot, arXiv 2405.19888), retrieval
whose first steps do not wait for each other (as Ayo, arXiv 2407.00326), a loop of thoughts and
actions, of which nothing goes side by side, and plans over many tools (as TaskBench, arXiv
2311.18760). They arrive in a Poisson stream at one engine, and are
served as their units become ready, or one unit after the other: the same jobs, policies and
requests. Then: how well a graph that learnt stages foresees what is left of held-out runs, beside
one that learnt the units one after the other. Then: deadlines of twice what a job takes alone,
served by the slack of the sum and of the critical path. 95 % bootstraps over seeds, in pairs.
Writes `side_by_side.json`.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from environment import environment
from tqdm import tqdm

from demand import (
    EDF,
    FCFS,
    Application,
    ClassMean,
    CostModel,
    CurrentUnit,
    DemandEstimator,
    Engine,
    Execution,
    Gittins,
    LeastSlack,
    Oracle,
    PDGraph,
    RandomOrder,
    Unit,
    Workload,
    bootstrap_interval,
    calibrate,
    paired_ratio_interval,
    poisson_workload,
    simulate_engine,
)
from demand.dependencies import parents, stage_numbers
from demand.stages import between_stages, in_stages, progress_after, seconds_after

COST = CostModel()
ENGINE = Engine(max_requests=32, preemption="none")
ALONE = CostModel(1e-4, ENGINE.base_seconds + ENGINE.decode_seconds_per_request)
"""Seconds of a call that has the engine for itself."""
LOADS = (0.3, 0.6, 0.9)
POLICIES = {
    "FCFS": FCFS(),
    "random order": RandomOrder(),
    "class mean": ClassMean(),
    "Gittins": Gittins(),
    "oracle": Oracle(),
}
POINTS = (0, 1, 2, 3, 4, 6, 8)
Run = list[Execution]


def planned(rng: np.random.Generator) -> Run:
    """A plan of one to six tools, some of which wait for others, a join, and maybe another plan."""
    run: Run = []
    again = True
    while again:
        tools = 1 + min(int(rng.poisson(2.0)), 5)
        run.append(_llm("plan", rng, 1200, 30 + 25 * tools))
        first = len(run)
        for at in range(first, first + tools):
            before = tuple(one for one in range(first, at) if rng.random() < 0.25)
            kind = Unit("search", "search") if rng.random() < 0.7 else Unit("math", "tool")
            mean = 1.5 if kind.name == "search" else 0.3
            seconds = rng.lognormal(np.log(mean), 0.7)
            run.append(Execution(kind, seconds=seconds, after=before or (first - 1,)))
        joined = tuple(range(first, first + tools))
        run.append(_llm("join", rng, 600 + 300 * tools, 80, joined))
        again = rng.random() < 0.25
    return run


def mapped(rng: np.random.Generator) -> Run:
    """Four to twelve chunks are summarised, then the summaries."""
    chunks = int(rng.integers(4, 13))
    run = [_llm("map", rng, 1500, 120, ()) for _ in range(chunks)]
    return [*run, _llm("reduce", rng, 120 * chunks, 200, tuple(range(chunks)))]


def retrieved(rng: np.random.Generator) -> Run:
    """The question is embedded while it is expanded; three searches; what they found is ranked."""
    embed = Execution(Unit("embed", "model"), seconds=rng.lognormal(np.log(0.15), 0.3), after=())
    search = Unit("search", "search")
    finds = [
        Execution(search, seconds=rng.lognormal(np.log(0.5), 0.7), after=(0, 1)) for _ in range(3)
    ]
    rank = Execution(
        Unit("rerank", "model"), seconds=rng.lognormal(np.log(0.4), 0.3), after=(2, 3, 4)
    )
    return [_llm("expand", rng, 200, 40), embed, *finds, rank, _llm("answer", rng, 2400, 180)]


def looped(rng: np.random.Generator) -> Run:
    """Two to eight thoughts, each but the last followed by an action."""
    run: Run = []
    for at in range(int(rng.integers(2, 9))):
        if at:
            seconds = rng.lognormal(np.log(1.5), 0.7)
            run.append(Execution(Unit("action", "tool"), seconds=seconds))
        run.append(_llm("thought", rng, 500 + 300 * at, 60))
    return run


def composed(rng: np.random.Generator) -> Run:
    """A plan of two to six of twenty tools, each of which waits for the plan or an earlier one."""
    tools = int(rng.integers(2, 7))
    run = [_llm("plan", rng, 800, 40 + 30 * tools)]
    for at in range(1, tools + 1):
        tool = int(20 * rng.random() ** 2)  # some come more often than others
        seconds = rng.lognormal(np.log(0.5 + 0.2 * tool), 0.5)
        before = int(rng.integers(0, at)) if rng.random() < 0.5 else at - 1
        run.append(Execution(Unit(f"tool {tool}", "tool"), seconds=seconds, after=(before,)))
    return run


APPLICATIONS: dict[str, Callable[[np.random.Generator], Run]] = {
    "plan and join": planned,
    "map and reduce": mapped,
    "retrieval": retrieved,
    "loop": looped,
    "many tools": composed,
}


def _llm(
    name: str, rng: np.random.Generator, given: float, made: float,
    after: tuple[int, ...] | None = None,
) -> Execution:  # fmt: skip
    tokens = [max(1, round(rng.gamma(9.0, mean / 9.0))) for mean in (given, made)]
    return Execution(Unit(name, "llm"), *tokens, after=after)


def in_turn(run: Sequence[Execution]) -> Run:
    """The same units, each of which waits for the one before it."""
    return [replace(execution, after=None) for execution in run]


def drawn(name: str, n: int, seed: int) -> list[Run]:
    """Runs of an application."""
    rng = np.random.default_rng([seed, list(APPLICATIONS).index(name)])
    return [APPLICATIONS[name](rng) for _ in range(n)]


def graphs(seed: int, runs: int = 300) -> dict[str, PDGraph]:
    """By application, learnt from runs of their own."""
    return {name: PDGraph.fit(drawn(name, runs, 1000 + seed), name=name) for name in APPLICATIONS}


def workload(load: float, jobs: int, seed: int) -> Workload:
    """Jobs of all applications, equally many, at a load by what a full batch has of the engine."""
    known = graphs(seed)
    applications = [
        Application(
            name,
            graph.remaining(),
            mean_seconds=graph.remaining().mean(),
            graph=graph,
            sample_runs=lambda rng, n, name=name: [APPLICATIONS[name](rng) for _ in range(n)],
        )
        for name, graph in known.items()
    ]
    drawn_jobs = poisson_workload(applications, 1.0, jobs, seed)
    full = CostModel(
        ENGINE.prefill_seconds_per_token,
        ENGINE.decode_seconds(ENGINE.max_requests, 0, 1) / ENGINE.max_requests,
    )
    assert drawn_jobs.runs is not None
    work = sum(full.seconds(e) for run in drawn_jobs.runs for e in run if e.unit.kind == "llm")
    arrivals = drawn_jobs.arrivals * (work / load / drawn_jobs.arrivals[-1])
    return replace(drawn_jobs, arrivals=arrivals, runs=list(drawn_jobs.runs))


def flat(jobs: Workload) -> Workload:
    """The same jobs, one unit after the other."""
    assert jobs.runs is not None
    return replace(jobs, runs=[in_turn(run) for run in jobs.runs])


def gains(jobs: int, seeds: int) -> list[dict]:
    """Mean completion side by side over one after the other, by load, policy and application."""
    rows = []
    for load in LOADS:
        found: dict[tuple[str, str], list[tuple[float, float]]] = {}
        floor: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for seed in tqdm(range(seeds), desc=f"load {load}"):
            beside = workload(load, jobs, seed)
            assert beside.runs is not None
            paths = np.array([ALONE.run_seconds(run, "critical_path") for run in beside.runs])
            for name, policy in POLICIES.items():
                both = [simulate_engine(one, policy, ENGINE) for one in (beside, flat(beside))]
                ours, theirs = (one.completion_times for one in both)
                of = np.array(beside.applications)
                for application in ("all", *APPLICATIONS):
                    own = (of == application) | (application == "all")
                    key = name, application
                    found.setdefault(key, []).append((ours[own].mean(), theirs[own].mean()))
                    floor.setdefault(key, []).append((ours[own].mean(), paths[own].mean()))
        for (name, application), pairs in found.items():
            rows.append(
                {
                    "load": load,
                    "policy": name,
                    "application": application,
                    "mean_seconds": float(np.mean([ours for ours, _ in pairs])),
                    "over_in_turn": list(paired_ratio_interval(*zip(*pairs, strict=True))),
                    "over_critical_path": list(
                        paired_ratio_interval(*zip(*floor[name, application], strict=True))
                    ),
                }
            )
    return rows


def foreseen(held_out: int, seeds: int) -> list[dict]:
    """What a graph of stages says of held-out runs, beside one of units one after the other."""
    rows = []
    for name in tqdm(APPLICATIONS, desc="calibration"):
        scores: dict[str, list[float]] = {}
        for seed in range(seeds):
            learnt, runs = drawn(name, 300, 1000 + seed), drawn(name, held_out, 2000 + seed)
            flat_runs = [[in_turn(run) for run in each] for each in (learnt, runs)]
            for which, known, asked in (("stages", learnt, runs), ("in turn", *flat_runs)):
                told = DemandEstimator({name: PDGraph.fit(known)}, CurrentUnit())
                report = calibrate(partial(told, name), asked, POINTS)
                scores.setdefault(f"{which}, crps", []).append(report.overall.crps)
                scores.setdefault(f"{which}, covered", []).append(report.overall.coverage[1])
                unseen = told.fallbacks[name, "unit"] / report.overall.runs
                scores.setdefault(f"{which}, unseen", []).append(unseen)
            covered, ratio = paths_foreseen(PDGraph.fit(learnt), runs)
            scores.setdefault("critical path, covered", []).append(covered)
            scores.setdefault("critical path, mean", []).append(ratio)
            scores.setdefault("critical path, stages", []).append(
                np.mean([COST.run_seconds(in_stages(run), "critical_path") for run in runs])
                / np.mean([COST.run_seconds(run, "critical_path") for run in runs])
            )
        crps = scores.pop("stages, crps"), scores.pop("in turn, crps")
        rows.append(
            {"application": name, "crps_over_in_turn": list(paired_ratio_interval(*crps))}
            | {key: list(bootstrap_interval(values)) for key, values in scores.items()}
        )
    return rows


def paths_foreseen(graph: PDGraph, runs: Sequence[Run]) -> tuple[float, float]:
    """The critical path that is left between two stages: share in the 80 % interval, mean ratio."""
    known = DemandEstimator({"": graph}, CurrentUnit(), "critical_path")
    inside, predicted, observed = [], [], []
    for run in map(by_stage, runs):
        for finished in range(len(run)):
            if between_stages(run, finished):
                left = seconds_after(run, finished, COST, "critical_path")
                told = known("", progress_after(run, finished, COST)).condition(0.0)
                inside.append(told.quantile(0.1) <= left <= told.quantile(0.9))
                predicted.append(told.mean())
                observed.append(left)
    return float(np.mean(inside)), float(np.mean(predicted) / np.mean(observed))


def by_stage(run: Run) -> Run:
    """The same run with its units in the order of their stages."""
    waits = [execution.after for execution in run]
    order = np.argsort(stage_numbers(waits), kind="stable").tolist()
    at = {unit: position for position, unit in enumerate(order)}
    return [
        replace(run[unit], after=tuple(at[before] for before in parents(waits)[unit]))
        for unit in order
    ]


def deadlines(jobs: int, seeds: int, factor: float = 2.0, load: float = 0.9) -> list[dict]:
    """Shares of deadlines met: each is `factor` times what the job takes alone."""
    hits: dict[str, list[float]] = {}
    for seed in tqdm(range(seeds), desc="deadlines"):
        beside = workload(load, jobs, seed)
        assert beside.runs is not None
        paths = np.array([ALONE.run_seconds(run, "critical_path") for run in beside.runs])
        timed = replace(beside, deadlines=beside.arrivals + factor * paths)
        path = {n: g.remaining(parallel_calls="critical_path") for n, g in timed.graphs.items()}
        asked = {
            count: DemandEstimator(dict(timed.graphs), CurrentUnit(), count, lag=1e9)
            for count in ("sum", "critical_path")
        }
        serve = partial(simulate_engine, engine=ENGINE)
        slack = LeastSlack(0.5)
        arms = {
            **{name: serve(timed, policy) for name, policy in POLICIES.items()},
            "EDF": serve(timed, EDF()),
            "least slack, sum": serve(timed, slack, estimator=asked["sum"]),
            "least slack, critical path": serve(
                replace(timed, distributions=path), slack, estimator=asked["critical_path"]
            ),
        }
        for name, result in arms.items():
            hits.setdefault(name, []).append(result.deadline_hits)
    first = np.array(hits["least slack, sum"])
    return [
        {
            "policy": name,
            "hits": list(bootstrap_interval(values)),
            "more_than_by_sum": list(bootstrap_interval(np.array(values) - first)),
        }
        for name, values in hits.items()
    ]


def _cell(interval: Sequence[float], form: str = ".2f") -> str:
    return "{:{f}} [{:{f}}, {:{f}}]".format(*interval, f=form)


def gains_table(record: dict) -> str:
    """Mean completion over that of one unit after the other."""
    rows = record["gains"]
    lines = [
        "| application | policy | " + " | ".join(f"load {load}" for load in LOADS) + " |",
        "| --- | --- |" + " ---: |" * len(LOADS),
    ]
    for application in ("all", *APPLICATIONS):
        for policy in POLICIES if application == "all" else ["Gittins"]:
            cells = [
                _cell(row["over_in_turn"])
                for row in rows
                if (row["application"], row["policy"]) == (application, policy)
            ]
            lines.append(f"| {application} | {policy} | {' | '.join(cells)} |")
    ran = record["configuration"]
    return "\n".join(lines) + f"\n\n{ran['seeds']} seeds of {ran['jobs']} jobs.\n"


def orders_table(record: dict) -> str:
    """The same at the highest load, by application and order of service."""
    load = max(record["configuration"]["loads"])
    lines = [f"| policy | {' | '.join(APPLICATIONS)} |", "| --- |" + " ---: |" * len(APPLICATIONS)]
    for policy in POLICIES:
        found = {
            row["application"]: row["over_in_turn"]
            for row in record["gains"]
            if (row["load"], row["policy"]) == (load, policy)
        }
        lines.append(f"| {policy} | {' | '.join(_cell(found[name]) for name in APPLICATIONS)} |")
    return "\n".join(lines) + f"\n\nAt load {load}.\n"


def foreseen_table(record: dict) -> str:
    """Calibration of what is left, by stages and by units one after the other."""
    head = [
        "application", "CRPS, stages / in turn", "never seen", "in 80 %, stages", "in turn",
        "path in 80 %", "path, mean / observed", "stages' path / true",
    ]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    for row in record["foreseen"]:
        keys = [
            *("crps_over_in_turn", "stages, unseen", "stages, covered", "in turn, covered"),
            *("critical path, covered", "critical path, mean", "critical path, stages"),
        ]
        cells = " | ".join(_cell(row[key]) for key in keys)
        lines.append(f"| {row['application']} | {cells} |")
    return "\n".join(lines) + "\n"


def deadlines_table(record: dict) -> str:
    """Shares of deadlines met."""
    lines = ["| policy | deadlines met | more than by the sum |", "| --- | ---: | ---: |"]
    for row in record["deadlines"]:
        cells = f"{_cell(row['hits'], '.1%')} | {_cell(row['more_than_by_sum'], '+.1%')}"
        lines.append(f"| {row['policy']} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--held-out", type=int, default=60)
    args = parser.parse_args()
    record = {
        "configuration": {
            "jobs": args.jobs, "seeds": args.seeds, "held_out": args.held_out, "learnt": 300,
            "engine": repr(ENGINE), "loads": LOADS, "points": POINTS,
            "deadline_factor": 2.0, "deadline_load": 0.9,
        },
        "environment": environment(),
        "gains": gains(args.jobs, args.seeds),
        "foreseen": foreseen(args.held_out, args.seeds),
        "deadlines": deadlines(args.jobs, args.seeds),
    }  # fmt: skip
    tables = gains_table, orders_table, foreseen_table, deadlines_table
    print(*(table(record) for table in tables), sep="\n")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "side_by_side.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
