"""Where a model's weights lay in memory, to tell fast whether they still do."""

from collections.abc import Iterable
from weakref import ref

import torch
from torch import Tensor

from picache.hf.fingerprint import PLAIN


class WeightsInMemory:
    """Where weights lie when this is made; none of them is kept from being replaced or freed.

    Args:
        weights: of a model, parameters and buffers.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._seen = [
            (ref(tensor), _lies(tensor)) if type(tensor) in PLAIN else None for tensor in weights
        ]

    @property
    def as_seen(self) -> bool:
        """Whether all of them still lie there; never where one wraps others, as quantised do.

        What was captured over that memory may then be replayed: at worst it computes with other
        values. No module is visited, so that a weight that another has taken the place of in its
        module, and that somebody keeps, counts as there.
        """
        return all(
            one is not None and (tensor := one[0]()) is not None and _lies(tensor) == one[1]
            for one in self._seen
        )


def _lies(tensor: Tensor) -> tuple[int, torch.dtype, int]:
    """Where the memory of a tensor is, and how much of it."""
    return tensor.data_ptr(), tensor.dtype, tensor.numel()
