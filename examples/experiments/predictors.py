"""What does a prompt tell before the first token? Its length, and what a small model makes of it.

    python examples/experiments/predictors.py --out docs/results

Learned from the earlier half of the prompts, and asked about the later: questions of MATH and
GSM8K, whose reference solution is taken for the answer of one call (no model wrote it), and
questions of HotpotQA with the whole run of a ReAct agent, in the order in which they were asked.
Tokens are characters over four, seconds those of the default cost model, a search takes 2.2 s. Then
the later half is served: jobs drawn from it arrive at load 0.9 at one preemptive server, twelve
times. What was said of each as it arrived is used in two ways: its mean once and for all, as LTR
ranks ("shortest predicted"), or by SERPT, whose mean ages, with and without slices of twenty mean
demands for a job that was begun. "Closed" is the share of the distance in mean completion from
`ClassMean`, here first come, first served, to the oracle. Intervals are 95 % bootstraps over the
later prompts, and for the gap over the twelve. Writes `predictors.json`.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from environment import environment
from tqdm import tqdm

from demand import (
    FCFS,
    LAS,
    SERPT,
    Application,
    ClassMean,
    CostModel,
    Distribution,
    Execution,
    Oracle,
    PDGraph,
    PendingCall,
    Predictor,
    PromptRegression,
    RandomOrder,
    TimeSlice,
    Unit,
    calibrate_calls,
    poisson_workload,
    simulate,
)
from demand.refine import WholeRuns
from demand.traces import Session, read_fireact

sys.path.insert(0, str(Path(__file__).parents[1]))  # scripts, not a package
from prompt_embedding import Embedder, EmbeddingPredictor

CHARACTERS = 4.0
SLICE = 20.0
"""Mean demands for which `TimeSlice` lets a job that was begun go on."""
COST = CostModel()
BLIND = ("FCFS", "random order", "LAS")


@dataclass(frozen=True)
class Asked:
    """Prompts in the order in which they were asked, and the run of each."""

    prompts: list[str]
    runs: list[list[Execution]]

    def halves(self) -> "tuple[Asked, Asked]":
        """The earlier and the later."""
        half = len(self.runs) // 2
        return (
            Asked(self.prompts[:half], self.runs[:half]),
            Asked(self.prompts[half:], self.runs[half:]),
        )

    def seconds(self) -> np.ndarray:
        """What each took."""
        return np.array([COST.run_seconds(run) for run in self.runs])


def data_sets(folder: Path) -> Iterator[tuple[str, Asked]]:
    """What there is of the data."""
    solve = Unit("solve", "llm")
    for name, asked, answered in (
        ("math500", "problem", "solution"),
        ("gsm8k", "question", "answer"),
    ):
        rows = [json.loads(line) for line in (folder / name / "test.jsonl").open()]
        runs = [
            [Execution(solve, len(row[asked]) / CHARACTERS, len(row[answered]) / CHARACTERS)]
            for row in rows
        ]
        yield name, Asked([row[asked] for row in rows], runs)
    shuffled = list(range(7405))  # of HotpotQA's dev set, in the order of ReAct's evaluation
    random.Random(233).shuffle(shuffled)
    place = {question: at for at, question in enumerate(shuffled)}
    for name in ("gpt35", "llama2_7b"):
        path = folder / "fireact_react" / f"hotpotqa_react_{name}.jsonl"
        questions = {}
        for line in path.open():
            row = json.loads(line)
            questions[str(row["idx"])] = question_of(row["traj"])
        sessions = sorted(read_fireact(path), key=lambda s: place[int(str(s.attributes["task"]))])
        runs = [
            Session.run(session, assumed_seconds={"search": 2.2, "tool": 0.5})
            for session in sessions
        ]
        prompts = [questions[str(session.attributes["task"])] for session in sessions]
        yield f"ReAct {name}", Asked(prompts, runs)


def question_of(trajectory: list[dict] | str) -> str:
    """The question that a trajectory begins with."""
    if isinstance(trajectory, str):
        return trajectory.split("### Instruction:\n")[1].split("\n\n### Response")[0]
    return str(trajectory[0]["content"])


class Blind:
    """Says the same of every call: the totals of the runs learned from."""

    def __init__(self, graph: PDGraph) -> None:
        self.total = WholeRuns().remaining(graph)

    def predict(self, call: PendingCall) -> Distribution:
        """Of all runs."""
        return self.total


def predictors(embed: Callable[[str], np.ndarray], earlier: Asked) -> dict[str, Predictor]:
    """One of each kind."""
    graph = PDGraph.fit(earlier.runs)
    return {
        "none": Blind(graph),
        "prompt length": PromptRegression().fit(graph),
        "embedding": EmbeddingPredictor.fit(embed, earlier.prompts, earlier.seconds().tolist()),
    }


def calibration(known: dict[str, Predictor], later: Asked) -> dict:
    """CRPS over that of none and coverage of each, with intervals over the prompts."""
    points = {}
    for name, predictor in known.items():
        reports = [
            calibrate_calls(predictor, "a", [run], [0], prompts=[[prompt] + [""] * (len(run) - 1)],
                            cost=COST, seed=at).overall
            for at, (prompt, run) in enumerate(zip(later.prompts, later.runs, strict=True))
        ]  # fmt: skip
        points[name] = np.array([[r.crps, *r.coverage, float(r.pits[0])] for r in reports])
    drawn = np.random.default_rng(0).integers(len(later.runs), size=(5000, len(later.runs)))
    none = points["none"][:, 0]
    found = {}
    for name, mine in points.items():
        ratio = mine[:, 0][drawn].mean(axis=1) / none[drawn].mean(axis=1)
        histogram, _ = np.histogram(mine[:, 4], 10, (0.0, 1.0))
        found[name] = {
            "crps_ratio_to_none": float(mine[:, 0].mean() / none.mean()),
            "crps_ratio_interval": np.quantile(ratio, [0.025, 0.975]).tolist(),
            "coverage_50_80_95": mine[:, 1:4].mean(axis=0).tolist(),
            "pit_histogram": (histogram * 10 / len(later.runs)).tolist(),
        }
    return found


def served(known: dict[str, Predictor], later: Asked, seed: int, jobs: int) -> dict[str, float]:
    """Mean completion seconds by arm, on a resample of the later prompts."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(later.runs), size=len(later.runs))
    seconds = later.seconds()
    pool = {float(seconds[at]): int(at) for at in chosen}
    values = seconds[chosen]
    application = Application(
        "a", Distribution(values), mean_seconds=float(values.mean()),
        sample_runs=lambda rng, n: [later.runs[at] for at in rng.choice(chosen, size=n)],
    )  # fmt: skip
    jobs_of = poisson_workload([application], 0.9, jobs, seed)
    means = {
        "FCFS": simulate(jobs_of, FCFS()).mean,
        "random order": simulate(jobs_of, RandomOrder(), seed=seed).mean,
        "LAS": simulate(jobs_of, LAS(quantum=float(values.mean()) / 100)).mean,
        "ClassMean": simulate(jobs_of, ClassMean()).mean,
        "oracle": simulate(jobs_of, Oracle()).mean,
    }
    asked = [pool[float(demand)] for demand in jobs_of.demands]
    for name, predictor in known.items():
        told = {
            str(at): predictor.predict(
                PendingCall.of_run("a", later.runs[at], 0, later.prompts[at])
            )
            for at in set(asked)
        }
        each = replace(jobs_of, applications=[str(at) for at in asked], distributions=told)
        means[f"shortest predicted, {name}"] = simulate(each, ClassMean()).mean
        sliced = TimeSlice(SERPT(), SLICE * float(values.mean()))
        means[f"SERPT in slices, {name}"] = simulate(each, sliced).mean
        means[f"SERPT, {name}"] = simulate(each, SERPT()).mean
    return means


