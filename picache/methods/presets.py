"""The arms of EPIC's comparison of link methods, set up fairly or as the authors ran them."""

from dataclasses import dataclass
from typing import Literal

from picache.arguments import whole_number
from picache.errors import PICacheError
from picache.methods import CacheBlend, FullRecompute, LegoLink, NaiveReuse, RandomRecompute
from picache.methods.base import LinkMethod
from picache.sinks import DummySinks, Sinks


@dataclass(frozen=True)
class Arm:
    """One arm of a comparison: a link method, and how to make the `PIC` that links by it.

    ``PIC(model, sinks=arm.sinks, flops_per_byte=arm.flops_per_byte).link(..., method=arm.method)``

    Attributes:
        method: the argument of `PIC.link`.
        sinks: the argument of `PIC`; it may differ between the arms of one comparison.
        flops_per_byte: the argument of `PIC`; None, so that every arm links, whatever it costs.
    """

    method: LinkMethod
    sinks: Sinks = "drop"
    flops_per_byte: float | None = None


def arms(
    preset: Literal["fair", "paper", "repo"] = "fair", k: int = 16, ratio: float = 0.15
) -> dict[str, Arm]:
    """The arms of EPIC's comparison, by name, and two of random recomputation.

    EPIC compares full recomputation, naive reuse, LegoLink with and without recomputation, and
    CacheBlend. Random recomputation, which the authors did not run, is added at two budgets:
    "random" draws LegoLink's k tokens of each chunk, "random-ratio" CacheBlend's share of all.

    - "fair": the whole query is computed in every arm, the prompt has one BOS, all arms see the
      same tokens. CacheBlend filters gradually, as its paper describes. LegoLink's k tokens are an
      arm twice, the second time behind four dummies ("LegoLink-16, 4 dummies"), which no prompt
      contains: what dummies and recomputation do together, which the authors did not run.
    - "paper": as EPIC (arXiv 2410.15332) and CacheBlend (arXiv 2405.16444) describe it: as "fair",
      but LegoLink-0 alone compiles behind four dummies.
    - "repo": as EPIC's code runs it: every chunk and the query begin with a BOS that stays in the
      prompt (so that LegoLink's k counts it; full prefill runs on the same tokens), and naive reuse
      and CacheBlend compile the query alone and recompute its last token only.
      LegoLink-0's BOS is one of its four dummies (the code: three and the BOS) and is left out.

    Args:
        preset: which of the three.
        k: LegoLink's tokens a chunk; at least 1, LegoLink-0 being an arm of its own.
        ratio: CacheBlend's share of tokens.

    Raises:
        PICacheError: on an unknown preset, or a bad k or ratio.
    """
    if preset not in ("fair", "paper", "repo"):
        raise PICacheError(f"preset must be 'fair', 'paper' or 'repo', got {preset!r}")
    k = whole_number("arms needs a whole number k of tokens per chunk", k, least=0)
    if k == 0:
        raise PICacheError("arms(k=0): 'LegoLink-0' is an arm already: give k of at least 1")
    repo = preset == "repo"
    sinks: Sinks = "keep" if repo else "drop"
    blend = CacheBlend.repo(ratio) if repo else CacheBlend.paper(ratio)
    both = {f"LegoLink-{k}, 4 dummies": Arm(LegoLink(k), DummySinks(4))}
    return {
        "full": Arm(FullRecompute(), sinks),
        "naive": Arm(NaiveReuse(force_query=not repo), sinks),
        "random": Arm(RandomRecompute(k), sinks),
        "random-ratio": Arm(RandomRecompute(ratio=ratio), sinks),
        "LegoLink-0": Arm(LegoLink(0), "drop" if preset == "fair" else DummySinks(4)),
        f"LegoLink-{k}": Arm(LegoLink(k), sinks),
        **(both if preset == "fair" else {}),
        "CacheBlend": Arm(blend, sinks),
    }
