"""A model and its time to the first token, for the experiments on the reference model."""

import time
from functools import cache
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

REFERENCE_MODEL = Path(__file__).parents[1] / "reference_model"


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM in fp32 on CPU, in its own dtype on a GPU, and its tokenizer."""
    on_gpu = torch.cuda.is_available()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        name, dtype="auto" if on_gpu else torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    return model.to("cuda" if on_gpu else "cpu").eval(), tokenizer


@cache
def loaded(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`load`, in silence and once in a process."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return load(name)


def first_token_seconds(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Seconds of a plain full prefill up to the logits of the first new token."""
    if ids.is_cuda:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    with torch.no_grad():
        model(ids, logits_to_keep=1)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def cut(documents: tuple[str, ...], tokens: int) -> list[str]:
    """The documents' text in pieces of so many tokens, wherever they fall."""
    words = " ".join(documents).split()  # one word, one token
    return [" ".join(words[i : i + tokens]) for i in range(0, len(words), tokens)]
