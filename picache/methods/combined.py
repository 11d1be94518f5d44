"""Several methods under one budget: the first method's tokens, then the next one's."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from picache.errors import PICacheError
from picache.methods.base import Evidence, Layout, LinkMethod, check_ratio


@dataclass(frozen=True)
class Combined(LinkMethod):
    """Recompute the union of several methods' tokens, up to a budget.

    The first method's tokens are taken in its order of importance, then the next one's, until the
    budget is reached. ``Combined((LegoLink(4), ProphetKV(0.15)), ratio=0.15)`` recomputes as many
    tokens as ``ProphetKV(0.15)`` alone, with the first tokens of the chunks among them.

    Args:
        methods: in order of precedence; none that chooses again in each layer, as CacheBlend does.
        ratio: share of the reusable tokens to recompute at most; 1 for the whole union.

    Raises:
        PICacheError: on a ratio outside [0, 1], no method, or one that chooses by layer.
    """

    methods: tuple[LinkMethod, ...]
    ratio: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", check_ratio("Combined", self.ratio))
        if not isinstance(self.methods, tuple) or not self.methods:
            raise PICacheError(f"Combined needs a tuple of link methods, got {self.methods!r}")
        for method in self.methods:
            if not isinstance(method, LinkMethod):
                raise PICacheError(f"Combined takes link methods, got {method!r}")
            layered = type(method).narrow is not LinkMethod.narrow
            if layered or not method.force_query or method.parallel is not None:
                raise PICacheError(
                    f"Combined cannot hold {method!r}, which is more than one set of tokens for "
                    "all layers: link with it alone"
                )

    @override
    def recompute(self, layout: Layout, evidence: Evidence) -> Tensor:
        lists = [method.recompute(layout, evidence).tolist() for method in self.methods]
        joined = dict.fromkeys(position for one in lists for position in one)
        return torch.tensor(list(joined)[: layout.share(self.ratio)], dtype=torch.int64)
