"""The token ids of chunks and queries, and which of them the tokenizer added to the text.

A special token is left out of a prompt because the tokenizer added it, never because of its id. The
text itself may begin with the same token: a chat turn of SmolLM2 begins with its BOS.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from picache.errors import PICacheError

_PROBE = "a"


@dataclass(frozen=True)
class TextIds:
    """A chunk or a query as token ids.

    Attributes:
        ids: the special tokens in front of the text, and the text.
        lead: how many of the ids are special tokens in front, such as a BOS.
        dropped: special tokens that the tokenizer added and that no prompt contains: an EOS behind
            the text, or a second BOS in front of a text that begins with one.
    """

    ids: tuple[int, ...]
    lead: int
    dropped: tuple[int, ...] = ()


def ids_of_text(
    text: str, tokenizer: Callable[..., Any] | None, vocab_size: int, what: str
) -> TextIds:
    """Tokenize a text, once with and once without special tokens, which tells what was added.

    Args:
        text: of a chunk or a query.
        tokenizer: of the model; None where there is none.
        vocab_size: entries of the model's vocabulary.
        what: names the argument in errors.

    Raises:
        PICacheError: without a tokenizer, on an empty text, on ids out of the vocabulary, or when
            special tokens change how the text itself is tokenized.
    """
    if tokenizer is None:
        raise PICacheError(
            f"{what} is text but PIC has no tokenizer: PIC(model, tokenizer=...), or give token ids"
        )
    front, bare, behind = _parts(text, tokenizer, what)
    doubled = bool(front) and bare[: len(front)] == front  # a template that is rendered already
    dropped = (*front, *behind) if doubled else behind
    lead = 0 if doubled else len(front)
    ids = bare if doubled else (*front, *bare)
    return TextIds(as_ids(ids, vocab_size, what), lead, dropped)


def ids_as_given(
    tokens: object,
    tokenizer: Callable[..., Any] | None,
    bos: tuple[int, ...],
    vocab_size: int,
    what: str,
) -> TextIds:
    """Take token ids as they are; a BOS that they begin with counts as added by a tokenizer.

    Where there is a tokenizer, a BOS is what it puts in front of every text; ids that begin with
    another token begin with text. Nothing is taken off the end.

    Args:
        tokens: a list, an array, a 1-D or ``[1, n]`` tensor, or a `BatchEncoding` of one text.
        tokenizer: of the model; None where there is none.
        bos: ids of the model's BOS, which count where there is no tokenizer.
        vocab_size: entries of the model's vocabulary.
        what: names the argument in errors.
    """
    ids = as_ids(tokens, vocab_size, what)
    if tokenizer is None:
        return TextIds(ids, 1 if ids[0] in bos else 0)
    front = _parts(_PROBE, tokenizer, what)[0]
    return TextIds(ids, len(front) if ids[: len(front)] == front else 0)


def _parts(
    text: str, tokenizer: Callable[..., Any], what: str
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The tokens that are added in front of a text, the text's own, and those added behind it."""
    try:
        whole, bare = (
            tuple(tokenizer(text, add_special_tokens=special)["input_ids"])
            for special in (True, False)
        )
    except TypeError as error:
        raise PICacheError(
            f"the tokenizer {type(tokenizer).__name__} cannot be called as transformers' are, "
            f"tokenizer(text, add_special_tokens=True)['input_ids']: {error}"
        ) from error
    if not bare:  # an empty text: only the EOS tells what is added in front and what behind
        end = getattr(tokenizer, "eos_token_id", None)
        behind = tuple(token for token in whole[1:] if token == end)
        return whole[: len(whole) - len(behind)], (), behind
    for start in range(len(whole) - len(bare), -1, -1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], bare, whole[start + len(bare) :]
    raise PICacheError(
        f"the tokenizer {type(tokenizer).__name__} gives {what} other tokens with special tokens "
        "than without, so that what it added cannot be told: give token ids"
    )


def as_ids(tokens: object, vocab_size: int, what: str) -> tuple[int, ...]:
    """Token ids as a tuple.

    Args:
        tokens: a list, an array, a 1-D or ``[1, n]`` tensor, or a `BatchEncoding` of one text.
        vocab_size: entries of the model's vocabulary.
        what: names the argument in errors.

    Raises:
        PICacheError: when they are empty, of several texts, padded, no integers, or out of the
            vocabulary.
    """
    expected = f"{what} must be a text, a list of token ids or a 1-D integer tensor"
    if isinstance(tokens, Mapping):
        if "input_ids" not in tokens:
            raise PICacheError(f"{expected}, got a {type(tokens).__name__} without input_ids")
        mask = tokens.get("attention_mask")
        if mask is not None and not bool(torch.as_tensor(mask).all()):
            raise PICacheError(f"{what} is padded: tokenize it without padding")
        tokens = tokens["input_ids"]
    if np.ma.is_masked(tokens):
        raise PICacheError(f"{what} has masked entries: give the ids without them")
    try:
        tensor = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PICacheError(f"{expected}, got {type(tokens).__name__}") from error
    if tensor.dim() == 2 and len(tensor) == 1:
        tensor = tensor[0]
    if tensor.numel() == 0:
        raise PICacheError(f"{what} is empty: give at least one token")
    no_integers = tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool
    if tensor.dim() != 1 or no_integers:
        raise PICacheError(f"{expected}, got shape {tuple(tensor.shape)} and dtype {tensor.dtype}")
    tensor = tensor.to(torch.int64)
    low, high = int(tensor.min()), int(tensor.max())
    if low < 0 or high >= vocab_size:
        raise PICacheError(
            f"{what} holds token id {low if low < 0 else high}, the model's vocabulary is "
            f"0..{vocab_size - 1}: tokenize with this model's tokenizer"
        )
    return tuple(tensor.tolist())
