"""The papers' claims on a real pretrained model, in some minutes on two CPU cores.

    python examples/experiments/quickstart.py
    python examples/experiments/quickstart.py --model NAME_OR_PATH --documents a.txt b.txt \
        --question "..."

The first form asks SmolLM2-135M-Instruct questions on passages, decodes along real text and serves
simulated applications, and writes `quickstart.json` and `quickstart.png` into --out. The second
links your own files in front of your own question, on any HuggingFace model.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import transformers
from attention_on_sinks import attention_on_first_tokens
from environment import environment
from own_documents import own_documents, text_of
from questions import AT_MOST, link_problems, texts
from quickstart_figure import draw
from quickstart_tables import (
    LINKING,
    SCHEDULING,
    linking_rows,
    plain,
    retention_columns,
    retention_rows,
    shown,
)

import demand
import picache
import sparsity

sys.path.insert(0, str(Path(__file__).parents[1]))
import models

BEHIND_DUMMIES = "LegoLink-4, 4 dummies"
SINK_PROBLEMS = 4  # in which attention is looked at
METHODS: dict[str, picache.LinkMethod | picache.Arm] = {
    "naive": picache.NaiveReuse(),
    "random-4": picache.RandomRecompute(4),
    "LegoLink-1": picache.LegoLink(1),
    "LegoLink-2": picache.LegoLink(2),
    "LegoLink-4": picache.LegoLink(4),
    "LegoLink-16": picache.LegoLink(16),
    BEHIND_DUMMIES: picache.Arm(picache.LegoLink(4), picache.DummySinks(4)),
    "CacheBlend 15 %": picache.CacheBlend(0.15),
    "ProphetKV 15 %": picache.ProphetKV(0.15),
    "oracle 15 %": picache.OracleDeviation(0.15),
}
SCHEDULERS = [
    demand.FCFS(),
    demand.RandomOrder(),
    demand.ClassMean(),
    demand.SERPT(),
    demand.Gittins(),
    demand.Oracle(),
]
WORKLOADS = {
    "hermes": demand.hermes_applications,
    "bimodal": demand.bimodal_applications,
}


def policies(budget: int) -> dict[str, sparsity.Policy]:
    """Policies at one budget, in every layer."""
    return {
        "random": sparsity.Random(budget),
        "StreamingLLM": sparsity.StreamingLLM(budget),
        "H2O": sparsity.H2O(budget),
        "SnapKV, decoding too": sparsity.SnapKV(
            budget, window=budget // 4, evict_every=budget // 4
        ),
        "Quest": sparsity.Quest(budget, dense_layers=0),
        "RaaS": sparsity.RaaS(budget),
    }


def some_answers(problems: list[picache.Problem], result: picache.Comparison) -> list[dict]:
    """The first questions, and what they were answered with."""
    asked = []
    print(
        f"\nThe first of {len(problems)} questions, each on {len(problems[0].documents)} passages:"
    )
    for index, problem in enumerate(problems[:3]):
        said = {arm: " ".join(d[index].split()) for arm, d in result.settings["decoded"].items()}
        one = {"question": problem.question, "lead": problem.lead, "answer": problem.answers[0]}
        asked.append(one | {"said": said})
        print(f"\n{problem.question}\n{problem.lead} ... (right: {problem.answers[0]})")
        for arm in ("full", "naive", "LegoLink-4", BEHIND_DUMMIES):
            print(f"    {arm:22} {said[arm]}")
    return asked


def scheduling(jobs: int, seeds: int, load: float) -> dict[str, demand.Comparison]:
    """Completion times of every policy, by mix."""
    found = {}
    for mix, applications in WORKLOADS.items():
        draw_jobs = partial(demand.poisson_workload, applications(), load, jobs)
        found[mix] = demand.compare(draw_jobs, SCHEDULERS, range(seeds))
    return found


def show(record: dict) -> None:
    """Print the tables."""
    link, kept, jobs = (shown(record[name]) for name in ("linking", "retention", "scheduling"))
    print(f"\nQuestions on chunks compiled apart and linked: {link[0]['problems']} questions")
    print(plain(link, LINKING))
    print(f"\nDecoding with part of the KV cache: {kept[0]['texts']} texts")
    print(plain(kept, retention_columns(kept)))
    print(f"\nCompletion time, load {jobs[0]['load']}, {jobs[0]['jobs']} jobs x {jobs[0]['seeds']}")
    print(plain(jobs, SCHEDULING))


def measure(args: argparse.Namespace) -> dict:
    """The whole record; `args` as `main` reads them."""
    begun = time.perf_counter()
    model, tokenizer = models.load(args.model)
    problems = link_problems(args.model, args.questions)
    along = texts(args.model, args.texts, args.tokens, tokenizer)
    linking = picache.compare(model, tokenizer, problems, METHODS, new_tokens=6)
    asked = some_answers(problems, linking)
    looked_at = problems[:: max(1, len(problems) // SINK_PROBLEMS)][:SINK_PROBLEMS]
    methods = {"naive": picache.NaiveReuse(), "LegoLink-1": picache.LegoLink(1)}
    sinks = attention_on_first_tokens(model, tokenizer, looked_at, methods)
    retention = sparsity.compare(
        model,
        tokenizer,
        along,
        policies(args.budget),
        prompt_tokens=args.prompt_tokens,
        new_tokens=500,
        batch_size=args.batch_size,
    )
    completion = scheduling(args.jobs, args.seeds, args.load)
    values = {"linking": linking, "retention": retention, **completion}
    return {
        "configuration": {k: v for k, v in vars(args).items() if isinstance(v, int | float | str)}
        | {"sink_problems": len(looked_at), "seed": linking.seed},
        "environment": environment(),
        "answers": asked,
        "linking": linking_rows(linking),
        "attention_on_first_tokens": sinks,
        "retention": retention_rows(retention),
        "scheduling": [
            row | {"mix": mix, "load": args.load, "jobs": args.jobs, "seeds": args.seeds}
            for mix, result in completion.items()
            for row in result.table
        ],
        "values": {name: json.loads(result.to_json())["values"] for name, result in values.items()},
        "seconds": time.perf_counter() - begun,
    }


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse before anything runs what would be refused half way."""
    if (args.documents is None) != (args.question is None):
        parser.error("--documents and --question go together")
    for path in args.documents or ():
        if not path.is_file() or not text_of(path):
            parser.error(f"{path} is no file with text in it")
    there = (
        {"questions": args.questions, "texts": args.texts} if args.model == "reference" else AT_MOST
    )
    for name, most in there.items():
        if not 1 <= getattr(args, name) <= most:
            parser.error(f"--{name} {getattr(args, name)} must be 1 to {most}")
    if args.tokens < args.prompt_tokens + 2:
        parser.error(f"--tokens {args.tokens} must be at least --prompt-tokens plus 2")
    if args.budget is None:
        args.budget = 384 if args.model == "reference" else 96  # it pins prompts of 250 tokens
    elif args.budget <= args.prompt_tokens:
        parser.error(f"--budget {args.budget} must be more than --prompt-tokens, which are pinned")
    if args.seeds < 2:
        parser.error("--seeds must be at least 2: an interval over one would have no width")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for JSON and PNG")
    parser.add_argument(
        "--model", default="smollm2", help='"smollm2", "reference", or an HF model by name or path'
    )
    parser.add_argument("--documents", type=Path, nargs="+", help="text files to link, in order")
    parser.add_argument("--question", help="what to ask after the documents")
    parser.add_argument("--new-tokens", type=int, default=48, help="tokens of an answer to it")
    parser.add_argument("--questions", type=int, default=12, help="on the passages, of 72")
    parser.add_argument("--texts", type=int, default=6, help="to decode along, of 12")
    parser.add_argument("--tokens", type=int, default=192, help="of a text")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of them, fed at once")
    parser.add_argument("--budget", type=int, help="tokens kept by a KV head; 96, or 384")
    parser.add_argument("--batch-size", type=int, default=6, help="texts decoded along together")
    parser.add_argument("--jobs", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--load", type=float, default=0.9)
    args = parser.parse_args()
    check(parser, args)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        if args.documents:
            own_documents(
                args.model, METHODS, args.documents, args.question, args.new_tokens, args.out
            )
            return
        record = measure(args)
    except models.ModelMissingError as error:
        parser.error(f"{error}; or use --model reference")
    except (picache.PICacheError, sparsity.SparsityError, demand.DemandError) as error:
        parser.error(str(error))
    of_model = "" if args.model == "smollm2" else f"_{Path(args.model).name}"
    path = args.out / f"quickstart{of_model}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    show(record)
    draw(record, path.with_suffix(".png"))
    print(f"\n{record['seconds']:.0f} s; wrote {path} and .png")


if __name__ == "__main__":
    main()