def gap_closed(means: list[dict[str, float]], arm: str) -> dict[str, float]:
    """Share of the gap from `ClassMean` to the oracle, with its 95 % bootstrap interval."""
    ours, base, best = (np.array([m[name] for m in means]) for name in (arm, "ClassMean", "oracle"))
    drawn = np.random.default_rng(0).integers(ours.size, size=(5000, ours.size))
    closed = (base - ours)[drawn].mean(axis=1) / (base - best)[drawn].mean(axis=1)
    low, high = np.quantile(closed, [0.025, 0.975])
    share = (base - ours).mean() / (base - best).mean()
    return {"share": float(share), "low": float(low), "high": float(high)}


def experiment(embed: Callable[[str], np.ndarray], data: Asked, seeds: int, jobs: int) -> dict:
    """What goes into the JSON for one data set."""
    earlier, later = data.halves()
    known = predictors(embed, earlier)
    means = [served(known, later, seed, jobs) for seed in range(seeds)]
    embedding = known["embedding"]
    assert isinstance(embedding, EmbeddingPredictor)
    return {
        "learned": len(earlier.runs),
        "held_out": len(later.runs),
        "ridge": embedding.ridge,
        "calibration": calibration(known, later),
        "gap_closed": {
            arm: gap_closed(means, arm) for arm in means[0] if arm not in ("ClassMean", "oracle")
        },
        "mean_completion_seconds": {arm: [m[arm] for m in means] for arm in means[0]},
    }


