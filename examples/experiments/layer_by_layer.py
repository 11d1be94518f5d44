"""Known texts under a policy, one layer after the other: the numbers of token by token, sooner.

What a policy keeps in a layer follows from the queries, keys and values of that layer, and where
the text is known those follow from the layers below. So each layer goes through the whole text
before the next one begins: its matrices see all tokens at once, and only attention goes on token
by token, in the code that runs under `SparseCache`. On a GPU the step of a layer is captured as a
CUDA graph. `sparsity.compare` goes token by token through the whole model, and a test holds the two
against each other.
"""

from collections.abc import Callable
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


class Walk:
    """A policy along texts of equal length, whose first tokens are a prompt.

    Attributes:
        steps: the forward of the prompt, and then one for each token.
        retentions: of the layers that are still to come, by their index in the model.
    """

    def __init__(
        self, model: PreTrainedModel, policy: Policy, ids: Tensor, prompt_tokens: int
    ) -> None:
        rows, tokens = ids.shape
        with keep_attached(model):
            on_gpu = ids.is_cuda
            cache = SparseCache(model, policy, max_tokens=tokens, static=on_gpu)
        self.retentions = cache.retentions
        self.steps: list[Step] = []
        at = BatchRows()
        for count in [prompt_tokens] + [1] * (tokens - prompt_tokens):
            self.steps.append(plan(at, policy, rows, count, None, ids.device))
            at = self.steps[-1].then

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """Attention of the whole text in one layer.

        Args:
            layer: its index in the model.
            query: `[rows, query_heads, tokens, head_dim]`.
            key: `[rows, kv_heads, tokens, head_dim]`.
            value: `[rows, kv_heads, tokens, value_dim]`.
            scaling: factor on a query-key product before the softmax.

        Returns:
            `[rows, tokens, query_heads, value_dim]`.
        """
        retention, prompt = self.retentions.pop(layer), self.steps[0].stop
        rows, heads, tokens, _ = query.shape
        out = value.new_empty(rows, tokens, heads, value.shape[-1])

        def part(first: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
            return query[:, :, first:stop], key[:, :, first:stop], value[:, :, first:stop]

        out[:, :prompt] = retention.attend(*part(0, prompt), self.steps[0], PLAIN, scaling)
        if retention.places is not None:
            self._go_on(retention, query, key, value, scaling, out)
            return out
        for step in self.steps[1:]:
            new = part(step.first, step.stop)
            out[:, step.first : step.stop] = retention.attend(*new, step, PLAIN, scaling)
        return out

    def _go_on(
        self,
        retention: LayerRetention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        out: Tensor,
    ) -> None:
        """The tokens behind the prompt, in memory of fixed size; written to `out`."""
        prompt, tokens = self.steps[0].stop, query.shape[2]
        clock = Clock.at(self.steps[0].after, prompt)

        def step() -> None:
            at = clock.column[None]
            q, k, v = (whole.index_select(2, at) for whole in (query, key, value))
            out.index_copy_(1, at, retention.decode(q, k, v, clock, scaling))
            clock.advance()

        pool, policy = retention.pool, retention.policy
        assert pool is not None
        assert retention.weigh is not None
        between, due = evicts_between_steps(policy), prompt
        again: Callable[[], None] = step
        for column in range(prompt, tokens):
            if between and column == due:
                if not steps_left(pool, policy, clock):
                    make_room(pool, policy, clock, retention.weigh)
                due = column + max(1, steps_left(pool, policy, clock))
            if column == prompt + 1 and query.is_cuda:  # the first step has built what it needs
                again = _captured(step)
            elif column == prompt and query.is_cuda:
                rehearse(pool, policy, clock, **retention.score_arguments)
            again()


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    """The kernels of a step as a CUDA graph: what to call in its place."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **given: Any
) -> tuple[Tensor, None]:
    """What transformers calls in each layer."""
    return given["attend"](module.layer_idx, query, key, value, given["scaling"]), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """What transformers calls for a mask: a `Walk` needs none."""


@torch.no_grad()
def hidden_states(
    model: PreTrainedModel, ids: Tensor, policy: Policy | None, prompt_tokens: int
) -> Tensor:
    """What the model's last layer gives of each token, `[rows, tokens, hidden_size]`.

    Args:
        model: whose layers attend by query, key, value and scaling alone; left as it was.
        ids: int64 `[rows, tokens]`, without padding.
        policy: that a cache would be under; None for the model's own attention.
        prompt_tokens: tokens that come in one forward; the others come one by one.

    Raises:
        SparsityError: as `SparseCache` does.
    """
    decoder: Any = model.get_decoder()
    if policy is None:
        whole: Tensor = decoder(input_ids=ids, use_cache=False).last_hidden_state
        return whole
    return through(model, ids, Walk(model, policy, ids, prompt_tokens).attend)


@torch.no_grad()
def through(model: PreTrainedModel, ids: Tensor, attend: Attend) -> Tensor:
    """`hidden_states` with an attention of one's own.

    Args:
        model: see `hidden_states`.
        ids: see `hidden_states`.
        attend: what each layer calls for the whole text, as `Walk.attend`.
    """
    decoder: Any = model.get_decoder()
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    before = decoder.config._attn_implementation  # noqa: SLF001 (there is no public reader)
    decoder.set_attn_implementation(NAME)
    try:
        found: Tensor = decoder(input_ids=ids, use_cache=False, attend=attend).last_hidden_state
    finally:
        decoder.set_attn_implementation(before)
    return found


@torch.no_grad()
def apart(
    model: PreTrainedModel, ids: Tensor, dense: Tensor, found: Tensor, prompt_tokens: int
) -> Tensor:
    """How far an arm is from dense at each token behind the prompt.

    Args:
        model: whose output embeddings alone make logits of hidden states.
        ids: int64 `[rows, tokens]`.
        dense: hidden states of the model's own attention.
        found: of the arm.
        prompt_tokens: see `hidden_states`.

    Returns:
        Extra nats, KL(dense || arm), and 1 where both find the same token likeliest; float32
        `[3, rows, tokens - prompt_tokens]`, on the CPU.
    """
    head: Any = model.get_output_embeddings()
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
