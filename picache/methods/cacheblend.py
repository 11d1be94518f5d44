"""CacheBlend's dynamic selection: the tokens whose KV deviates most in an early layer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from picache.arguments import whole_number
from picache.errors import PICacheError
from picache.methods.base import Evidence, Layout, LinkMethod, Metric, check_ratio, top


@dataclass(frozen=True)
class CacheBlend(LinkMethod):
    """Recompute the tokens of high KV deviation (CacheBlend, arXiv 2405.16444, section 4).

    Every token goes through the layers up to the first check layer. There the squared distance of
    its fresh keys or values from the reused ones is measured, and the share `ratio` of tokens that
    deviate most go on. Tokens rank alike by deviation in neighbouring layers, which makes one early
    layer a guide to the others. Layer 0 tells nothing, since its keys and values depend on no
    context.

    The paper filters gradually: a little over the target share at the first check layer and fewer
    tokens in each layer that follows, so that the mean is the target. It gives no numbers; here the
    share falls linearly from 1.25 to 0.75 of `ratio` between the check layer and the last layer but
    one.

    Departures from the authors' code (see the presets `repo` and `lmcache`): causality is by true
    position, where the code takes the scattered tokens to be the last ones; the whole query is
    recomputed unless ``force_query=False``; `ratio` is a share of the tokens behind the first
    chunk, which cannot deviate.

    Args:
        ratio: share of the reusable tokens to recompute, on average over the layers after the
            check; 0.15 is the paper's usual setting.
        metric: whether the deviation of keys ("K"), of values ("V") or of both ("KV") counts.
        check_layers: indices of the layers where tokens are chosen; the gradual schedule uses the
            first alone.
        schedule: "single" chooses at the check layers only, "gradual" in every layer from the
            first check layer on.
        force_query: see `LinkMethod`.
        layer1_kv: which keys and values a token keeps at a check layer where it is not chosen:
            "fresh_all" the fresh ones, which are computed anyway, "selected_only" the compiled
            ones.

    Raises:
        PICacheError: on a ratio outside [0, 1], an unknown option, or no check layer over 0.
    """

    ratio: float = 0.15
    metric: Metric = "V"
    check_layers: tuple[int, ...] = (1,)
    schedule: Literal["single", "gradual"] = "gradual"
    force_query: bool = True
    layer1_kv: Literal["fresh_all", "selected_only"] = "fresh_all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", check_ratio("CacheBlend", self.ratio))
        options = {
            "metric": ("K", "V", "KV"),
            "schedule": ("single", "gradual"),
            "layer1_kv": ("fresh_all", "selected_only"),
        }
        for name, allowed in options.items():
            if getattr(self, name) not in allowed:
                raise PICacheError(
                    f"CacheBlend: {name} must be one of {', '.join(allowed)}, "
                    f"got {getattr(self, name)!r}"
                )
        layers = self.check_layers
        if not isinstance(self.force_query, bool):
            raise PICacheError(f"CacheBlend: force_query is a bool, got {self.force_query!r}")
        if not isinstance(layers, tuple) or not layers:
            raise PICacheError(
                f"CacheBlend: check_layers must be a tuple of layer indices, got {layers!r}"
            )
        needs = "CacheBlend: check_layers must be a tuple of layer indices"
        layers = tuple(whole_number(needs, index) for index in layers)
        object.__setattr__(self, "check_layers", layers)
        if min(layers) < 1 or list(layers) != sorted(set(layers)):
            raise PICacheError(
                f"CacheBlend: check_layers must ascend from at least 1, got {layers!r}: in layer 0 "
                "no token deviates, its keys and values depend on no context"
            )

    @classmethod
    def paper(cls, ratio: float = 0.15) -> "CacheBlend":
        """As the paper describes the method: gradual filtering from layer 1 on."""
        return cls(ratio)

    @classmethod
    def repo(cls, ratio: float = 0.16) -> "CacheBlend":
        """As the authors' code runs it: one choice by V, and of the query the last token alone."""
        return cls(ratio, "V", schedule="single", force_query=False)

    @classmethod
    def lmcache(cls, ratio: float = 0.15) -> "CacheBlend":
        """As LMCache's blender runs it: one choice by K, the others keep their compiled KV."""
        return cls(ratio, "K", schedule="single", layer1_kv="selected_only")

    @override
    def recompute(self, layout: Layout, evidence: Evidence) -> Tensor:
        """Every token, since the layers before the choice need all of them.

        Raises:
            PICacheError: when the model has no such check layer, or none after it to save in.
        """
        if self.check_layers[-1] > layout.num_layers - 2:
            raise PICacheError(
                f"CacheBlend: check layer {self.check_layers[-1]} leaves nothing to save in a "
                f"model of {layout.num_layers} layers: check_layers must lie in "
                f"1..{layout.num_layers - 2}"
            )
        if self.force_query:
            return layout.reusable
        return torch.arange(layout.prefix_length, layout.total_length)

    @override
    def narrow(
        self, layer: int, layout: Layout, positions: Tensor, deviation: Callable[[Metric], Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """From the first check layer on, the share of tokens that deviate most in this layer."""
        if self.ratio == 1:
            return None
        first, last = self.check_layers[0], layout.num_layers - 2  # the last choice that saves
        ratio = self.ratio
        if self.schedule == "gradual":
            if not first <= layer <= last:
                return None
            if last > first:
                ratio *= 1.25 - 0.5 * (layer - first) / (last - first)
        elif layer not in self.check_layers:
            return None
        share = layout.share(min(ratio, 1.0))
        chosen = positions[top(deviation(self.metric), share).sort().values]
        return (positions if self.layer1_kv == "fresh_all" else chosen), chosen
