"""Methods that choose again in each layer, as the pass that recomputes their tokens asks them."""

from collections.abc import Callable

import torch
from torch import Tensor

from picache.chunk import KV
from picache.hf.sparse_pass import Narrow
from picache.linking.measured_evidence import squared_distance
from picache.methods.base import Layout, LinkMethod, Metric


def narrows(method: LinkMethod) -> bool:
    """Whether the method chooses again in each layer."""
    return type(method).narrow is not LinkMethod.narrow


def why_never_captured(method: LinkMethod) -> str:
    """Why no pass of this method is captured; empty where passes are."""
    if narrows(method):
        return "the method chooses again in each layer"
    return "" if method.parallel is None else "the method places chunks side by side"


def narrowing(
    method: LinkMethod, layout: Layout, over_heads: Callable[[Tensor], Tensor]
) -> Narrow | None:
    """The method's `narrow` as `HFModel.scattered_forward` calls it; None if it has none.

    What must be recomputed in every layer, the query or its last token, is left out of what the
    method sees and added to what it chose.

    Args:
        method: chooses.
        layout: where the chunks and the query stand.
        over_heads: of a sum over the KV heads of this process, the sum over all.
    """
    if not narrows(method):
        return None
    forced = layout.context_length if method.force_query else layout.total_length - 1

    def narrow(
        layer: int, positions: Tensor, fresh: KV, reused: KV
    ) -> tuple[Tensor, Tensor] | None:
        free = int((positions < forced).sum())
        fresh_free, reused_free = (
            (keys[:, :, :free], values[:, :, :free]) for keys, values in (fresh, reused)
        )

        def deviation(metric: Metric) -> Tensor:
            return over_heads(squared_distance(fresh_free, reused_free, metric)).cpu()

        chosen = method.narrow(layer, layout, positions[:free].cpu(), deviation)
        if chosen is None:
            return None
        always = positions[free:].cpu()
        return torch.cat([chosen[0], always]), torch.cat([chosen[1], always])

    return narrow
