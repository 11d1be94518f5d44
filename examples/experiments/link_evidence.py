"""Which training-free way of linking loses least, at which budget: every method, every sink.

    python examples/experiments/link_evidence.py --data DATA --out docs/results
    python examples/experiments/link_evidence.py --data DATA --out rehearsal --questions 4 --small

Questions on paragraphs, one chunk each (`paragraph_questions.py`), by `picache.compare`: what the
right answer loses in likelihood against full prefill, teacher-forced, and how far the arm's
distribution is from full prefill's. Every method stands beside random tokens in the same number.
The arm nearest to full prefill at each budget is chosen on the questions of even number and
reported on the others.
`--data` holds the data sets' files; `--model` is any model of `examples/models.py`. Beyond
`--seconds` no turn begins; what is there is written, of all tasks mixed, and the next call goes on
from it. On a GPU one worker a device is fastest: several take turns with it and wait. Writes
`link_evidence.json` and `link_evidence.png`.
"""

import argparse
import gzip
import json
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from environment import environment
from link_evidence_summary import draw, summary, tables
from loaded import loaded
from paragraph_questions import INSTRUCTION, TASKS, questions
from parallel import spread

from picache import (
    A3,
    APE,
    Arm,
    CacheBlend,
    Combined,
    DummySinks,
    LegoLink,
    LinkMethod,
    NaiveReuse,
    OracleDeviation,
    Problem,
    ProphetKV,
    RandomRecompute,
    SharedPrefix,
    compare,
)
from picache.problem import answer_ids, pieces
from picache.sinks import Sinks

METRICS = ("accuracy", "extra_nll", "kl", "recomputed", "operations")
KS = (1, 2, 4, 8, 16, 32)
RATIOS = (0.02, 0.05, 0.15, 0.3)
NEW_TOKENS = 8
QUESTIONS = "link_evidence_questions.json.gz"
LONGEST = 3000
"""Tokens of a prompt beyond which a question is left out."""


@dataclass(frozen=True)
class Way:
    """A way of linking.

    Attributes:
        family: the method without its budget.
        behind: what chunks are compiled behind: "nothing", "1 dummy", "4 dummies" or "the system
            prompt".
        budget: as it is written: a k, or a share in percent; empty for none.
        method: of the link.
        twin: label of the arm that recomputes random tokens in the same number; empty for none.
    """

    family: str
    behind: str
    budget: str
    method: LinkMethod
    twin: str = ""

    @property
    def label(self) -> str:
        budget = f" {self.budget}" if self.budget else ""
        return f"{self.family}{budget}" + ("" if self.behind == "nothing" else f", {self.behind}")


def by_share(ratio: float) -> dict[str, LinkMethod]:
    """Methods that are given a share of the tokens; those that look at first tokens, too."""
    return {
        "ProphetKV": ProphetKV(ratio),
        "ProphetKV, value norm": ProphetKV(ratio, value_norm=True),
        "LegoLink-1 + ProphetKV": Combined((LegoLink(1), ProphetKV(1.0)), ratio),
        "LegoLink-2 + ProphetKV": Combined((LegoLink(2), ProphetKV(1.0)), ratio),
        "LegoLink-4 + ProphetKV": Combined((LegoLink(4), ProphetKV(1.0)), ratio),
    }


def ways(small: bool = False) -> list[Way]:
    """All of them; a few where `small`."""
    ks, ratios = ((1, 4), (0.15,)) if small else (KS, RATIOS)
    found = []
    for behind in ("nothing", "1 dummy", "4 dummies", "the system prompt"):
        beside = "" if behind == "nothing" else f", {behind}"
        found.append(Way("naive", behind, "", NaiveReuse()))
        for k in ks:
            if behind != "nothing" and k not in (1, 4, 16):
                continue
            found.append(Way("random", behind, f"{k} a chunk", RandomRecompute(k)))
            found.append(
                Way("LegoLink", behind, str(k), LegoLink(k), f"random {k} a chunk{beside}")
            )
        for ratio in ratios:
            percent = f"{100 * ratio:.0f} %"
            twin = f"random {percent}{beside}"
            found.append(Way("random", behind, percent, RandomRecompute(ratio=ratio)))
            methods = by_share(ratio)
            if behind == "nothing":
                methods |= {
                    "A3": A3(ratio),
                    "CacheBlend": CacheBlend(ratio),
                    "true deviation": OracleDeviation(ratio),
                }
            found += [Way(name, behind, percent, one, twin) for name, one in methods.items()]
        if behind == "the system prompt":
            found.append(Way("APE, T = S = 0.9", behind, "", APE()))
    return found


def sinks_of(behind: str, prefix: str) -> Sinks:
    """The argument of `PIC`."""
    return {
        "nothing": "drop",
        "1 dummy": DummySinks(1),
        "4 dummies": DummySinks(4),
        "the system prompt": SharedPrefix(prefix),
    }[behind]


