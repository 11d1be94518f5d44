"""What every retention policy costs a real model: forced along long texts, and decoding freely.

    python examples/experiments/retention_evidence.py --data FOLDER --out docs/results --workers 4
    python examples/experiments/retention_evidence.py --data FOLDER --out out --small

Texts of one length, half of them pages of a novel and half worked solutions of competition problems
one after the other (single ones are short), go through the model in one batch, token by token as
`generate` would (`layer_by_layer.py`): nats a token above dense attention, KL and agreement, by
stretch of the text. Every policy with no sinks, four sinks, and its pinned prompt where it has one;
evicting at random is the control, with the same pages and as many tokens at a time. Settings are
chosen on every other pair of texts, one of each kind, and reported on the pairs between. Then
problems are asked, and some policies answer in up to 2,000 sampled tokens: how long the answers
are, and how much of them is repetition. Beyond `--seconds` nothing new begins; the next call goes
on from what stands in --out. Writes `retention_evidence.json` and `retention_evidence.png`.
"""

import argparse
import json
import time
from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from environment import environment, hardware
from growing_record import GrowingRecord, read
from known_texts import Setting, known
from layer_by_layer import Walk, apart, hidden_states
from loaded import loaded
from parallel import spread
from retention_evidence_summary import DENSE, draw, summary, tables
from retention_texts import asked
from retention_ways import FREE, SMALL, WAYS
from torch import Tensor
from workers import add_workers

from sparsity import Full, SparseCache, SparsityError
from sparsity.hf.attach import keep_attached

MEASURED = "retention_evidence_texts.json.gz"
STRETCHES = 8
REPEATED = 8
"""Tokens in a row that count as repeated where they stood in the same answer before."""


class Job(NamedTuple):
    """One arm: a label of `WAYS` at a budget, forced along the texts or answering freely."""

    kind: str
    arm: str
    budget: int


def jobs_of(labels: Sequence[str], budgets: list[int], free_budget: int, answer: int) -> list[Job]:
    """The arms in the order in which they are measured: budget by budget, then those that decode.

    Args:
        labels: of the ways that are forced along the texts.
        budgets: in tokens.
        free_budget: of those that decode freely.
        answer: tokens of an answer; 0 for none.
    """
    found = [Job("forced", label, budget) for budget in budgets for label in labels]
    if answer:
        found += [Job("free", DENSE, 0), *(Job("free", name, free_budget) for name in FREE)]
    return found


def forced(setting: Setting, jobs: Sequence[Job]) -> list[dict]:
    """Of each job each metric of each text in stretches of equal length, `[texts][stretches]`."""
    model, _ = loaded(setting.model)
    given, dense = known(setting)
    rows: list[dict] = [{} for _ in jobs]
    walks = []
    for row, job in zip(rows, jobs, strict=True):
        try:
            walks.append(Walk(model, policies()[job.arm](job.budget), given))
        except SparsityError as error:
            row["refused"] = str(error)
    walked = [row for row in rows if not row]
    found_states = hidden_states(model, given, walks) if walks else []
    for row, states in zip(walked, found_states, strict=True):
        found = apart(model, given, dense, states)
        means = torch.stack([part.mean(-1) for part in found.tensor_split(STRETCHES, -1)], -1)
        names = ("extra_nll", "kl", "agreement")
        row |= {name: rounded(means[i]) for i, name in enumerate(names)}
    return rows


def free(setting: Setting, job: Job) -> dict:
    """Of each answer its tokens, and the share of them that repeat what stands before."""
    try:
        return answered(setting, job)
    except SparsityError as error:
        return {"refused": str(error)}


def answered(setting: Setting, job: Job) -> dict:
    """What `free` gives.

    Raises:
        SparsityError: as `SparseCache` does.
    """
    model, tokenizer = loaded(setting.model)
    given = asked(tokenizer, setting.data, setting.questions, setting.seed).to(model.device)
    policy = Full() if job.arm == DENSE else policies()[job.arm](job.budget)
    with keep_attached(model):
        most = given["input_ids"].shape[1] + setting.answer
        cache = SparseCache(model, policy, max_tokens=most)
        torch.manual_seed(setting.seed)
        out = model.generate(
            **given,
            past_key_values=cache,
            max_new_tokens=setting.answer,
            do_sample=True,
            temperature=0.7,
            top_k=0,
            top_p=1.0,
        )
        decoding = cache.report().decoding
    rows = out[:, given["input_ids"].shape[1] :].tolist()
    answers = [ended(row, model.generation_config.eos_token_id) for row in rows]
    return {
        "length": [len(answer) for answer in answers],
        "repeated": [repeated(answer) for answer in answers],
        "decoding": decoding,
    }


