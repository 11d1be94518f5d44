"""Which training-free way of linking loses least, at which budget: every method, every sink.

    python examples/experiments/link_evidence.py --data DATA --out docs/results
    python examples/experiments/link_evidence.py --data DATA --out rehearsal --questions 4 --small

Questions on paragraphs, one chunk each (`paragraph_questions.py`), by `picache.compare`: what the
right answer loses in likelihood against full prefill, teacher-forced, and how far the arm's
distribution is from full prefill's. Every method stands beside random tokens in the same number.
Methods whose passes run eagerly are measured on a quarter of the questions. The arm nearest to full
prefill at each budget is chosen on the questions of even number and reported on the others.
`--data` holds the data sets' files; `--model` is any model of `examples/models.py`. Beyond
`--seconds` no turn begins; what is there is written, of all tasks mixed, and the next call goes on
from it. `--workers` share the GPUs that there are. Writes `link_evidence.json` and
`link_evidence.png`.
"""

import argparse
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from environment import environment
from growing_record import GrowingRecord, read
from link_evidence_pages import draw, tables
from link_evidence_summary import summary
from link_turns import LONGEST, NEW_TOKENS, Asked, Turn, asked_of, text_ids, turns_of, with_bos
from link_ways import BOS_KEPT, arms_of, ways
from linker import linker
from loaded import loaded
from paragraph_questions import TASKS
from parallel import spread
from workers import add_workers

from picache import compare
from picache.compare import FULL
from picache.datasets.formats import INSTRUCTION, LEAD
from picache.problem import answer_ids, pieces

METRICS = ("accuracy", "extra_nll", "kl", "recomputed", "operations")
QUESTIONS = "link_evidence_questions.json.gz"
TIMED = 5
"""Prompts that are linked alone, twice by each way, for its seconds; one where small."""


def measured(
    model_name: str, together: int, small: bool, deadline: float, turn: Turn
) -> list[dict]:
    """All ways on the questions of a turn; nothing where the deadline is over before it begins."""
    if time.time() > deadline:
        return []
    model, tokenizer = loaded(model_name, torch.float32)
    pic = linker(model_name, together)
    pic.store.clear()  # the chunks of the last turn
    problems = [one.problem for one in turn.asked]
    prefix = pieces(problems[0], tokenizer).prefix
    longest = max(len(text_ids(a, tokenizer)) for problem in problems for a in problem.answers)
    given = {
        "new_tokens": min(NEW_TOKENS, longest + 1),  # one more tells whether the last word is over
        "metrics": [*METRICS, "nll"],
        "progress": False,
        "together": together,
        "pic": pic,
    }
    taken = [way for way in ways(small) if turn.eager or not way.eager]
    plain, kept = (
        arms_of([way for way in taken if (way.behind == BOS_KEPT) == keeps], prefix)
        for keeps in (False, True)
    )
    result = compare(model, tokenizer, problems, plain, **given)
    behind_bos = [with_bos(problem, tokenizer) for problem in problems]
    beside = compare(model, tokenizer, behind_bos, kept, **given)
    found = dict(result.measured)
    # What is lost against the prompt without a BOS in its middle; the divergence is from full
    # prefill of the same tokens.
    likely = found[FULL]["nll"]
    for arm, values in beside.measured.items():
        label = f"{FULL}, {BOS_KEPT}" if arm == FULL else arm
        found[label] = values | {"extra_nll": values["nll"] - likely}
    return [
        {
            "task": one.task,
            "number": one.number,
            "prompt_tokens": result.settings["prompt_tokens"][place],
            "documents": len(one.problem.documents),
            "arms": {
                arm: [float(f"{values[metric][place]:.5g}") for metric in METRICS]
                for arm, values in found.items()
            },
        }
        for place, one in enumerate(turn.asked)
    ]


def first_token_seconds(model_name: str, small: bool, asked: Sequence[Asked]) -> dict:
    """Seconds to the first token of each way, prompt by prompt; chunks are compiled before.

    What chunks were compiled behind makes no difference and stands for itself only where a way is
    measured behind nothing else. Every prompt is linked twice, and the second time counts.
    """
    model, tokenizer = loaded(model_name, torch.float32)
    prefix = pieces(asked[0].problem, tokenizer).prefix
    arms = arms_of([way for way in ways(small) if way.timed], prefix)
    result = compare(
        model,
        tokenizer,
        [problem for _, _, problem in asked for _ in range(2)],
        arms,
        new_tokens=1 + max(len(answer_ids(one.problem, tokenizer)) for one in asked),
        metrics=["first_token_seconds"],
        progress=False,
    )
    return {
        arm: [float(f"{one:.4g}") for one in values["first_token_seconds"][1::2]]
        for arm, values in result.measured.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="a model of examples/models.py")
    parser.add_argument("--data", type=Path, help="folder of the data sets' files")
    parser.add_argument("--questions", type=int, default=200, help="of each task, at most")
    parser.add_argument("--lead", default=LEAD, help="in front of answers that have none of theirs")
    parser.add_argument("--together", type=int, default=16, help="questions of a worker's turn")
    add_workers(parser)
    parser.add_argument("--seconds", type=float, default=3e7, help="after which no turn begins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a few arms")
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--measured", type=Path, help="what --out wrote before: only sum it up")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    record = run(args) if args.measured is None else read(args.measured)
    if not record["questions"]:
        raise SystemExit("no turn began within --seconds: give more, or call again to go on")
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
    every = asked_of(args.data, loaded(args.model)[1], args.questions, args.seed, args.lead)
    turns = turns_of(every, args.together)
    record = {
        "configuration": {
            "model": args.model,
            "tasks": {task: sum(one.task == task for one in every) for task in TASKS},
            "instruction": INSTRUCTION,
            "lead": args.lead,
            "new_tokens": NEW_TOKENS,
            "longest": LONGEST,
            "seed": args.seed,
            "together": args.together,
            "small": args.small,
        },
        "environment": environment(),
        "seconds": 0.0,
        "metrics": list(METRICS),
        "first_token_seconds": {},
        "questions": [],
    }
    growing = GrowingRecord(args.out / QUESTIONS, record, ("questions", "first_token_seconds"))
    done = {(one["task"], one["number"]) for one in record["questions"]}
    left = [turn for turn in turns if not all(one[:2] in done for one in turn.asked)]
    print(f"{len(every)} questions, {len(left)} of {len(turns)} turns to go", flush=True)
    if not record["first_token_seconds"]:
        count = 1 if args.small else TIMED
        timed = sorted(every, key=lambda one: (one.number, -len("".join(one.problem.documents))))
        record["first_token_seconds"] = first_token_seconds(args.model, args.small, timed[:count])
        growing.write()
    task = partial(measured, args.model, args.together, args.small, begun + args.seconds)
    for rows in spread(task, left, args.workers, "turns"):
        record["questions"] += [one for one in rows if (one["task"], one["number"]) not in done]
        done |= {(one["task"], one["number"]) for one in rows}
        growing.write()
    return record


if __name__ == "__main__":
    main()
