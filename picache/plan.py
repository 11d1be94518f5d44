"""The layout of a linked prompt, and the protocol of a method that says what to recompute."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from picache.errors import PICacheError


@dataclass(frozen=True)
class Layout:
    """Where the chunks and the query stand in one linked prompt, in tokens.

    Attributes:
        chunk_lengths: tokens of each chunk in prompt order, dropped BOS tokens not counted.
        query_length: tokens of the query, which follows the last chunk.
    """

    chunk_lengths: tuple[int, ...]
    query_length: int

    @property
    def starts(self) -> tuple[int, ...]:
        """Position of the first token of each chunk."""
        return (0, *accumulate(self.chunk_lengths[:-1]))

    @property
    def context_length(self) -> int:
        """Tokens before the query."""
        return sum(self.chunk_lengths)

    @property
    def total_length(self) -> int:
        """Tokens of the whole prompt."""
        return self.context_length + self.query_length


@runtime_checkable
class LinkMethod(Protocol):
    """Which tokens of the linked chunks are recomputed. Configuration only, no state."""

    def recompute(self, layout: Layout) -> Tensor:
        """Positions to recompute, 1-D int64, any order, duplicates allowed.

        The first chunk is an exact prefix and the query is always recomputed, so positions lie in
        ``[layout.chunk_lengths[0], layout.context_length)``.
        """
        ...


def check_tokens(name: str, k: int) -> None:
    """Raise PICacheError unless `k` is a whole number of at least 0."""
    if not isinstance(k, int) or isinstance(k, bool) or k < 0:
        raise PICacheError(f"{name} needs a whole number k >= 0 of tokens per chunk, got {k!r}")


def rows_to_compute(method: LinkMethod, layout: Layout) -> Tensor:
    """The method's positions and the whole query, sorted, each once.

    Raises:
        PICacheError: when the method names a position outside the chunks it may recompute.
    """
    chosen = method.recompute(layout).to(torch.int64)
    first, context = layout.chunk_lengths[0], layout.context_length
    if chosen.numel() and not (first <= int(chosen.min()) and int(chosen.max()) < context):
        raise PICacheError(
            f"{method!r} asks for positions {int(chosen.min())}..{int(chosen.max())}; only "
            f"{first}..{context - 1} may be recomputed (the first chunk is an exact prefix, the "
            "query is always recomputed)"
        )
    query = torch.arange(context, layout.total_length)
    return torch.unique(torch.cat([chosen, query]))
