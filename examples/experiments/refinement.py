"""What does progress tell? Every refinement on real agent runs: calibration, and what it buys.

    python examples/experiments/refinement.py --out docs/results

Runs are split by time: a demand graph is learned from the earlier half of the tasks, and the later
half is predicted (CRPS, coverage) and served: jobs drawn from it arrive at one preemptive server at
load 0.9, ranked by SERPT or Gittins with each refinement. "Gap closed" is the share of the distance
in mean completion time from no refinement to the oracle (SRPT). All intervals are 95 % bootstraps
over the later tasks: of the scores directly, and of the gap over seeds, each of which serves a
resample of these tasks. Beside it, calibration on halves drawn at random, which tells how much a
split by time costs. "First to finish" learns from the half of a batch that was over first, which
are the short runs. Human time does not count. `--only` runs some of the data sets, and keeps what
the JSON has of the others. Writes `refinement.json` and `.png`, and `demand_graph.png`, the graph
of tau-bench.
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from environment import environment

from demand import FCFS, SERPT, Application, CostModel, Distribution, Gittins, Oracle, PDGraph
from demand.policies import LAS, Job, Rank
from demand.policies.wrapper import Wrapper
from demand.refine import (
    CurrentUnit,
    Estimator,
    NearestRuns,
    NoRefinement,
    PearsonFilter,
    ProgressRegression,
    Refinement,
    WholeRuns,
)
from demand.refine.calibration import calibrate
from demand.refine.estimator import DemandEstimator
from demand.simulation.queue.simulate import simulate
from demand.traces import Session, read_agent_sessions, read_fireact, read_tau_bench
from demand.units import Execution, Progress
from demand.workloads import Workload, poisson_workload

Run = list[Execution]
Task = list[Run]
AFTER_UNITS = (0, 1, 2, 4, 8, 16, 32, 64)
REFINEMENTS: dict[str, Refinement] = {
    "none (artifact)": NoRefinement(walks=10_000),
    "whole runs": WholeRuns(),
    "current unit": CurrentUnit(walks=10_000),
    "current unit, other walks": CurrentUnit(walks=10_000, seed=1),
    "Pearson filter": PearsonFilter(walks=500),
    "regression": ProgressRegression(),
    "nearest runs": NearestRuns(),
}
# What no scheduler has: it shows what knowing the number of units would be worth.
HINT = "number of units told"
BLIND = ["FCFS", "LAS"]
ARMS = [*REFINEMENTS, *BLIND, HINT]
DRAWN = "tau-bench, new tasks"
HALVES = 6  # at random
POLICIES = {"SERPT": SERPT(), "Gittins": Gittins()}
CHEAP = ("none (artifact)", "whole runs", "regression", "nearest runs")  # no walk per question


@dataclass(frozen=True)
class DataSet:
    """Finished runs, those of one task together, in the order in which they were asked for."""

    source: str
    tasks: list[Task]

    def by_time(self) -> tuple[list[Task], list[Task]]:
        """The earlier half of the tasks, and the later one."""
        half = len(self.tasks) // 2
        return self.tasks[:half], self.tasks[half:]

    def at_random(self, seed: int) -> tuple[list[Task], list[Task]]:
        """Two halves of the tasks, at random."""
        order = np.random.default_rng(seed).permutation(len(self.tasks))
        first, second = order[: order.size // 2], order[order.size // 2 :]
        return [self.tasks[at] for at in first], [self.tasks[at] for at in second]


def data_sets(folder: Path) -> Iterator[tuple[str, DataSet]]:
    """What there is of the data; seconds that a trace lacks are assumed, as said in the JSON."""
    assumed = {"search": 2.2, "tool": 0.5}
    by_tokens = partial(Session.run, leave_out=("human",), assumed_seconds=assumed)
    source = f"seconds from tokens by the default cost model; assumed {assumed}"
    path = folder / "tau_bench" / "gpt-4o-airline.jsonl.gz"
    if path.exists():
        dialogues = list(read_tau_bench(path))
        tasks: dict[object, Task] = {}
        for session in dialogues:
            tasks.setdefault(session.attributes["task"], []).append(by_tokens(session))
        yield "tau-bench, new tasks", DataSet(source, list(tasks.values()))
        yield "tau-bench, later trials", DataSet(source, [[by_tokens(s)] for s in dialogues])
    asked = list(range(7405))  # of HotpotQA's dev set, in the order of ReAct's evaluation
    random.Random(233).shuffle(asked)
    place = {question: at for at, question in enumerate(asked)}
    for name in ("gpt35", "llama2_7b"):
        path = folder / "fireact_react" / f"hotpotqa_react_{name}.jsonl"
        if path.exists():
            finished = list(read_fireact(path))  # the file has those of few rounds first
            in_order = sorted(finished, key=lambda s: place[int(str(s.attributes["task"]))])
            yield f"ReAct {name}", DataSet(source, [[by_tokens(s)] for s in in_order])
            first = DataSet(source, [[by_tokens(s)] for s in finished])
            yield f"ReAct {name}, first to finish", first
    path = folder / "agent_sessions" / "sessions.jsonl.gz"
    if path.exists():
        sessions = list(read_agent_sessions(path))
        known = [span.seconds for s in sessions for span in s.spans if span.kind == "llm"]
        mean = float(np.mean([seconds for seconds in known if seconds is not None]))
        measured = partial(
            Session.run, leave_out=("human",), llm="measured",
            assumed_seconds=dict.fromkeys(("llm", "subagent_llm"), mean),
        )  # fmt: skip
        source = f"seconds measured; {mean:.3g} s for the calls without (9 %)"
        yield "coding agents", DataSet(source, [[measured(s)] for s in sessions])


def remembering(refine: Estimator) -> Estimator:
    """Asks once for each held-out run and boundary; jobs are drawn from few runs many times."""
    answers: dict[tuple[int, int], Distribution] = {}

    def asked(application: str, progress: Progress) -> Distribution:
        key = id(progress.executed[0]), len(progress.executed)
        if key not in answers:
            answers[key] = refine(application, progress)
        return answers[key]

    return asked


@dataclass(frozen=True)
class OneTableEach(Wrapper):
    """A policy that makes the table of a remembered answer once."""

    made: dict[int, Any] = field(default_factory=dict)

    def rank(self, job: Job, now: float) -> Rank:
        return self.policy.rank(job, now)

    def table(self, distribution: Distribution) -> Any:
        key = id(distribution)
        if key not in self.made:
            self.made[key] = distribution, self.policy.table(distribution)
        return self.made[key][1]


def hinted(workload: Workload, seconds_per_unit: float) -> tuple[Workload, Estimator]:
    """The same jobs, each an application of its own number of units, and what that tells."""
    assert workload.runs is not None
    counts = [str(len(run)) for run in workload.runs]
    told = {n: Distribution([int(n) * seconds_per_unit]) for n in set(counts)}

    def refine(application: str, progress: Progress) -> Distribution:
        return Distribution([(int(application) - len(progress.executed)) * seconds_per_unit])

    return replace(workload, applications=counts, distributions=told), refine


def estimators(training: Sequence[Task]) -> dict[str, DemandEstimator]:
    """One for each refinement, all of one graph."""
    graph = PDGraph.fit([run for task in training for run in task])
    return {name: DemandEstimator({"agent": graph}, r) for name, r in REFINEMENTS.items()}


@dataclass(frozen=True)
class Scores:
    """What predictions scored on each held-out task.

    Attributes:
        questions: `[tasks]` how often it was asked.
        sums: `[tasks, 4]` CRPS in seconds, and how often it was inside of each of the intervals.
        pits: of all questions.
    """

    questions: np.ndarray
    sums: np.ndarray
    pits: np.ndarray

    @classmethod
    def of(cls, estimator: DemandEstimator, tasks: Sequence[Task]) -> "Scores":
        """Ask at every progress point of every run."""
        ask = partial(estimator, "agent")
        found = [
            calibrate(ask, task, AFTER_UNITS, seed=at).overall for at, task in enumerate(tasks)
        ]
        asked = np.array([each.runs for each in found])
        means = np.array([(each.crps, *each.coverage) for each in found])
        return cls(asked, means * asked[:, None], np.concatenate([each.pits for each in found]))

    def means(self, chosen: np.ndarray) -> np.ndarray:
        """`[..., 4]` over all questions of the tasks `chosen` `[..., n]`."""
        return self.sums[chosen].sum(axis=-2) / self.questions[chosen].sum(axis=-1)[..., None]


def calibration(scores: dict[str, Scores]) -> dict:
    """By refinement: CRPS, its ratio to none and coverage, with intervals over tasks."""
    tasks = next(iter(scores.values())).questions.size
    drawn = np.random.default_rng(0).integers(tasks, size=(5000, tasks))
    everyone = np.arange(tasks)
    none, none_drawn = (scores["none (artifact)"].means(c)[..., 0] for c in (everyone, drawn))
    found = {}
    for name, mine in scores.items():
        whole, resampled = mine.means(everyone), mine.means(drawn)
        bounds = np.quantile(resampled[:, 1:], [0.025, 0.975], axis=0)
        histogram, _ = np.histogram(mine.pits, 10, (0.0, 1.0))
        found[name] = {
            "crps_seconds": float(whole[0]),
            "crps_ratio_to_none": float(whole[0] / none),
            "crps_ratio_interval": np.quantile(
                resampled[:, 0] / none_drawn, [0.025, 0.975]
            ).tolist(),
            "coverage_50_80_95": whole[1:].tolist(),
            "coverage_intervals": bounds.T.tolist(),
            "pit_histogram": (histogram * 10 / mine.pits.size).tolist(),
        }
    return found


def at_random(data: DataSet) -> dict:
    """The same figures over halves at random, for the refinements that answer quickly."""
    rows = []
    for seed in range(HALVES):
        training, held_out = data.at_random(seed)
        known = estimators(training)
        rows.append(calibration({name: Scores.of(known[name], held_out) for name in CHEAP}))
    return {
        name: {
            figure: np.mean([row[name][figure] for row in rows], axis=0).tolist()
            for figure in ("crps_ratio_to_none", "coverage_50_80_95")
        }
        for name in CHEAP
    }


def served(
    known: dict[str, DemandEstimator],
    asked: dict[str, Estimator],
    ranks: dict[tuple[str, str], OneTableEach],
    data: DataSet,
    seed: int,
    jobs: int,
) -> dict[str, float]:
    """Mean completion seconds by policy and refinement, on a resample of the later tasks."""
    training, held_out = data.by_time()
    chosen = np.random.default_rng(seed).integers(len(held_out), size=len(held_out))
    runs = [run for at in chosen for run in held_out[at]]
    cost = CostModel()
    mean = float(np.mean([cost.run_seconds(run) for run in runs]))
    none = known["none (artifact)"]
    application = Application(
        "agent", none("agent"), mean_seconds=mean, graph=none.graphs["agent"],
        sample_runs=lambda rng, n: [runs[at] for at in rng.integers(len(runs), size=n)],
    )  # fmt: skip
    workload = poisson_workload([application], 0.9, jobs, seed)
    means = {
        "FCFS": simulate(workload, FCFS()).mean,
        "LAS": simulate(workload, LAS(quantum=mean / 100)).mean,
        "oracle": simulate(workload, Oracle()).mean,
    }
    earlier = [run for task in training for run in task]
    told, hint = hinted(workload, sum(map(cost.run_seconds, earlier)) / sum(map(len, earlier)))
    for name in REFINEMENTS:
        at_start = replace(workload, distributions={"agent": known[name]("agent")})
        # What only counts seconds is the same asked at every boundary or not at all.
        aged = isinstance(REFINEMENTS[name], NoRefinement | WholeRuns)
        refine = None if aged else asked[name]
        for kind in POLICIES:
            policy = ranks[kind, name]
            means[f"{kind}, {name}"] = simulate(at_start, policy, estimator=refine).mean
    for kind, policy in POLICIES.items():
        means[f"{kind}, {HINT}"] = simulate(told, policy, estimator=hint).mean
    return means


def gap_closed(means: Sequence[dict], arm: str, none: str) -> dict[str, float]:
    """Share of the gap from `none` to the oracle, and its 95 % bootstrap interval over seeds."""
    ours, base, best = (np.array([m[name] for m in means]) for name in (arm, none, "oracle"))
    drawn = np.random.default_rng(0).integers(ours.size, size=(5000, ours.size))
    closed = (base - ours)[drawn].mean(axis=1) / (base - best)[drawn].mean(axis=1)
    low, high = np.quantile(closed, [0.025, 0.975])
    estimate = (base - ours).mean() / (base - best).mean()
    return {"share": float(estimate), "low": float(low), "high": float(high)}


def experiment(data: DataSet, seeds: int, jobs: int) -> dict:
    """What goes into the JSON for one data set."""
    training, held_out = data.by_time()
    known = estimators(training)
    scores = {name: Scores.of(estimator, held_out) for name, estimator in known.items()}
    asked = {name: remembering(estimator) for name, estimator in known.items()}
    ranks = {
        (kind, name): OneTableEach(policy)  # of all seeds: they ask about the same runs
        for kind, policy in POLICIES.items()
        for name in known
    }
    means = [served(known, asked, ranks, data, seed, jobs) for seed in range(seeds)]
    closed = {
        kind: {
            name: gap_closed(
                means, name if name in BLIND else f"{kind}, {name}", f"{kind}, none (artifact)"
            )
            for name in ARMS
        }
        for kind in POLICIES
    }
    return {
        "calibration": calibration(scores),
        "calibration_on_random_halves": at_random(data),
        "gap_closed": closed,
        "mean_completion_seconds": {name: [m[name] for m in means] for name in means[0]},
    }


def markdown(results: dict) -> str:
    """The tables of docs/demand_graphs.md, from the results of the JSON."""
    return "\n".join([*_by_time(results), "", *_random_halves(results)]) + "\n"


def _by_time(results: dict) -> list[str]:
    lines = [
        "| refinement | CRPS / none | in 50 / 80 / 95 % | gap closed, SERPT | Gittins |",
        "|---|---|---|---|---|",
    ]
    for name, result in results.items():
        means = {arm: np.mean(v) for arm, v in result["mean_completion_seconds"].items()}
        base = means["SERPT, none (artifact)"]
        context = ", ".join(f"{arm} {means[arm] / base:.2f}" for arm in ("FCFS", "oracle"))
        lines.append(f"| **{name}** (mean / SERPT's: {context}) | | | | |")
        for arm in ARMS:
            cells = [arm, "", ""]
            if arm in REFINEMENTS:
                row = result["calibration"][arm]
                low, high = row["crps_ratio_interval"]
                ratio = f"{row['crps_ratio_to_none']:.3f} [{low:.2f}, {high:.2f}]"
                cells = [arm, ratio, _covered(row)]
            for kind in POLICIES:
                share = result["gap_closed"][kind][arm]
                cells.append("{share:.0%} [{low:.0%}, {high:.0%}]".format(**share))
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _random_halves(results: dict) -> list[str]:
    lines = [
        "| split | refinement | CRPS / none | random | in 50 / 80 / 95 | random | 80: 95 % |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        for arm in CHEAP:
            rows = [result[of][arm] for of in ("calibration", "calibration_on_random_halves")]
            ratios = [f"{row['crps_ratio_to_none']:.3f}" for row in rows]
            low, high = rows[0]["coverage_intervals"][1]
            interval = f"[{100 * low:.0f}, {100 * high:.0f}]"
            cells = [name, arm, *ratios, *map(_covered, rows), interval]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _covered(row: dict) -> str:
    return " / ".join(f"{100 * share:.0f}" for share in row["coverage_50_80_95"])


def picture(results: dict, path: Path) -> None:
    """Gap closed by refinement and policy, and PIT histograms, a column for each data set."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(results), 6.6), layout="constrained")
    axes = figure.subplots(2, len(results), squeeze=False)
    arms = ARMS[1:]
    for column, (name, result) in enumerate(results.items()):
        ax = axes[0, column]
        for offset, (kind, colour) in enumerate(zip(POLICIES, ("#4477aa", "#cc6677"), strict=True)):
            shares = [result["gap_closed"][kind][arm] for arm in arms]
            y = np.arange(len(arms)) + 0.18 * (2 * offset - 1)
            centre = [100 * s["share"] for s in shares]
            error = [[100 * (s["share"] - s["low"]) for s in shares],
                     [100 * (s["high"] - s["share"]) for s in shares]]  # fmt: skip
            ax.errorbar(centre, y, xerr=error, fmt="o", color=colour, label=kind, markersize=4)
        ax.axvline(0, color="black", linewidth=0.8)
        ax.axvline(100, color="black", linewidth=0.8, linestyle=":")
        ax.set(title=name, xlabel="% of the gap to the oracle closed", ylim=(len(arms) - 0.5, -0.5))
        ax.set_yticks(range(len(arms)), arms if column == 0 else [""] * len(arms))
        ax = axes[1, column]
        for arm in ("none (artifact)", "Pearson filter", "regression", "nearest runs"):
            histogram = result["calibration"][arm]["pit_histogram"]
            ax.stairs(histogram, np.linspace(0, 1, len(histogram) + 1), label=arm)
        ax.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
        ax.set(xlabel="PIT of the remaining seconds", ylim=(0, None))
    axes[0, 0].legend(frameon=False)
    axes[1, 0].legend(frameon=False, fontsize=8)
    axes[1, 0].set_ylabel("density (1: calibrated)")
    figure.savefig(path, dpi=110)


