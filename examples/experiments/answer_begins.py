"""Where links make the right answer likelier than full prefill does: at its first token, or behind.

    python examples/experiments/answer_begins.py --data FOLDER --out docs/results

Questions on paragraphs as `link_evidence.py` asks them, linked without recomputing anything, behind
nothing, one dummy and four. Each token of the right answer is forced: nats less full prefill's, the
first one's and those behind it, with two leads in front of the answer, one of which ends as most
models would go on. Writes `answer_begins.json`.
"""

import argparse
import json
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from environment import environment
from link_evidence_summary import Sample
from link_turns import NEW_TOKENS, asked_tokens, text_ids
from loaded import loaded
from paragraph_questions import questions
from quickstart_pages import markdown
from retention_evidence_summary import said
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, DynamicCache, PreTrainedTokenizerBase

from picache import PIC, DummySinks, NaiveReuse, Problem
from picache.datasets.formats import LEAD
from picache.problem import answer_ids, pieces

FULL = "full"
ARMS = {"naive": "drop", "naive, 1 dummy": DummySinks(1), "naive, 4 dummies": DummySinks(4)}
LEADS = (LEAD, f"{LEAD}:")
TASKS = ("XQuAD", "Natural Questions")
LONGEST = 1900
"""Tokens of a prompt's documents and question beyond which it is left out."""


def asked(tokenizer: PreTrainedTokenizerBase, data: Path, count: int, seed: int) -> list[Problem]:
    """So many questions of each task, whose answers have two tokens at least."""

    def fits(problem: Problem) -> bool:
        answer = len(answer_ids(problem, tokenizer))
        return asked_tokens(problem, tokenizer) <= LONGEST and 1 < answer <= NEW_TOKENS

    return [one for task in TASKS for one in questions(task, data, count, seed, fits)]


@torch.no_grad()
def forced(pic: PIC, cache: Cache, logits: Tensor, answer: list[int]) -> dict:
    """Nats of each token of the answer, and what stands where it begins.

    Args:
        pic: whose model it is.
        cache: that holds the whole prompt.
        logits: behind the prompt, `[vocabulary]`.
        answer: its ids.
    """
    chances = logits.float().log_softmax(-1)
    found = {
        "entropy": float(-(chances.exp() * chances).sum()),
        "likeliest": pic.tokenizer.decode([int(chances.argmax())]),
        "nats": [float(-chances[answer[0]])],
    }
    for before, token in pairwise(answer):
        row = torch.tensor([[before]], device=pic.model.device)
        chances = pic.model(input_ids=row, past_key_values=cache).logits[0, -1].float()
        found["nats"].append(float(-chances.log_softmax(-1)[token]))
    return found


@torch.no_grad()
def rows_of(pic: PIC, problem: Problem) -> dict[str, dict]:
    """What `forced` gives of full prefill and of each link."""
    cut, tokenizer = pieces(problem, pic.tokenizer), pic.tokenizer
    first, query = text_ids(cut.prefix, tokenizer), text_ids(cut.query, tokenizer)
    documents = [text_ids(document, tokenizer) for document in cut.documents]
    answer, device = answer_ids(problem, tokenizer), pic.model.device
    whole = torch.tensor([[*first, *(i for ids in documents for i in ids), *query]], device=device)
    cache = DynamicCache()
    logits = pic.model(input_ids=whole, past_key_values=cache, logits_to_keep=1).logits[0, -1]
    found = {FULL: forced(pic, cache, logits, answer)}
    for name, sinks in ARMS.items():
        behind = pic.behind(sinks)
        chunks = [behind.compile(first, first=True), *map(behind.compile, documents)]
        prompt = behind.link(chunks, query, NaiveReuse())
        last = torch.tensor([query[-1:]], device=device)  # the prompt's cache waits for it
        pic.model(input_ids=last, past_key_values=prompt.past_key_values)
        found[name] = forced(pic, prompt.past_key_values, prompt.logits[0], answer)
    return found


def summary(record: dict) -> list[dict]:
    """Of each lead and arm the nats less full prefill's, with 95 % intervals over questions."""
    seed, told = record["configuration"]["seed"], []
    for lead in LEADS:
        every = [row["arms"] for row in record["rows"] if row["lead"] == lead]
        sample = Sample(["questions"] * len(every), seed)

        def nats(arm: str, part: slice, every: list[dict] = every) -> np.ndarray:
            return np.array([np.mean(arms[arm]["nats"][part]) for arms in every])

        for arm in (FULL, *ARMS):
            kinds = {"first": slice(1), "later": slice(1, None), "all": slice(None)}
            apart = {
                name: sample.interval(nats(arm, part) - nats(FULL, part))
                for name, part in kinds.items()
            }
            begins = Counter(arms[arm]["likeliest"] for arms in every)
            likeliest, times = begins.most_common(1)[0]
            told.append(
                {
                    "lead": lead,
                    "arm": arm,
                    "first_nats": float(nats(arm, slice(1)).mean()),
                    "entropy": float(np.mean([arms[arm]["entropy"] for arms in every])),
                    "likeliest": f"{likeliest!r} in {times} of {len(every)}",
                    **apart,
                }
            )
    return told


def table(record: dict) -> str:
    """What stands between the markers of answer_begins.json in docs/linking.md."""
    columns = {
        "lead": "{lead}",
        "arm": "{arm}",
        "first token, nats": "{first_nats:.1f}",
        "entropy there": "{entropy:.1f}",
        "likeliest there": "{likeliest}",
        "first token, less full's": "{first}",
        "the others, less full's": "{later}",
        "the answer, less full's": "{all}",
    }
    rows = [
        row | {name: "" if row["arm"] == FULL else said(row[name], digits=2)
               for name in ("first", "later", "all")}
        for row in record["summary"]
    ]  # fmt: skip
    asked_of, where = record["configuration"], record["environment"]
    return (
        f"{markdown(rows, columns)}\n\n{asked_of['model']}, {asked_of['questions']} questions of "
        f"each of {' and '.join(TASKS)}; {where['hardware']}, torch {where['torch']}, transformers "
        f"{where['transformers']}, seed {asked_of['seed']}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="a model of examples/models.py")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets' files")
    parser.add_argument("--questions", type=int, default=20, help="of each task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    begun = time.perf_counter()
    pic = PIC(*loaded(args.model, torch.float32), flops_per_byte=None)
    problems = asked(pic.tokenizer, args.data, args.questions, args.seed)
    rows = []
    for number, problem in enumerate(tqdm(problems, desc="questions")):
        for lead in LEADS:
            arms = rows_of(pic, replace(problem, lead=lead))
            rows.append({"lead": lead, "number": number, "arms": arms})
        pic.store.clear()  # the chunks are the same behind both leads
    record = {
        "configuration": {name: getattr(args, name) for name in ("model", "questions", "seed")},
        "environment": environment(),
        "rows": rows,
    }
    record["summary"] = summary(record)
    record["seconds"] = time.perf_counter() - begun
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "answer_begins.json").write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    main()