def ended(row: list[int], ends: int | list[int] | None) -> list[int]:
    """A row up to what ended it; `generate` fills up behind it, where other rows went on."""
    every = ends if isinstance(ends, list) else [ends]
    return list(takewhile(lambda token: token not in every, row))


def repeated(answer: list[int]) -> float:
    """Share of the spans of `REPEATED` tokens that stood in the answer before."""
    spans = list(zip(*(answer[i:] for i in range(REPEATED)), strict=False))
    return 1 - len(set(spans)) / len(spans) if spans else 0.0


def policies() -> dict:
    """What makes each arm's policy of a budget."""
    return {way.label: way.policy for way in WAYS}


def rounded(values: Tensor) -> list[list[float]]:
    return [[float(f"{value:.5g}") for value in row] for row in values.tolist()]


def measured(setting: Setting, deadline: float, jobs: Sequence[Job]) -> list[dict]:
    """The numbers of arms of one kind, or why one is refused; none where the time is over."""
    if time.time() > deadline:
        return []
    begun = time.perf_counter()
    rows = forced(setting, jobs) if jobs[0].kind == "forced" else [free(setting, *jobs)]
    each = {"where": hardware(), "seconds": (time.perf_counter() - begun) / len(jobs)}
    return [job._asdict() | each | row for job, row in zip(jobs, rows, strict=True)]


def turns_of(jobs: Sequence[Job], together: int) -> list[list[Job]]:
    """The jobs in order, so many that are forced along the texts side by side."""
    forced = [job for job in jobs if job.kind == "forced"]
    turns = [forced[first : first + together] for first in range(0, len(forced), together)]
    return turns + [[job] for job in jobs if job.kind == "free"]


def run(args: argparse.Namespace) -> dict:
    """Every arm, written as it comes; a later call of the same configuration goes on from there."""
    begun = time.time()
    setting = Setting(
        args.model, args.data, args.texts, args.tokens, args.prompt, args.questions, args.answer,
        args.seed,
    )  # fmt: skip
    shown = {name: value for name, value in setting._asdict().items() if name != "data"}
    record = {
        "configuration": shown | {"budgets": args.budgets, "free_budget": args.free_budget},
        "environment": environment(),
        "seconds": 0.0,
        "rows": [],
    }
    growing = GrowingRecord(args.out / MEASURED, record, ["rows"])
    done = {(row["kind"], row["arm"], row["budget"]) for row in record["rows"]}
    labels = SMALL if args.small else [way.label for way in WAYS]
    every = jobs_of(labels, args.budgets, args.free_budget, args.answer)
    left = [
        job
        for job in every
        if job not in done and args.arms in job.arm and args.only in ("", job.kind)
    ]
    task = partial(measured, setting, begun + args.seconds)
    for rows in spread(task, turns_of(left, args.together), args.workers, "turns"):
        record["rows"] += rows
        growing.write()
    return record


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="a model of examples/models.py")
    parser.add_argument("--data", type=Path, help="folder of the data sets' files")
    parser.add_argument("--texts", type=int, default=24, help="of both kinds together")
    parser.add_argument("--tokens", type=int, default=4000, help="of a text")
    parser.add_argument("--prompt", type=int, default=64, help="its tokens in one forward")
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 128, 512, 1024])
    parser.add_argument("--questions", type=int, default=12, help="answered freely")
    parser.add_argument("--answer", type=int, default=2000, help="tokens at most; 0 for none")
    parser.add_argument("--free-budget", type=int, default=256)
    parser.add_argument("--arms", default="", help="only those whose name has this in it")
    parser.add_argument("--only", default="", choices=("forced", "free"), help="both if not given")
    parser.add_argument("--together", type=int, default=6, help="forced arms side by side")
    add_workers(parser)
    parser.add_argument("--seconds", type=float, default=3e7, help="after which no arm begins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a setting for a CPU, and fewer arms")
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--measured", type=Path, help="what --out wrote before: only sum it up")
    args = parser.parse_args()
    if args.small:
        args.texts, args.tokens, args.budgets, args.answer = 4, 1000, [128], 0
    args.out.mkdir(parents=True, exist_ok=True)
    record = run(args) if args.measured is None else read(args.measured)
    summed = summary(record)
    (args.out / "retention_evidence.json").write_text(json.dumps(summed, indent=1) + "\n")
    draw(summed, args.out / "retention_evidence.png")
    print(tables(summed))


if __name__ == "__main__":
    main()
