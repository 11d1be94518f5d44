"""What a dense run attended to: queries, keys and values of one text, layer by layer."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsity.arguments import check_instance, whole_number
from sparsity.errors import SparsityError
from sparsity.plotting import axes, fixed_axes, svg
from sparsity.recorded.head_picture import draw_head
from sparsity.retention.attention import attention_weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLOCK = 128  # queries whose weights are in memory at once
SHOWN_ROWS = 128  # decoded tokens in the picture that a notebook shows by itself


@dataclass(frozen=True)
class LayerTrace:
    """Queries, keys and values of one layer in a dense run, rotated as its attention saw them.

    Attributes:
        queries: `[query_heads, tokens, head_dim]`.
        keys: `[kv_heads, tokens, head_dim]`.
        values: `[kv_heads, tokens, value_dim]`.
        scaling: factor on a query-key product before the softmax.
        softcap: see `sparsity.retention.attention.attend_reference`.
        sinks: see `sparsity.retention.attention.attend_reference`.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None

    def weights(self, first: int, stop: int, step: int = 1) -> Tensor:
        """Dense attention weights of the tokens `first` to `stop`, or of each `step`-th of them.

        Args:
            first: rank of the first token whose query counts.
            stop: rank after the last.
            step: from one rank to the next.

        Returns:
            Mean over the query heads that share a KV head, float32
            `[kv_heads, ranks, tokens]`.
        """
        ranks = torch.arange(first, stop, step)[:, None]
        causal = torch.arange(self.keys.shape[1]) <= ranks
        weights = attention_weights(
            self.queries[None, :, first:stop:step],
            self.keys[None],
            causal[None, None],
            self.scaling,
            self.softcap,
            self.sinks,
        )
        return weights[0].mean(1).float()

    def head(self, kv_head: int) -> "LayerTrace":
        """What one KV head and the query heads that share it saw."""
        shared = self.queries.shape[0] // self.keys.shape[0]
        group, own = (slice(n * kv_head, n * (kv_head + 1)) for n in (shared, 1))
        sinks = None if self.sinks is None else self.sinks[group]
        tensors = self.queries[group], self.keys[own], self.values[own]
        return LayerTrace(*tensors, self.scaling, self.softcap, sinks)


