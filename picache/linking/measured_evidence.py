"""Answers, by measuring, what a link method may ask about a prompt before it chooses tokens."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import override

from picache.chunk import KV
from picache.linking.linked_kv import LinkedKV
from picache.methods.base import Evidence, Layout, Metric

if TYPE_CHECKING:
    from picache.hf.model import HFModel


def squared_distance(fresh: KV, reused: KV, metric: Metric) -> Tensor:
    """The squared distance of each token's fresh from its reused KV, fp32 ``[tokens]``.

    Args:
        fresh: keys and values, each ``[1, kv_heads, tokens, head_dim]``.
        reused: the same tokens' KV as compiled.
        metric: whether keys, values or both count; summed over heads and dimensions.
    """
    pairs = {"K": [0], "V": [1], "KV": [0, 1]}[metric]
    distances = [(fresh[i].float() - reused[i].float()).square().sum(dim=(0, 1, 3)) for i in pairs]
    return torch.stack(distances).sum(dim=0)


class MeasuredEvidence(Evidence):
    """The `picache.methods.base.Evidence` of one prompt.

    Args:
        model: the model the chunks were compiled with.
        ids: token ids of the prompt, ``[tokens]``.
        layout: where the chunks and the query stand.
        kv: of the whole prompt as compiled.
        masses: answers how much the query attends to each token, fp32 ``[layers, tokens]``; None
            where it cannot, and the query is then run eagerly here.
        see: called before the model is run eagerly; raises where it is not what it was taken for.

    Attributes:
        entered: what the answers cost: one entry for each layer that was run, with the positions of
            the tokens that went through it.
    """

    def __init__(
        self,
        model: "HFModel",
        ids: Tensor,
        layout: Layout,
        kv: LinkedKV,
        masses: Callable[[int | None, bool], Tensor | None],
        see: Callable[[], None],
    ) -> None:
        self._model, self._ids, self._layout, self._kv = model, ids, layout, kv
        self._masses, self._see = masses, see
        self.entered: list[Tensor] = []

    @override
    def query_attention(self, layers: int | None = None, value_norm: bool = False) -> Tensor:
        query = torch.arange(self._layout.context_length, self._layout.total_length)
        masses = self._masses(layers, value_norm)
        if masses is None:
            self._see()
            ids = self._ids[query]
            masses = self._model.attention_masses(ids, query, self._kv, layers, value_norm)
        self.entered += [query] * len(masses)
        return masses[:, : self._layout.context_length]

    @override
    def true_deviation(self, metric: Metric) -> Tensor:
        self._see()
        true = self._model.prefill(self._ids[None])
        context = self._layout.context_length
        by_layer = [
            self._model.over_heads(
                squared_distance(
                    (keys[:, :, :context], values[:, :, :context]),
                    (self._kv[layer][0][:, :, :context], self._kv[layer][1][:, :, :context]),
                    metric,
                )
            ).cpu()
            for layer, (keys, values) in enumerate(true)
        ]
        self.entered += [torch.arange(self._layout.total_length)] * len(true)
        return torch.stack(by_layer)
