"""What the quickstart asks a model: questions on passages, and texts to decode along.

A real model answers questions on the passages of `examples/data`; the reference model, which knows
three hundred words, the tasks it was trained on.
"""

import json
import random
from functools import partial
from pathlib import Path

from reference_tasks import LOOKUP_SYSTEM, cut, lookup_problem, reasoning_problem

import picache
import sparsity

DATA = Path(__file__).parents[1] / "data"
DOCUMENTS = 8
PIECE_TOKENS = 24  # of the reference model's documents
AT_MOST = {"questions": 72, "texts": 12}  # that there are
LINK_SEED, REASONING_SEED = 2 * 10**9, 3 * 10**9


def link_problems(model: str, count: int) -> list[picache.Problem]:
    """`count` questions, each on eight documents; spread over the passages."""
    if model == "reference":
        rng = random.Random(LINK_SEED)
        return [_lookup(rng) for _ in range(count)]
    problems = picache.load_problems(DATA / "passages.json", documents=DOCUMENTS)
    return [problems[i * len(problems) // count] for i in range(count)]


def _lookup(rng: random.Random) -> picache.Problem:
    """Facts on towns, cut into pieces wherever they fall, and a sentence to complete."""
    problem = lookup_problem(rng, DOCUMENTS)
    pieces = tuple(cut(problem.documents, PIECE_TOKENS))
    instruction = LOOKUP_SYSTEM.removeprefix("<bos> ")
    return picache.Problem(pieces, problem.query(), (problem.questions[0][1],), instruction)


def texts(model: str, count: int, tokens: int, tokenizer) -> list[str] | list[sparsity.Problem]:
    """`count` texts of `tokens` tokens; chains of thought to decode for the reference model."""
    if model == "reference":
        draw = partial(reasoning_problem, random.Random(REASONING_SEED), 40)
        chains = [draw() for _ in range(count)]
        return [sparsity.Problem(chain.prompt, (chain.answer,)) for chain in chains]
    found = json.loads((DATA / "texts.json").read_text())["texts"]
    ids = [tokenizer(each["text"])["input_ids"][:tokens] for each in found[:count]]
    shortest = min(map(len, ids))
    if shortest < tokens:
        raise sparsity.SparsityError(f"a text has {shortest} tokens, and --tokens is {tokens}")
    return [tokenizer.decode(each, skip_special_tokens=True) for each in ids]