Part = list[tuple[str, int, Problem]]
"""A worker's questions: of which task, which number, and the problem."""


def measured(model_name: str, small: bool, deadline: float, part: Part) -> list[dict]:
    """All ways on a worker's questions; nothing where the deadline is over before it begins."""
    if time.time() > deadline:
        return []
    if torch.cuda.is_available():  # workers share the devices that there are
        torch.cuda.set_device(os.getpid() % torch.cuda.device_count())
    model, tokenizer = loaded(model_name, torch.float32)
    prefix = pieces(part[0][2], tokenizer).prefix
    arms = {way.label: Arm(way.method, sinks_of(way.behind, prefix)) for way in ways(small)}
    result = compare(
        model,
        tokenizer,
        [problem for _, _, problem in part],
        arms,
        new_tokens=NEW_TOKENS,
        metrics=METRICS,
        progress=False,
    )
    return [
        {
            "task": task,
            "number": number,
            "prompt_tokens": result.settings["prompt_tokens"][place],
            "documents": len(problem.documents),
            "arms": {
                arm: [float(f"{values[metric][place]:.5g}") for metric in METRICS]
                for arm, values in result.measured.items()
            },
        }
        for place, (task, number, problem) in enumerate(part)
    ]


def parts_of(
    folder: Path, model_name: str, count: int, seed: int, together: int
) -> tuple[list[Part], dict[str, int]]:
    """Questions of all tasks, mixed, for one worker after the other; how many there are of each.

    The longest of each part stands first: passes are captured over memory for the first prompt.
    """
    _, tokenizer = loaded(model_name)

    def fits(problem: Problem) -> bool:
        whole = "".join([*pieces(problem, tokenizer).documents, problem.question])
        long = len(tokenizer(whole)["input_ids"]) > LONGEST
        return not long and 0 < len(answer_ids(problem, tokenizer)) <= NEW_TOKENS

    every = [
        (task, number, problem)
        for task in TASKS
        for number, problem in enumerate(questions(task, folder, count, seed, fits))
    ]
    counts = {task: sum(one[0] == task for one in every) for task in TASKS}
    order = np.random.default_rng(seed).permutation(len(every))
    mixed = [every[i] for i in order]
    parts = [mixed[i : i + together] for i in range(0, len(mixed), together)]
    for part in parts:
        part.sort(key=lambda one: -sum(map(len, one[2].documents)))
    return parts, counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="a model of examples/models.py")
    parser.add_argument("--data", type=Path, help="folder of the data sets' files")
    parser.add_argument("--questions", type=int, default=200, help="of each task, at most")
    parser.add_argument("--together", type=int, default=12, help="questions of a worker's turn")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3e7, help="after which no turn begins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a few arms")
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--measured", type=Path, help="what --out wrote before: only sum it up")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.measured is not None:
        record = json.loads(gzip.decompress(args.measured.read_bytes()))
    else:
        record = run(args)
    summed = summary(record, ways(record["configuration"]["small"]))
    (args.out / "link_evidence.json").write_text(json.dumps(summed, indent=1) + "\n")
    draw(summed, args.out / "link_evidence.png")
    print(tables(summed))


def run(args: argparse.Namespace) -> dict:
    """Every question under every arm: one number a question and metric.

    They are written as they come, and a later call goes on where the file of an earlier one, of
    the same configuration, ends.
    """
    begun = time.time()
    parts, counts = parts_of(args.data, args.model, args.questions, args.seed, args.together)
    record = {
        "configuration": {
            "model": args.model,
            "tasks": counts,
            "instruction": INSTRUCTION,
            "new_tokens": NEW_TOKENS,
            "longest": LONGEST,
            "seed": args.seed,
            "small": args.small,
        },
        "environment": environment(),
        "seconds": 0.0,
        "metrics": list(METRICS),
        "questions": [],
    }
    file = args.out / QUESTIONS
    if file.exists():
        earlier = json.loads(gzip.decompress(file.read_bytes()))
        if earlier["configuration"] != record["configuration"]:
            raise SystemExit(f"{file} is of another configuration: give another --out")
        record |= {name: earlier[name] for name in ("questions", "seconds")}
    done = {(one["task"], one["number"]) for one in record["questions"]}
    left = [[one for one in part if one[:2] not in done] for part in parts]
    task = partial(measured, args.model, args.small, begun + args.seconds)
    before = record["seconds"]
    for rows in spread(task, [part for part in left if part], args.workers, "turns"):
        record["questions"] += rows
        record["seconds"] = before + time.time() - begun
        file.write_bytes(gzip.compress(json.dumps(record).encode(), 4))
    return record


if __name__ == "__main__":
    main()
