"""What a link method is, and the layout of the prompt that it chooses tokens from."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal, Protocol

import torch
from torch import Tensor

from picache.arguments import real_number, whole_number
from picache.errors import PICacheError

Metric = Literal["K", "V", "KV"]
"""Whether the deviation of keys, of values or of both counts."""


@dataclass(frozen=True)
class Layout:
    """Where the chunks and the query stand in a linked prompt; all lengths are in tokens.

    Attributes:
        chunk_lengths: tokens of each chunk in prompt order, without the sinks it was compiled
            behind.
        query_length: tokens of the query, which follows the last chunk.
        num_layers: layers of the model, for methods that choose again in each layer.
    """

    chunk_lengths: tuple[int, ...]
    query_length: int
    num_layers: int = 1

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Position of the first token of each chunk."""
        return (0, *accumulate(self.chunk_lengths[:-1]))

    @property
    def prefix_length(self) -> int:
        """Tokens of the first chunk, which is an exact prefix."""
        return self.chunk_lengths[0]

    @cached_property
    def context_length(self) -> int:
        """Tokens before the query."""
        return sum(self.chunk_lengths)

    @cached_property
    def total_length(self) -> int:
        """Tokens of the whole prompt."""
        return self.context_length + self.query_length

    def parallel_positions(self) -> Tensor:
        """The rotary position of every token when chunks stand side by side, int64 ``[tokens]``.

        All chunks behind the first begin at the same position; the query follows the longest.
        """
        behind = [torch.arange(length) + self.prefix_length for length in self.chunk_lengths[1:]]
        longest = max(self.chunk_lengths[1:], default=0)
        query = torch.arange(self.query_length) + self.prefix_length + longest
        return torch.cat([torch.arange(self.prefix_length), *behind, query])

    @property
    def reusable(self) -> Tensor:
        """Positions behind the first chunk and before the query, ascending: what may be reused."""
        return torch.arange(self.prefix_length, self.context_length)

    def share(self, ratio: float) -> int:
        """How many tokens a share of the reusable ones is, rounded down."""
        return int(ratio * (self.context_length - self.prefix_length) + 1e-9)


@dataclass(frozen=True)
class ParallelEncoding:
    """How chunks are encoded side by side instead of one after the other; see `APE`.

    Attributes:
        temperature: by which the keys of the chunks are divided.
        lse_scale: factor on the log-sum-exp of the attention scores on the chunks.
    """

    temperature: float
    lse_scale: float


class Evidence(Protocol):
    """What a method may ask about the prompt before it chooses; each answer costs forwards."""

    def query_attention(self, layers: int | None = None, value_norm: bool = False) -> Tensor:
        """How much the query attends to each token before it, the chunks being as compiled.

        Args:
            layers: how many of the first layers to run and answer for; None for all.
            value_norm: whether to weight attention by the norm of the value it is paid to.

        Returns:
            Attention weights, the mean over heads and query tokens, fp32
            ``[layers, context_length]``.
        """
        ...

    def true_deviation(self, metric: Metric) -> Tensor:
        """The squared distance of each token's reused KV from that of a full prefill; for oracles.

        Args:
            metric: whether keys, values or both count.

        Returns:
            Sums over heads and dimensions, fp32 ``[layers, context_length]``.
        """
        ...


class LinkMethod(ABC):
    """Says which tokens of a linked prompt are recomputed; a frozen dataclass of its settings.

    Most methods define `recompute` alone. One that narrows its choice from layer to layer, by what
    it sees there, defines `narrow` too.

    Attributes:
        force_query: whether the whole query is recomputed, as under every method by default. With
            False, as in some authors' code, the query is compiled alone like a chunk, and of its
            tokens only the last must be recomputed.
    """

    force_query: bool = True

    @property
    def parallel(self) -> ParallelEncoding | None:
        """How the chunks stand side by side; None, the default, for one after the other."""
        return None

    @abstractmethod
    def recompute(self, layout: Layout, evidence: Evidence) -> Tensor:
        """Choose the tokens to recompute.

        The first chunk is an exact prefix, and the query is recomputed in any case: positions lie
        in ``[layout.prefix_length, layout.context_length)``. With ``force_query=False`` they may
        lie in the query too.

        Args:
            layout: where the chunks and the query stand.
            evidence: measures on demand what the choice depends on.

        Returns:
            Positions in the prompt, 1-D int64, each once, the most important first.
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
    """The argument `k`, tokens per chunk, as an int; PICacheError unless it is at least 0."""
    return whole_number(f"{name} needs a whole number k >= 0 of tokens per chunk", k, least=0)


def check_ratio(name: str, ratio: object) -> float:
    """The argument `ratio`, a share of the tokens, as a float; PICacheError unless in [0, 1]."""
    needs = f"{name} needs a ratio of tokens between 0 and 1"
    return real_number(needs, ratio, lambda share: 0 <= share <= 1)


def top(score: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores, the largest first; of equal ones the earlier first."""
    return score.argsort(descending=True, stable=True)[:count]


def positions_to_recompute(method: LinkMethod, layout: Layout, evidence: Evidence) -> Tensor:
    """The positions the method chose and those of the query (or of its last token), ascending.

    Raises:
        PICacheError: when the method's answer is no tensor of positions, or one of them may not be
            recomputed.
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
