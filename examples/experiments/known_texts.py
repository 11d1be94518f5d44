"""The texts of retention_evidence.py, and dense attention along them, computed once in a process.

A worker finds them here: of the script that runs, it is sent a copy, whose caches stay behind.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

from layer_by_layer import Texts, hidden_states
from loaded import loaded
from retention_texts import texts
from torch import Tensor


class Setting(NamedTuple):
    """What all arms share."""

    model: str
    data: Path
    texts: int
    tokens: int
    prompt: int
    questions: int
    answer: int
    seed: int


@cache
def known(setting: Setting) -> tuple[Texts, Tensor]:
    """The texts, and dense attention's hidden states of them."""
    model, tokenizer = loaded(setting.model)
    ids = texts(tokenizer, setting.data, setting.texts, setting.tokens, setting.seed)
    given = Texts(ids.to(model.device), setting.prompt)
    return given, hidden_states(model, given)[0]
