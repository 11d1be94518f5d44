"""What a link method asks before it chooses, found out without a prompt."""

import torch
from torch import Tensor
from typing_extensions import override

from picache.hf.sparse_pass import Question
from picache.methods.base import Evidence, Layout, LinkMethod, Metric, positions_to_recompute


def question(layers: int | None, value_norm: bool, of: int) -> Question:
    """What `Evidence.query_attention` is asked, for a model of so many layers."""
    return Question(of if layers is None else min(layers, of), value_norm)


def questions_of(method: LinkMethod, num_layers: int) -> tuple[Question, ...]:
    """What the method asks of the query's pass, found by letting it choose from an empty prompt.

    Args:
        method: asked with a few tokens that nothing attends to.
        num_layers: of the model.

    Raises:
        PICacheError: when what the method chooses is none of the prompt's positions.
    """
    layout = Layout((4, 8, 8), 4, num_layers)
    evidence = _Nothing(layout)
    positions_to_recompute(method, layout, evidence)
    return tuple(evidence.asked)


class _Nothing(Evidence):
    """Answers of zeros, and what they were asked for."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.asked: dict[Question, None] = {}  # in order

    @override
    def query_attention(self, layers: int | None = None, value_norm: bool = False) -> Tensor:
        asked = question(layers, value_norm, self._layout.num_layers)
        self.asked[asked] = None
        return torch.zeros(asked.layers, self._layout.context_length)

    @override
    def true_deviation(self, metric: Metric) -> Tensor:
        return torch.zeros(self._layout.num_layers, self._layout.context_length)
