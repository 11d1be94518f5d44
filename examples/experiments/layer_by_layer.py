"""Known texts under policies, one layer after the other: the numbers of token by token, sooner.

What a policy keeps in a layer follows from the queries, keys and values of that layer, and where
the text is known those follow from the layers below. So each layer goes through the whole text
before the next one begins: its matrices see all tokens at once, and only attention goes on token
by token, in the code that runs under `SparseCache`. On a GPU the steps of a layer are captured as a
CUDA graph, and several policies go side by side, each on a stream of its own. `sparsity.compare`
goes token by token through the whole model, and a test holds the two against each other.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from sparsity import SparseCache
from sparsity.hf.attach import keep_attached
from sparsity.policies.base import Policy
from sparsity.retention.batch_rows import BatchRows, Step, plan
from sparsity.retention.clock import Clock
from sparsity.retention.fixed_pool import evicts_between_steps, make_room, rehearse, steps_left
from sparsity.retention.layer import LayerRetention
from sparsity.retention.lazy_mask import LazyMask

NAME = "a_text_layer_by_layer"
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
PLAIN = LazyMask(None, None, False, lambda: None)  # causal, without padding
BURST = 8
"""Steps of a CUDA graph, so that the processor launches fewer."""


@dataclass(frozen=True)
class Texts:
    """Texts of equal length, whose first tokens are a prompt.

    Attributes:
        ids: int64 `[rows, tokens]`.
        prompt_tokens: tokens that come in one forward; the others come one by one.
        real: bool `[rows, tokens]`, False for padding, which stands in front of a prompt; None
            where there is none.
    """

    ids: Tensor
    prompt_tokens: int
    real: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        """Of each token among those of its row, int64 `[rows, tokens]`; 0 for padding."""
        if self.real is None:
            return torch.arange(self.ids.shape[1], device=self.ids.device).expand_as(self.ids)
        return (self.real.long().cumsum(-1) - 1).clamp(min=0)


class Walk:
    """A policy along texts.

    Attributes:
        steps: the forward of the prompt, and then one for each token.
        retentions: of the layers that are still to come, by their index in the model.

    Raises:
        SparsityError: as `SparseCache` does, for a prompt that leaves no room in the budget too.
    """

    def __init__(self, model: PreTrainedModel, policy: Policy, texts: Texts) -> None:
        rows, tokens = texts.ids.shape
        with keep_attached(model):
            on_gpu = texts.ids.is_cuda
            cache = SparseCache(model, policy, max_tokens=tokens, static=on_gpu)
        self.retentions = cache.retentions
        self.steps: list[Step] = []
        at, real = BatchRows(), texts.real
        self._mask = PLAIN if real is None else LazyMask(None, real, False, lambda: None)
        for count in [texts.prompt_tokens] + [1] * (tokens - texts.prompt_tokens):
            mask = None if real is None or at.seen else real[:, :count]
            self.steps.append(plan(at, policy, rows, count, mask, texts.ids.device))
            at = self.steps[-1].then

    def go(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, out: Tensor
    ) -> Iterator[None]:
        """Attention of the texts in one layer, a few tokens from one `next` to the other.

        Args:
            layer: its index in the model.
            query: `[rows, query_heads, tokens, head_dim]`.
            key: `[rows, kv_heads, tokens, head_dim]`.
            value: `[rows, kv_heads, tokens, value_dim]`.
            scaling: factor on a query-key product before the softmax.
            out: written to, `[rows, tokens, query_heads, value_dim]`.
        """
        retention, prompt = self.retentions.pop(layer), self.steps[0].stop

        def part(first: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
            return query[:, :, first:stop], key[:, :, first:stop], value[:, :, first:stop]

        out[:, :prompt] = retention.attend(*part(0, prompt), self.steps[0], self._mask, scaling)
        yield
        if retention.places is not None:
            yield from self._go_on(retention, query, key, value, scaling, out)
            return
        for step in self.steps[1:]:
            new = part(step.first, step.stop)
            out[:, step.first : step.stop] = retention.attend(*new, step, self._mask, scaling)
            yield

    def _go_on(
        self,
        retention: LayerRetention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        out: Tensor,
    ) -> Iterator[None]:
        """The tokens behind the prompt, in memory of fixed size; written to `out`."""
        column, tokens = self.steps[0].stop, query.shape[2]
        clock = Clock.at(self.steps[0].after, column)

        def step() -> None:
            at = clock.column[None]
            q, k, v = (whole.index_select(2, at) for whole in (query, key, value))
            out.index_copy_(1, at, retention.decode(q, k, v, clock, scaling))
            clock.advance()

        pool, policy = retention.pool, retention.policy
        assert pool is not None
        assert retention.weigh is not None
        if query.is_cuda:
            rehearse(pool, policy, clock, **retention.score_arguments)
        between, due = evicts_between_steps(policy), column
        replayed = _captured if query.is_cuda else _repeated
        one, burst, began = step, None, column
        while column < tokens:
            if between and column == due:
                if not steps_left(pool, policy, clock):
                    make_room(pool, policy, clock, retention.weigh)
                due = column + max(1, int(steps_left(pool, policy, clock)))
            if column > began and burst is None:  # the first step has built all that it needs
                one, burst = replayed(step, 1), replayed(step, BURST)
            left = min(tokens, due if between else tokens) - column
            many = burst is not None and left >= BURST
            (burst if many else one)()  # type: ignore[misc]
            column += BURST if many else 1
            yield


def _captured(step: Callable[[], None], times: int) -> Callable[[], None]:
    """The kernels of some steps as a CUDA graph of the current stream: what to call for them.

    Without what `torch.cuda.graph` does besides, which empties the allocator for every layer.
    """
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    try:
        _repeated(step, times)()
    finally:
        graph.capture_end()
    return graph.replay


def _repeated(step: Callable[[], None], times: int) -> Callable[[], None]:
    """What to call for some steps, one after the other."""

    def steps() -> None:
        for _ in range(times):
            step()

    return steps


def side_by_side(walks: Sequence[Walk]) -> Attend:
    """Attention of all walks, whose rows stand one after the other; see `Walk.go`."""
    on_gpu = walks[0].steps[0].after.is_cuda
    streams = [torch.cuda.Stream() if on_gpu else None for _ in walks]

    def on(stream: Any) -> AbstractContextManager[object]:
        return nullcontext() if stream is None else torch.cuda.stream(stream)

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        rows, heads, tokens, _ = query.shape
        out = value.new_empty(rows, tokens, heads, value.shape[-1])
        parts = zip(*(whole.chunk(len(walks)) for whole in (query, key, value, out)), strict=True)
        running = [
            (stream, walk.go(layer, q, k, v, scaling, o))
            for stream, walk, (q, k, v, o) in zip(streams, walks, parts, strict=True)
        ]
        for stream in filter(None, streams):
            stream.wait_stream(torch.cuda.current_stream())
        while running:
            going = []
            for stream, walk in running:
                with on(stream):
                    if next(walk, walk) is None:
                        going.append((stream, walk))
            running = going
        for stream in filter(None, streams):
            torch.cuda.current_stream().wait_stream(stream)
        return out

    return attend


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **given: Any
) -> tuple[Tensor, None]:
    """What transformers calls in each layer."""
    return given["attend"](module.layer_idx, query, key, value, given["scaling"]), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """What transformers calls for a mask: a `Walk` needs none."""


@torch.no_grad()
def hidden_states(model: PreTrainedModel, texts: Texts, walks: Sequence[Walk] = ()) -> list[Tensor]:
    """What the model's last layer gives of each token, of each walk `[rows, tokens, hidden_size]`.

    Args:
        model: whose layers attend by query, key, value and scaling alone; left as it was.
        texts: those of the walks.
        walks: new ones; none for the model's own attention, which gives one.
    """
    if walks:
        return list(through(model, texts, side_by_side(walks), len(walks)).chunk(len(walks)))
    decoder: Any = model.get_decoder()
    mask = None if texts.real is None else texts.real.long()
    given = {"attention_mask": mask, "position_ids": texts.positions, "use_cache": False}
    return [decoder(input_ids=texts.ids, **given).last_hidden_state]


@torch.no_grad()
def through(model: PreTrainedModel, texts: Texts, attend: Attend, times: int = 1) -> Tensor:
    """`hidden_states` with an attention of one's own.

    Args:
        model: see `hidden_states`.
        texts: see `hidden_states`.
        attend: what each layer calls for the whole texts: its index, queries, keys and values
            `[rows, heads, tokens, head_dim]`, scaling.
        times: how many times the rows stand there.
    """
    decoder: Any = model.get_decoder()
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    before = decoder.config._attn_implementation  # noqa: SLF001 (there is no public reader)
    decoder.set_attn_implementation(NAME)
    ids, positions = (rows.repeat(times, 1) for rows in (texts.ids, texts.positions))
    try:
        found: Tensor = decoder(
            input_ids=ids, position_ids=positions, use_cache=False, attend=attend
        ).last_hidden_state
    finally:
        decoder.set_attn_implementation(before)
    return found


@torch.no_grad()
def apart(model: PreTrainedModel, texts: Texts, dense: Tensor, found: Tensor) -> Tensor:
    """How far an arm is from dense at each token behind the prompt.

    Args:
        model: whose output embeddings alone make logits of hidden states.
        texts: see `hidden_states`.
        dense: hidden states of the model's own attention.
        found: of the arm.

    Returns:
        Extra nats, KL(dense || arm), and 1 where both find the same token likeliest; float32
        `[3, rows, tokens - prompt_tokens]`, on the CPU.
    """
    head: Any = model.get_output_embeddings()
    ids, prompt_tokens = texts.ids, texts.prompt_tokens
    parts = []
    for first in range(prompt_tokens - 1, ids.shape[1] - 1, 64):
        stop = min(first + 64, ids.shape[1] - 1)
        logits = [head(states[:, first:stop]) for states in (dense, found)]
        expected, other = (one.float().log_softmax(-1) for one in logits)
        divergence = (expected.exp() * (expected - other)).sum(-1)
        token = ids[:, first + 1 : stop + 1, None]
        extra = (expected - other).gather(-1, token)[..., 0]
        same = (logits[0].argmax(-1) == logits[1].argmax(-1)).float()
        parts.append(torch.stack([extra, divergence, same]).cpu())
    return torch.cat(parts, -1)
