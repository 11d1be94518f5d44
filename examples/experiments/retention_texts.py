"""Long texts for retention: pages of a novel, worked solutions one after the other; questions."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

KINDS = ("novel", "solutions")
"""Texts of even number are of the first kind, those of odd number of the second."""


def texts(
    tokenizer: PreTrainedTokenizerBase, folder: Path | None, count: int, tokens: int, seed: int
) -> Tensor:
    """Texts of both kinds in turn, none of which shares a passage with another.

    Args:
        tokenizer: of the model.
        folder: with `text/war_and_peace_a.txt` and `math500/test.jsonl`.
        count: how many, an even number.
        tokens: of each.
        seed: of the order of the problems.

    Returns:
        int64 `[count, tokens]`.

    Raises:
        SystemExit: the folder has too little text.
    """
    half = count // 2
    both = zip(_pages(folder, half, tokens), _solutions(folder, half, seed), strict=True)
    rows = []
    for text in (text for pair in both for text in pair):
        ids = tokenizer(text)["input_ids"]
        if len(ids) < tokens:
            raise SystemExit(
                f"a text has {len(ids)} tokens, not {tokens}: ask for fewer or shorter"
            )
        rows.append(ids[:tokens])
    return torch.tensor(rows)


def asked(
    tokenizer: PreTrainedTokenizerBase, folder: Path | None, count: int, seed: int
) -> BatchEncoding:
    """Problems as the user's turn, padded on the left.

    Args:
        tokenizer: of the model; with a chat template, or problems stand alone.
        folder: see `texts`.
        count: how many.
        seed: of their choice.
    """
    chosen = [problem["problem"] for problem in _problems(folder, seed)[:count]]
    if tokenizer.chat_template:
        turns = [[{"role": "user", "content": problem}] for problem in chosen]
        chosen = [
            str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
            for turn in turns
        ]
    return tokenizer(
        chosen,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        return_token_type_ids=False,
    )


def _pages(folder: Path | None, count: int, tokens: int) -> list[str]:
    """Passages of War and Peace in Maude's translation, spread over what there is of it."""
    whole = (_there(folder) / "text" / "war_and_peace_a.txt").read_text()
    every = len(whole) // max(1, count)
    found = []
    for number in range(count):
        passage = whole[number * every : (number + 1) * every]
        found.append(passage[passage.index("\n\n") + 2 :][: 8 * tokens])
    return found


def _solutions(folder: Path | None, count: int, seed: int) -> list[str]:
    """Problems of MATH-500 with their solutions; each in one text only."""
    problems = _problems(folder, seed)
    share = len(problems) // max(1, count)
    parts = [problems[number * share : (number + 1) * share] for number in range(count)]
    return [
        "\n\n".join(f"Problem: {one['problem']}\nSolution: {one['solution']}" for one in part)
        for part in parts
    ]


def _problems(folder: Path | None, seed: int) -> list[dict]:
    lines = (_there(folder) / "math500" / "test.jsonl").read_text().splitlines()
    order = np.random.default_rng(seed).permutation(len(lines))
    return [json.loads(lines[i]) for i in order]


def _there(folder: Path | None) -> Path:
    if folder is None or not (folder / "text").exists():
        raise SystemExit(f"--data {folder}: there is no folder text in it; see docs/traces.md")
    return folder
