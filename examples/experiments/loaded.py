"""A model of examples/models.py, loaded once in a process."""

import sys
from functools import cache
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parents[1]))  # scripts, not a package
from models import load


@cache
def loaded(
    name: str, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`load`, in silence and once in a process."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return load(name, dtype)
