"""The CAP principle, measured: what every method does to context, accuracy and performance.

    python examples/experiments/cap/measure.py --data FOLDER --out docs/results
    python examples/experiments/cap/measure.py --model llama-3.1-8b --device cuda --generate \\
        --contexts 8192 32768 --requests 3 1 --budgets 2048 --out out

The survey (arXiv 2405.11299) says that an optimisation improves at most two of context (C),
accuracy (A) and performance (P). Here every link method, every retention policy, storage in 8 bits
and their pairs serve the same requests as full attention does: passages, a question and the
sentence that answers it (`requests.py`), at several contexts. What a user perceives of it is
defined in `definitions.py` and put together in `summary.py`.

Beyond `--seconds` no arm begins; the next call goes on from what stands in --out. A model of random
weights (a shape of `examples/benchmarks/shapes.py`) has no A. On a CPU each process counts its own
seconds on one thread, so that what else runs beside it does not count but for the caches and the
clock rate that it shares. Full attention therefore comes first on every request, after every few
arms, and anew when a run goes on, and each arm is held against the one nearest in time. Writes
`cap.json` (or of another `--name`), and `cap.png` and `cap.svg` where there is an A.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # scripts, not packages
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
import models
from cap.arms import BUDGETS, FULL, Arm, arms
from cap.pages import tables
from cap.picture import draw
from cap.requests import Request, asked, random_requests
from cap.serving import NotComposedError, Server
from cap.summary import summary
from environment import environment, hardware
from growing_record import GrowingRecord, read
from parallel import spread
from shapes import SHAPES, build_model

from picache import PICacheError
from sparsity import SparsityError

MEASURED = "{}_rows.json.gz"
OFTEN = 5
"""Arms between two measurements of full attention on the same request."""


class Setting(NamedTuple):
    """What all arms share."""

    model: str
    device: str
    data: Path | None
    contexts: tuple[tuple[int, int], ...]
    budgets: tuple[int, ...]
    answer: int
    seed: int
    generates: bool


class Job(NamedTuple):
    """One request, and the labels of the arms that serve it one after the other."""

    context: int
    number: int
    labels: tuple[str, ...]


@cache
def server(setting: Setting) -> Server:
    """What serves in this process."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if setting.device == "cpu":
        torch.set_num_threads(1)  # seconds are the process's: threads that wait would count
    if setting.model in SHAPES:
        dtype = "bfloat16" if setting.device == "cuda" else "float32"
        model = build_model(setting.model, setting.seed, setting.device, dtype)
        return Server(model, None, setting.generates)
    model, tokenizer = models.load(setting.model)
    return Server(model.to(setting.device), tokenizer, setting.generates)


@cache
def requests(setting: Setting) -> dict[int, list[Request]]:
    """All requests, by context."""
    contexts, where = dict(setting.contexts), server(setting)
    if where.tokenizer is None:
        vocabulary = where.model.config.vocab_size
        return random_requests(vocabulary, contexts, setting.answer, setting.seed)
    if setting.data is None:
        raise SystemExit("--data: name the folder that has xquad_en/xquad.en.json")
    return asked(where.tokenizer, setting.data, contexts, setting.answer, setting.seed)


def measured(setting: Setting, deadline: float, job: Job) -> list[dict]:
    """A row for each arm on one request, or why it is refused; fewer where the time is over."""
    rows: list[dict] = []
    if time.time() > deadline:
        return rows
    where, request = server(setting), requests(setting)[job.context][job.number]
    by_label = {arm.label: arm for arm in arms(setting.budgets)}
    piece = f"{time.time():.3f} {os.getpid()}"  # what one process measured without a break
    for label in with_full(job.labels):
        if time.time() > deadline:
            break
        row = {"arm": label, "context": job.context, "number": job.number,
               "piece": piece, "at": round(time.time(), 3)}  # fmt: skip
        try:
            row |= where.serve(by_label[label], request)
        except (PICacheError, SparsityError, NotComposedError) as error:
            row["refused"] = f"{type(error).__name__}: {error}"
        rows.append(row | {"where": hardware()})
    where.forget()
    return rows


def with_full(labels: Sequence[str]) -> list[str]:
    """The labels with full attention first, last, and after every few of them."""
    others = [label for label in labels if label != FULL]
    found = [FULL]
    for place in range(0, len(others), OFTEN):
        found += [*others[place : place + OFTEN], FULL]
    return found