def markdown(record: dict) -> str:
    """The table of docs/learning.md, from the JSON."""
    lines = [
        "| told | CRPS / none | in 50 / 80 / 95 % | shortest predicted | in slices | SERPT |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, found in record["results"].items():
        means = {arm: np.mean(each) for arm, each in found["mean_completion_seconds"].items()}
        fcfs, oracle = (means[arm] / means["ClassMean"] for arm in ("FCFS", "oracle"))
        lines.append(
            f"| **{name}** (mean / ClassMean's: FCFS {fcfs:.2f}, oracle {oracle:.2f}) | | | | | |"
        )
        gaps = {arm: _share(gap) for arm, gap in found["gap_closed"].items()}
        lines += [f"| {arm}: {gaps[arm]} | | | | | |" for arm in BLIND]
        for arm, scored in found["calibration"].items():
            low, high = scored["crps_ratio_interval"]
            covered = " / ".join(f"{100 * c:.0f}" for c in scored["coverage_50_80_95"])
            ways = ("shortest predicted", "SERPT in slices", "SERPT")
            cells = [
                f"{scored['crps_ratio_to_none']:.3f} [{low:.2f}, {high:.2f}]",
                covered,
                *(gaps[f"{way}, {arm}"] for way in ways),
            ]
            lines.append(f"| {arm} | {' | '.join(cells)} |")
    ran, learned = record["configuration"], [f["learned"] for f in record["results"].values()]
    return "\n".join(lines) + (
        f"\n\nEarlier halves of {', '.join(map(str, learned))} prompts; {ran['seeds']} workloads "
        f"of {ran['jobs']} jobs at load {ran['load']}; embeddings of {ran['model']}. The last "
        "three columns, and behind what knows nothing: share of the gap closed.\n"
    )


def _share(gap: dict[str, float]) -> str:
    return f"{gap['share']:.0%} [{gap['low']:.0%}, {gap['high']:.0%}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[3] / "shared" / "data")
    parser.add_argument("--model", default="smollm2", help="smollm2, reference, or a name of HF's")
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--jobs", type=int, default=1000)
    args = parser.parse_args()
    embed = cache(Embedder(args.model).__call__)
    results = {}
    for name, data in data_sets(args.data):
        for prompt in tqdm(data.prompts, desc=f"embedding {name}"):
            embed(prompt)
        results[name] = experiment(embed, data, args.seeds, args.jobs)
    record = {
        "configuration": {
            "model": args.model,
            "seeds": args.seeds,
            "jobs": args.jobs,
            "load": 0.9,
            "seed": f"workloads 0 to {args.seeds - 1}",
        },
        "environment": environment(),
        "results": results,
    }
    print(markdown(record))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "predictors.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
