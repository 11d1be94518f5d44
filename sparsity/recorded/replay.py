"""Run a policy over a recorded dense run, without the model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from sparsity.arguments import check_instance, whole_number, whole_numbers
from sparsity.errors import SparsityError
from sparsity.html_table import html_table
from sparsity.policies.base import Policy
from sparsity.policies.full import policy_of_layer
from sparsity.recorded.milestones import NONE_COUNTED, Kinds, Thresholds, classify
from sparsity.recorded.trace import Trace, check_trace, per_page
from sparsity.retention.batch_rows import BatchRows, plan
from sparsity.retention.layer import LayerRetention
from sparsity.retention.lazy_mask import LazyMask
from sparsity.retention.rotation import unmoved


@dataclass(frozen=True)
class LayerReplay:
    """What a policy would have done in one layer, compared with dense attention, by KV head.

    Attributes:
        kept_mass: share of the dense attention that goes to tokens the policy attends to,
            `[kv_heads, decoded tokens]`.
        best_mass: the same for the tokens with the highest attention at each step, as many as the
            policy attends to then: no choice of so many tokens has more; same shape.
        recall: share of the tokens in the true top pages that the policy attends to; same shape.
        prompt_survival: share of the prompt that is still held; same shape.
        kinds: of the pages, by what the dense run did with them.
        milestone_mass: share of the attention to milestone pages that is kept, `[kv_heads]`; NaN
            where a head has none.
        phoenix_survival: of the steps at which a phoenix page matters again, the share at which the
            policy attends to most of it, `[kv_heads]`; NaN where a head has none.
    """

    kept_mass: Tensor
    best_mass: Tensor
    recall: Tensor
    prompt_survival: Tensor
    kinds: Kinds
    milestone_mass: Tensor
    phoenix_survival: Tensor


@dataclass(frozen=True)
class Replay:
    """What a policy would have kept of a dense run; `print` it for a summary.

    The run's own text and queries are replayed. Under the policy the text would have gone another
    way after the first token that the model would have chosen otherwise, and a layer would have
    seen what the layers before it did.

    Attributes:
        policy: the policy.
        layers: what it did in each layer, by index in the model.
    """

    policy: Policy
    layers: dict[int, LayerReplay]

    def _mean(self, name: str) -> float:
        """Mean over layers, KV heads and decoded tokens, without NaN."""
        values = torch.cat([getattr(one, name).flatten() for one in self.layers.values()])
        return float(values.nanmean()) if values.numel() else float("nan")

    @property
    def kept_mass(self) -> float:
        """Share of the dense attention kept: mean over layers, KV heads and decoded tokens."""
        return self._mean("kept_mass")

    @property
    def regret(self) -> float:
        """Share of the attention that the best choice of as many tokens would keep beyond that."""
        return self._mean("best_mass") - self.kept_mass

    @property
    def recall(self) -> float:
        """Share of the tokens in the true top pages that the policy attends to."""
        return self._mean("recall")

    @property
    def prompt_survival(self) -> float:
        """Share of the prompt that is held after the last token."""
        last = [one.prompt_survival[:, -1] for one in self.layers.values()]
        return float(torch.cat(last).mean())

    @property
    def milestone_mass(self) -> float:
        """Share of the attention to milestone pages that is kept; NaN when there are none."""
        return self._mean("milestone_mass")

    @property
    def phoenix_survival(self) -> float:
        """Share of the steps at which a phoenix page matters again that attend to it.

        NaN when there are no phoenix pages.
        """
        return self._mean("phoenix_survival")

    def _pages(self, name: str, found: str) -> str:
        """Their share of the pages and what was found of them; that there are none, if so."""
        kinds = [one.kinds for one in self.layers.values()]
        counted = sum(one.counted for one in kinds)
        if not counted:
            return NONE_COUNTED
        if not any(getattr(one, name).any() for one in kinds):
            return f"none among the {counted:,} pages counted"
        return f"{sum(one.share(name) for one in kinds) / len(kinds):.1%}, {found}"

    def _entries(self) -> list[tuple[str, str]]:
        """Names and texts, as the summary is printed."""
        milestones = self._pages("milestone", f"{self.milestone_mass:.3f} of their attention")
        phoenixes = self._pages("phoenix", f"{self.phoenix_survival:.3f} of their returns")
        return [
            ("attention kept", f"{self.kept_mass:.3f}, with hindsight {self.regret:+.3f}"),
            ("top pages", f"{self.recall:.3f} attended to"),
            ("prompt", f"{self.prompt_survival:.3f} held at the end"),
            ("milestone pages", milestones),
            ("phoenix pages", phoenixes),
        ]

    @property
    def _size(self) -> str:
        first = next(iter(self.layers.values()))
        heads, steps = first.kept_mass.shape
        return f"{steps} decoded tokens, {len(self.layers)} layers of {heads} KV heads"

    def __str__(self) -> str:
        lines = (f"{name:<17}{what}" for name, what in self._entries())
        return "\n  ".join([str(self.policy), self._size, *lines])

    __repr__ = __str__  # the tensors of all layers are a megabyte of text

    def _repr_html_(self) -> str:
        return html_table(str(self.policy), [("", self._size), *self._entries()])


def replay(
    trace: Trace,
    policy: Policy,
    layers: Sequence[int] | None = None,
    page_size: int = 16,
    top_tokens: int | None = None,
    thresholds: Thresholds | None = None,
    progress: bool = True,
) -> Replay:
    """What `policy` would have kept of a recorded run, compared with its dense attention.

    The policy runs in the same code as under `SparseCache`.

    Args:
        trace: from `record`.
        policy: any policy.
        layers: indices of the layers to replay; None for all of the trace.
        page_size: tokens of the pages in which recall, milestones and phoenixes are counted.
        top_tokens: how many tokens the true top pages hold; None for the policy's budget, or a
            quarter of the text for a policy without one.
        thresholds: what makes a page a milestone or a phoenix.
        progress: show a progress bar.

    Raises:
        SparsityError: for layers that were not recorded, a trace without decoded tokens, and where
            the policy refuses the text.
    """
    from tqdm import tqdm  # comes with transformers

    check_trace(trace)
    check_instance("policy", policy, Policy, "a policy such as RaaS(budget=1024)")
    thresholds = Thresholds() if thresholds is None else thresholds
    check_instance("thresholds", thresholds, Thresholds, "Thresholds(alpha=0.05)")
    wanted = sorted(trace.layers) if layers is None else whole_numbers("layers", layers)
    page_size = whole_number("page_size", page_size, least=1)
    for layer in wanted:
        trace.at(layer)
    if trace.tokens == trace.prompt_tokens:
        raise SparsityError("this trace has no decoded tokens: record with max_new_tokens above 1")
    if top_tokens is None:
        top_tokens = policy.budget or trace.tokens // 4
    else:
        top_tokens = whole_number("top_tokens", top_tokens, least=1)
    pages = max(1, top_tokens // page_size)
    return Replay(
        policy,
        {
            layer: _replay_layer(trace, policy, layer, page_size, pages, thresholds)
            for layer in tqdm(wanted, desc="layers", disable=not progress)
        },
    )


def _replay_layer(
    trace: Trace,
    policy: Policy,
    layer: int,
    page_size: int,
    pages: int,
    thresholds: Thresholds,
) -> LayerReplay:
    mass = trace.mass(layer, page_size)
    kinds = classify(mass, trace.prompt_tokens, page_size, thresholds)
    kept, best, recall, survival, seen, on_pages = [], [], [], [], [], []
    attended_steps = _attended(trace, policy, layer)
    for first, weights in trace.blocks(layer):
        steps = [next(attended_steps) for _ in range(weights.shape[1])]
        attended = torch.stack([step[0] for step in steps], 1)
        held = torch.stack([step[1] for step in steps], 1)
        kept.append((weights * attended).sum(-1))
        on_pages.append(per_page(weights * attended, page_size))
        best.append(_best(weights, attended.sum(-1)))
        # Of a page that is not full yet, the tokens there are.
        at = torch.arange(first, first + weights.shape[1])
        there = (torch.arange(trace.tokens) <= at[:, None]).expand(attended.shape)
        share = per_page(attended.float(), page_size)
        share = share / per_page(there.float(), page_size).clamp(min=1)
        block = mass[:, first - trace.prompt_tokens :][:, : weights.shape[1]]
        top = block.topk(min(pages, block.shape[-1]), dim=-1).indices
        exists = block.gather(-1, top) > 0
        found = share.gather(-1, top)
        recall.append((found * exists).sum(-1) / exists.sum(-1).clamp(min=1))
        survival.append(held[..., : trace.prompt_tokens].float().mean(-1))
        seen.append(share)
    share = torch.cat(seen, 1)
    milestone = kinds.milestone[:, None]
    returns = kinds.returns
    return LayerReplay(
        kept_mass=torch.cat(kept, 1),
        best_mass=torch.cat(best, 1),
        recall=torch.cat(recall, 1),
        prompt_survival=torch.cat(survival, 1),
        kinds=kinds,
        milestone_mass=(torch.cat(on_pages, 1) * milestone).sum((1, 2))
        / (mass * milestone).sum((1, 2)),
        phoenix_survival=((share > 0.5) & returns).sum((1, 2)) / returns.sum((1, 2)),
    )


class Watched(LayerRetention):
    """A layer that records the columns its last token attended to, `[batch, kv_heads, n]`."""

    attended: Tensor | None = None

    @override
    def note_attended(self, slots: Tensor) -> None:
        self.attended = slots


def _attended(trace: Trace, policy: Policy, layer: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For each decoded token, what it attends to and what is held, bool `[kv_heads, tokens]`."""
    one = trace.at(layer)
    own = policy_of_layer(policy, layer, trace.full_layers)
    retention, rows, first = Watched(own, layer), BatchRows(), 0
    retention.move = unmoved  # what is kept does not depend on positions
    plain = LazyMask(None, None, False, lambda: None)
    for count in trace.forwards:
        new = slice(first, first + count)
        step = plan(rows, own, 1, count, None, torch.device("cpu"))
        retention.attend(
            one.queries[None, :, new],
            one.keys[None, :, new],
            one.values[None, :, new],
            step,
            plain,
            one.scaling,
            one.softcap,
            one.sinks,
        )
        rows, first = step.then, first + count
        if step.single and first > trace.prompt_tokens:
            assert retention.pool is not None
            assert retention.attended is not None
            attended, held = retention.attended[0], retention.pool.slots[0]
            yield _places(attended, trace.tokens), _places(held, trace.tokens)


def _places(slots: Tensor, tokens: int) -> Tensor:
    """The columns in `slots`, `[kv_heads, n]`, -1 for none, as bool `[kv_heads, tokens]`."""
    there = torch.zeros(slots.shape[0], tokens + 1, dtype=torch.bool)
    there.scatter_(1, slots.long().masked_fill(slots < 0, tokens), True)
    return there[:, :tokens]


def _best(weights: Tensor, counts: Tensor) -> Tensor:
    """Sum of the `counts`, `[kv_heads, q]`, largest of `weights`, `[kv_heads, q, tokens]`."""
    largest = weights.sort(dim=-1, descending=True).values.cumsum(-1)
    return largest.gather(-1, (counts - 1).clamp(min=0)[..., None])[..., 0]