def jobs_of(
    contexts: Sequence[tuple[int, int]], labels: Sequence[str], done: set[tuple[str, int, int]]
) -> list[Job]:
    """What is left, a request after the other, the first of each context first.

    Full attention is among what is left wherever another arm is, whether it was measured or not.
    """
    order = [
        (context, number)
        for number in range(max(count for _, count in contexts))
        for context, count in contexts
        if number < count
    ]
    found = []
    for context, number in order:
        # Each begins with other arms behind full attention, so that what drifts favours none; by
        # steps of the golden ratio, which spread over all of them, however many requests there are.
        turn = 1 + int(number * 0.618034 % 1 * len(labels))
        turned = (labels[0], *labels[turn:], *labels[1:turn])
        left = [label for label in turned if (label, context, number) not in done]
        if left:
            found.append(Job(context, number, (FULL, *(one for one in left if one != FULL))))
    return found


def run(args: argparse.Namespace) -> dict:
    """Every arm, written as it comes; a later call of the same configuration goes on from there."""
    begun = time.time()
    contexts = tuple(zip(args.contexts, args.requests, strict=True))
    setting = Setting(
        args.model, args.device, args.data, contexts, tuple(args.budgets), args.answer, args.seed,
        args.generate,
    )  # fmt: skip
    labels = chosen(arms(args.budgets), args.arms)
    shown = setting._asdict() | {
        "contexts": args.contexts,  # how many of each may grow from run to run
        "budgets": args.budgets,
        "random_weights": args.model in SHAPES,
    }
    del shown["data"]
    record = {
        "configuration": shown,
        "environment": environment() | {"threads": 1 if args.device == "cpu" else 0},
        "seconds": 0.0,
        "rows": [],
    }
    growing = GrowingRecord(args.out / MEASURED.format(args.name), record, ["rows"])
    done = {(row["arm"], row["context"], row["number"]) for row in record["rows"]}
    task = partial(measured, setting, begun + args.seconds)
    for rows in spread(task, jobs_of(contexts, labels, done), args.workers, "requests"):
        record["rows"] += rows
        growing.write()
    return record


def chosen(every: Sequence[Arm], parts: Sequence[str]) -> list[str]:
    """Labels of full attention and of the arms asked for, by whole labels or by parts of them."""
    whole = {arm.label for arm in every}
    return [
        arm.label
        for arm in every
        if arm.kind == FULL
        or any(part == arm.label or (part not in whole and part in arm.label) for part in parts)
    ]


def described(arm: Arm) -> dict:
    """An arm as the record tells of it."""
    told = asdict(arm) | {"label": arm.label}
    return told | {name: repr(getattr(arm, name)) for name in ("link", "sinks", "policy")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="smollm2", help="of examples/models.py, or a shape of random weights"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--data", type=Path, help="folder of the data sets' files")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 1024, 256])
    parser.add_argument("--requests", type=int, nargs="+", default=[4, 1, 1], help="of each")
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS), help="of policies")
    parser.add_argument("--answer", type=int, default=12, help="tokens that are forced")
    parser.add_argument(
        "--generate",
        action="store_true",
        help="time the tokens of `generate`, which compiles steps on a GPU",
    )
    parser.add_argument(
        "--arms", nargs="+", default=[""], help="besides full: their names, or parts of names"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--seconds", type=float, default=3e7, help="after which no arm begins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--name", default="cap", help="of the files in --out")
    parser.add_argument("--measured", type=Path, help="what --out wrote before: only sum it up")
    args = parser.parse_args()
    if len(args.contexts) != len(args.requests):
        parser.error(f"{len(args.contexts)} --contexts and {len(args.requests)} --requests")
    cores = os.cpu_count() or 1
    if args.device == "cpu" and args.workers > cores:
        parser.error(
            f"--workers {args.workers} on {cores} cores: seconds are those of a process on one "
            "thread, and only one a core measures them; give no more than there are cores"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    record = run(args) if args.measured is None else read(args.measured)
    record["arms"] = [described(arm) for arm in arms(record["configuration"]["budgets"])]
    summed = summary(record)
    (args.out / f"{args.name}.json").write_text(json.dumps(summed, indent=1) + "\n")
    if any(row["extra_nll"] is not None for row in summed["rows"]):
        draw(summed, args.out / args.name)
    print(tables(summed))


if __name__ == "__main__":
    from cap import measure  # workers import what they run, which __main__ cannot be

    measure.main()
