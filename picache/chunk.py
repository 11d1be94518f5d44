"""A chunk of text as token ids, and the key its compiled KV is stored under."""

from dataclasses import dataclass

import torch
from torch import Tensor

from picache.errors import PICacheError
from picache.header import Header

KV = tuple[Tensor, Tensor]  # keys and values of one layer, each [1, kv_heads, tokens, head_dim]


@dataclass(frozen=True)
class Form:
    """Tokens as they go through the model together, and which of them come into a prompt.

    Attributes:
        ids: the token ids that are prefilled alone.
        skip: leading tokens whose KV is left out of the prompt: a BOS, or dummies.
        key: content key of `ids` and `header`; empty for a query, which is not stored.
        header: what else tells this chunk's KV apart.
    """

    ids: tuple[int, ...]
    skip: int
    key: str = ""
    header: Header | None = None


@dataclass(frozen=True)
class Chunk:
    """A handle on a compiled chunk; the KV itself lives in the store, under `key`.

    The ids stay with the handle, so that a chunk the store has evicted is compiled again when it
    is linked (the report counts it as a miss).

    Attributes:
        key: content key: token ids as compiled, and everything in a `picache.header.Header`.
        ids: the token ids of the text, a leading BOS included.
        nbytes: bytes of the compiled keys and values.
    """

    key: str
    ids: tuple[int, ...]
    nbytes: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the text, a leading BOS included."""
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Chunk({self.num_tokens} tokens, {self.nbytes:,} bytes, key={self.key[:12]})"


def as_ids(tokens: object, vocab_size: int, what: str) -> tuple[int, ...]:
    """A list or 1-D tensor of token ids as a tuple.

    Raises:
        PICacheError: when it is empty, not one-dimensional integers, or out of the vocabulary.
    """
    try:
        tensor = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PICacheError(
            f"{what} must be a text, a list of token ids or a 1-D integer tensor, got "
            f"{type(tokens).__name__}"
        ) from error
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.dtype == torch.bool:
        if tensor.numel() == 0:
            raise PICacheError(f"{what} is empty: give at least one token")
        raise PICacheError(
            f"{what} must be a text, a list of token ids or a 1-D integer tensor, "
            f"got shape {tuple(tensor.shape)} and dtype {tensor.dtype}"
        )
    if tensor.numel() == 0:
        raise PICacheError(f"{what} is empty: give at least one token")
    low, high = int(tensor.min()), int(tensor.max())
    if low < 0 or high >= vocab_size:
        raise PICacheError(
            f"{what} holds token id {low if low < 0 else high}, the model's vocabulary is "
            f"0..{vocab_size - 1}: tokenize with this model's tokenizer"
        )
    return tuple(tensor.tolist())