def kept_results(folder: Path | None, document: dict) -> dict[str, tuple[dict, dict]]:
    """Results and description of the data sets in the JSON of an earlier run like this one."""
    path = folder / "refinement.json" if folder else None
    if path is None or not path.exists():
        return {}
    earlier = json.loads(path.read_text())
    if earlier["configuration"] != json.loads(json.dumps(document["configuration"])):
        raise SystemExit(f"{path} is of another configuration; leave out --only")
    return {name: (found, earlier["data"][name]) for name, found in earlier["results"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    root = Path(__file__).resolve().parents[2]
    parser.add_argument("--data", type=Path, default=root.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, help="folder for refinement.json and .png")
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="data sets to run")
    arguments = parser.parse_args()
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    document: dict = {
        "configuration": {
            "split": "the earlier half of the tasks and the later one",
            "random_halves": HALVES, "seeds": arguments.seeds, "jobs": arguments.jobs,
            "load": 0.9, "servers": 1,
            "after_units": AFTER_UNITS, "cost": asdict(CostModel()),
            "refinements": {name: repr(r) for name, r in REFINEMENTS.items()},
        },
        "environment": environment(),
        "data": {},
        "results": {},
    }  # fmt: skip
    results = document["results"]
    kept = kept_results(arguments.out, document) if arguments.only else {}
    for name, data in data_sets(arguments.data):
        if arguments.only and name not in arguments.only:
            if name in kept:
                results[name], document["data"][name] = kept[name]
            continue
        results[name] = experiment(data, arguments.seeds, arguments.jobs)
        runs = [run for task in data.tasks for run in task]
        document["data"][name] = {
            "runs": len(runs), "tasks": len(data.tasks), "source": data.source,
            "commit": document["environment"]["commit"],
        }  # fmt: skip
        print(markdown({name: results[name]}), flush=True)
        if arguments.out and name == DRAWN:
            ax = PDGraph.fit(runs, name=name).figure()
            ax.figure.savefig(arguments.out / "demand_graph.png", dpi=80)
    if not results:
        raise SystemExit(f"there is no data under {arguments.data}; say where it is with --data")
    if arguments.out:
        (arguments.out / "refinement.json").write_text(json.dumps(document, indent=1) + "\n")
        picture(results, arguments.out / "refinement.png")


if __name__ == "__main__":
    main()
