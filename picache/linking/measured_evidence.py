"""What a method may ask about a prompt before it chooses, answered by measuring."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from picache.chunk import KV
from picache.linking.linked_kv import LinkedKV
from picache.methods.base import Layout, Metric

if TYPE_CHECKING:
    from picache.hf.model import HFModel


def squared_distance(fresh: KV, stale: KV, metric: Metric) -> Tensor:
    """Sum over heads and dimensions of (fresh - stale)^2 of keys, values or both, fp32 ``[n]``."""
    pairs = {"K": [0], "V": [1], "KV": [0, 1]}[metric]
    distances = [(fresh[i].float() - stale[i].float()).square().sum(dim=(0, 1, 3)) for i in pairs]
    return torch.stack(distances).sum(dim=0)


class MeasuredEvidence:
    """`picache.methods.base.Evidence` of one prompt.

    Attributes:
        entered: positions that went through a layer for an answer, one entry a layer run.
    """

    def __init__(self, model: "HFModel", ids: Tensor, layout: Layout, kv: LinkedKV) -> None:
        self._model, self._ids, self._layout, self._kv = model, ids, layout, kv
        self.entered: list[Tensor] = []

    def query_attention(self, layers: int | None = None, value_norm: bool = False) -> Tensor:
        """See `picache.methods.base.Evidence.query_attention`."""
        rows = torch.arange(self._layout.context_length, self._layout.total_length)
        masses = self._model.attention_masses(self._ids[rows], rows, self._kv, layers, value_norm)
        self.entered += [rows] * len(masses)
        return masses[:, : self._layout.context_length]

    def true_deviation(self, metric: Metric) -> Tensor:
        """See `picache.methods.base.Evidence.true_deviation`."""
        true = self._model.prefill(self._ids[None])
        context = self._layout.context_length
        rows = [
            squared_distance(
                (keys[:, :, :context], values[:, :, :context]),
                (self._kv[layer][0][:, :, :context], self._kv[layer][1][:, :, :context]),
                metric,
            ).cpu()
            for layer, (keys, values) in enumerate(true)
        ]
        self.entered += [torch.arange(self._layout.total_length)] * len(true)
        return torch.stack(rows)
