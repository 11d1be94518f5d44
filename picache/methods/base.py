"""The layout of a linked prompt, and what a method that says what to recompute looks like."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, Protocol

import torch
from torch import Tensor

from picache.arguments import real_number, whole_number
from picache.errors import PICacheError

Metric = Literal["K", "V", "KV"]


@dataclass(frozen=True)
class Layout:
    """Where the chunks and the query stand in one linked prompt, in tokens.

    Attributes:
        chunk_lengths: tokens of each chunk in prompt order, dropped BOS tokens not counted.
        query_length: tokens of the query, which follows the last chunk.
        num_layers: layers of the model, for methods that choose by layer.
    """

    chunk_lengths: tuple[int, ...]
    query_length: int
    num_layers: int = 1

    @property
    def starts(self) -> tuple[int, ...]:
        """Position of the first token of each chunk."""
        return (0, *accumulate(self.chunk_lengths[:-1]))

    @property
    def prefix_length(self) -> int:
        """Tokens of the first chunk, which is an exact prefix."""
        return self.chunk_lengths[0]

    @property
    def context_length(self) -> int:
        """Tokens before the query."""
        return sum(self.chunk_lengths)

    @property
    def total_length(self) -> int:
        """Tokens of the whole prompt."""
        return self.context_length + self.query_length

    def parallel_positions(self) -> Tensor:
        """Rotary position of every token when the chunks behind the first begin at one place.

        The query follows the longest of them.
        """
        behind = [torch.arange(length) + self.prefix_length for length in self.chunk_lengths[1:]]
        longest = max(self.chunk_lengths[1:], default=0)
        query = torch.arange(self.query_length) + self.prefix_length + longest
        return torch.cat([torch.arange(self.prefix_length), *behind, query])

    @property
    def reusable(self) -> Tensor:
        """Positions behind the first chunk and before the query, ascending."""
        return torch.arange(self.prefix_length, self.context_length)

    def share(self, ratio: float) -> int:
        """Tokens in a share of the reusable ones, rounded down."""
        return int(ratio * (self.context_length - self.prefix_length) + 1e-9)


@dataclass(frozen=True)
class ParallelEncoding:
    """Chunks side by side instead of one after the other; see `picache.methods.ape.APE`.

    Attributes:
        temperature: of the attention to the chunks.
        lse_scale: factor on the log-sum-exp of the attention scores on the chunks.
    """

    temperature: float
    lse_scale: float


class Evidence(Protocol):
    """What a method may ask about the prompt before it chooses. Each answer costs a pass."""

    def query_attention(self, layers: int | None = None, value_norm: bool = False) -> Tensor:
        """How much the query attends to each token of the context as compiled.

        Args:
            layers: the first so many layers only, for the price of those; None for all.
            value_norm: weigh attention by the length of the value it brings.

        Returns:
            Mean over heads and query tokens, fp32 ``[layers, context_length]``.
        """
        ...

    def true_deviation(self, metric: Metric) -> Tensor:
        """Squared distance of reused from true KV, by a full prefill; for oracles.

        Returns:
            Sums over heads and dimensions, fp32 ``[layers, context_length]``.
        """
        ...


class LinkMethod(ABC):
    """Which tokens of a linked prompt are recomputed. Configuration only: a frozen dataclass.

    `recompute` is all that most methods define. One that narrows its choice from layer to layer
    by what it sees there defines `narrow` too.

    Attributes:
        force_query: whether the whole query is recomputed, as every method does by default. False
            compiles the query alone, as some authors' code does, and forces its last token only.
    """

    force_query: bool = True

    @property
    def parallel(self) -> ParallelEncoding | None:
        """For a method that places the chunks side by side; None to place them in order."""
        return None

    @abstractmethod
    def recompute(self, layout: Layout, evidence: Evidence) -> Tensor:
        """Positions that enter the first layer, 1-D int64, each once, most important first.

        The first chunk is an exact prefix and the query comes by itself, so positions lie in
        ``[layout.prefix_length, layout.context_length)``; with ``force_query=False`` they may lie
        in the query too.
        """

    def narrow(
        self, layer: int, layout: Layout, positions: Tensor, deviation: Callable[[Metric], Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """Choose again once a layer has made its keys and values; None goes on with all tokens.

        Args:
            layer: index of the layer.
            layout: of the prompt.
            positions: of the tokens recomputed in this layer, ascending; the query, or its last
                token, is recomputed in any case and is not among them.
            deviation: gives, for a metric, the squared distance of each token's fresh keys or
                values (or both) from the reused ones, fp32 ``[len(positions)]``.

        Returns:
            Two subsets of `positions`: the tokens whose keys and values are replaced in this layer,
            and those that go on to the next layer.
        """
        return None


def check_tokens(name: str, k: object) -> int:
    """Tokens per chunk as an int; PICacheError unless a whole number of at least 0."""
    return whole_number(f"{name} needs a whole number k >= 0 of tokens per chunk", k, least=0)


def check_ratio(name: str, ratio: object) -> float:
    """A share of the tokens as a float of Python; PICacheError unless in [0, 1]."""
    needs = f"{name} needs a ratio of tokens between 0 and 1"
    return real_number(needs, ratio, lambda share: 0 <= share <= 1)


def top(score: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores, largest first; of equals, the earlier first."""
    return score.argsort(descending=True, stable=True)[:count]


def positions_to_recompute(method: LinkMethod, layout: Layout, evidence: Evidence) -> Tensor:
    """The method's positions and the query's (or its last), sorted, each once.

    Raises:
        PICacheError: when the method names a position outside the chunks it may recompute.
    """
    chosen = method.recompute(layout, evidence)
    if not isinstance(chosen, Tensor) or chosen.dtype != torch.int64 or chosen.dim() != 1:
        raise PICacheError(
            f"{method!r}.recompute must give positions as a 1-D int64 tensor, got {chosen!r}"
        )
    chosen = chosen.cpu()
    first, forced = layout.prefix_length, layout.context_length
    end = forced
    if not method.force_query:
        forced, end = layout.total_length - 1, layout.total_length
    if chosen.numel() and not (first <= int(chosen.min()) and int(chosen.max()) < end):
        raise PICacheError(
            f"{method!r} asks for positions {int(chosen.min())}..{int(chosen.max())}; only "
            f"{first}..{end - 1} may be recomputed (the first chunk is an exact prefix, the "
            "query is always recomputed)"
        )
    return torch.unique(torch.cat([chosen, torch.arange(forced, layout.total_length)]))