@dataclass(frozen=True)
class Trace:
    """A dense run of one text, as `sparsity.record` recorded it, in the CPU's memory.

    Attributes:
        ids: token ids of the text, int64 `[tokens + 1]`; the last one was sampled and not fed to
            the model again.
        prompt_tokens: tokens of the prompt.
        forwards: tokens of each forward: those of the prompt (one forward, or one for each chunk),
            then ones.
        layers: what was recorded, by the layer's index in the model.
        full_layers: indices of the model's layers with full attention.
    """

    ids: Tensor
    prompt_tokens: int
    forwards: tuple[int, ...]
    layers: dict[int, LayerTrace]
    full_layers: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens that went through the model."""
        return sum(self.forwards)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors held."""
        return sum(t.nbytes for x in self.layers.values() for t in (x.queries, x.keys, x.values))

    def blocks(self, layer: int) -> Iterator[tuple[int, Tensor]]:
        """Dense attention weights of the decoded tokens, a block of tokens at a time.

        Args:
            layer: index of the layer in the model.

        Yields: The rank of the block's first token, and the weights as `LayerTrace.weights` gives
        them.

        Raises:
            SparsityError: for a layer that was not recorded.
        """
        one = self.at(layer)
        for first in range(self.prompt_tokens, self.tokens, BLOCK):
            yield first, one.weights(first, min(first + BLOCK, self.tokens))

    def at(self, layer: int) -> LayerTrace:
        """The layer of that index in the model; SparsityError when it was not recorded."""
        layer = whole_number("layer", layer)
        if layer not in self.layers:
            raise SparsityError(
                f"layer {layer} is not in this trace: it holds {sorted(self.layers)}; record it "
                "with record(model, layers=[...])"
            )
        return self.layers[layer]

    def mass(self, layer: int, page_size: int = 16) -> Tensor:
        """Share of its attention that each decoded token gives to each page.

        Args:
            layer: index of the layer in the model.
            page_size: tokens a page.

        Returns:
            float32 `[kv_heads, decoded tokens, pages]`. The shares of a token sum to 1, or to less
            in a model with attention sinks of its own.

        Raises:
            SparsityError: for a layer that was not recorded.
        """
        page_size = whole_number("page_size", page_size, least=1)
        return torch.cat([per_page(weights, page_size) for _, weights in self.blocks(layer)], 1)

    def head_mass(self, layer: int, kv_head: int, page_size: int = 16, step: int = 1) -> Tensor:
        """`mass` of one KV head, for each `step`-th decoded token: float32 `[rows, pages]`.

        Raises:
            SparsityError: for a layer or head that the trace does not hold, or a trace without
                decoded tokens.
        """
        kv_head = whole_number("kv_head", kv_head)
        page_size = whole_number("page_size", page_size, least=1)
        heads = self.at(layer).keys.shape[0]
        if not 0 <= kv_head < heads:
            raise SparsityError(f"kv_head={kv_head}: layer {layer} has KV heads 0 to {heads - 1}")
        if self.tokens == self.prompt_tokens:
            raise SparsityError(
                "this trace has no decoded tokens: record with max_new_tokens above 1"
            )
        head = self.at(layer).head(kv_head)
        blocks = [
            per_page(
                head.weights(first, min(first + BLOCK * step, self.tokens), step)[0], page_size
            )
            for first in range(self.prompt_tokens, self.tokens, BLOCK * step)
        ]
        return torch.cat(blocks)

    def figure(
        self,
        layer: int | None = None,
        kv_head: int = 0,
        page_size: int = 16,
        ax: "Axes | None" = None,
    ) -> "Axes":
        """One head's attention as `milestone_map` shows it, with its scale beside it.

        Args:
            layer: index of the layer in the model; the middle one of the trace by default.
            kv_head: index of the KV head.
            page_size: tokens a page.
            ax: axes to draw into; those of a new figure by default, which is ``axes.figure``.

        Raises:
            SparsityError: for a layer or head that the trace does not hold, a trace without
                decoded tokens, or where matplotlib is not installed.
        """
        return self._figure(layer, kv_head, page_size, ax)

    def _figure(
        self, layer: int | None, kv_head: int, page_size: int, ax: "Axes | None", step: int = 1
    ) -> "Axes":
        if layer is None:
            layer = sorted(self.layers)[len(self.layers) // 2] if self.layers else 0
        layer, kv_head = whole_number("layer", layer), whole_number("kv_head", kv_head)
        mass = self.head_mass(layer, kv_head, page_size, step)
        ax = axes(ax, (7.0, 6.0))
        image = draw_head(ax, mass, page_size, self.prompt_tokens, self.tokens)
        ax.set(
            title=f"layer {layer}, KV head {kv_head}: attention by page of {page_size} tokens",
            xlabel="token attended to (dotted: end of the prompt)",
            ylabel="token that attends",
        )
        scale = ax.figure.colorbar(image, ax=ax, label="share of the attention", format="%g")
        scale.minorticks_off()  # half of the time that drawing would take
        return ax

    def _repr_svg_(self) -> str | None:
        decoded = self.tokens - self.prompt_tokens
        if not self.layers or not decoded:
            return None  # nothing to draw: a notebook shows the text
        step = -(-decoded // SHOWN_ROWS)
        return svg(lambda: self._figure(None, 0, 16, fixed_axes((6.0, 4.5)), step))

    def __repr__(self) -> str:
        return (
            f"Trace({self.prompt_tokens} prompt and {self.tokens - self.prompt_tokens} decoded "
            f"tokens, {len(self.layers)} of {len(self.full_layers)} layers, "
            f"{self.num_bytes:,} bytes)"
        )


def check_trace(trace: object) -> None:
    """Raise SparsityError for what is no trace."""
    check_instance("trace", trace, Trace, "what record(model, input_ids=...) returns")


def per_page(tokens: Tensor, page_size: int) -> Tensor:
    """`[..., tokens]` summed over pages of `page_size` tokens; the last page may be shorter."""
    short = -tokens.shape[-1] % page_size
    return torch.nn.functional.pad(tokens, (0, short)).unflatten(-1, (-1, page_size)).sum(-1)
