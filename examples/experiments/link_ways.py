"""The ways of linking that link_evidence.py measures: a method, its budget, and the sinks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from picache import (
    A3,
    APE,
    Arm,
    CacheBlend,
    Combined,
    DummySinks,
    LegoLink,
    LinkMethod,
    NaiveReuse,
    OracleDeviation,
    ProphetKV,
    RandomRecompute,
    SharedPrefix,
)
from picache.sinks import Sinks

KS = (1, 4, 16, 32)
RATIOS = (0.02, 0.05, 0.15, 0.3)
NOTHING, SYSTEM, BOS_KEPT = "nothing", "the system prompt", "BOS kept"
BEHIND = (NOTHING, "1 dummy", "4 dummies", SYSTEM, BOS_KEPT)
"""What chunks are compiled behind; the BOS that is kept stays in the prompt, in front of each."""


@dataclass(frozen=True)
class Way:
    """A way of linking.

    Attributes:
        family: the method without its budget.
        behind: what chunks are compiled behind, one of `BEHIND`.
        budget: as it is written: a k, or a share in percent; empty for none.
        method: of the link.
        twin: label of the arm that recomputes random tokens in the same number; empty for none.
    """

    family: str
    behind: str
    budget: str
    method: LinkMethod
    twin: str = ""

    @property
    def label(self) -> str:
        budget = f" {self.budget}" if self.budget else ""
        return f"{self.family}{budget}" + ("" if self.behind == NOTHING else f", {self.behind}")

    @property
    def eager(self) -> bool:
        """Whether a pass of it runs eagerly, which on a GPU takes several times longer."""
        return isinstance(self.method, CacheBlend | OracleDeviation | APE)

    @property
    def timed(self) -> bool:
        """Whether its time to first token is measured; with other sinks it is the same."""
        return self.behind == NOTHING or isinstance(self.method, APE)


def by_share(ratio: float, behind: str) -> dict[str, LinkMethod]:
    """Methods that are given a share of the tokens; those that look at first tokens, too."""
    found: dict[str, LinkMethod] = {"ProphetKV": ProphetKV(ratio)}
    if behind not in (NOTHING, BOS_KEPT):  # behind nothing ProphetKV takes first tokens by itself
        found["LegoLink-1 + ProphetKV"] = Combined((LegoLink(1), ProphetKV(1.0)), ratio)
    if behind == NOTHING:
        found |= {
            "LegoLink-4 + ProphetKV": Combined((LegoLink(4), ProphetKV(1.0)), ratio),
            "ProphetKV, value norm": ProphetKV(ratio, value_norm=True),
            "A3": A3(ratio),
            "CacheBlend": CacheBlend(ratio),
            "true deviation": OracleDeviation(ratio),
        }
    return found


def ways(small: bool = False) -> list[Way]:
    """All of them; a few where `small`."""
    return [way for behind in BEHIND for way in _behind(behind, small)]


def _behind(behind: str, small: bool) -> Iterator[Way]:
    beside = "" if behind == NOTHING else f", {behind}"
    ks = (1, 4) if small else KS if behind == NOTHING else (1, 4, 16)
    ratios = (0.15,) if small else (0.05, 0.15) if behind == BOS_KEPT else RATIOS
    yield Way("naive", behind, "", NaiveReuse())
    for k in ks:
        yield Way("random", behind, f"{k} a chunk", RandomRecompute(k))
        yield Way("LegoLink", behind, str(k), LegoLink(k), f"random {k} a chunk{beside}")
    for ratio in ratios:
        percent = f"{100 * ratio:.0f} %"
        yield Way("random", behind, percent, RandomRecompute(ratio=ratio))
        for name, method in by_share(ratio, behind).items():
            yield Way(name, behind, percent, method, f"random {percent}{beside}")
    if behind == SYSTEM:
        yield Way("APE, T = S = 0.9", behind, "", APE())


def arms_of(taken: Sequence[Way], prefix: str) -> dict[str, Arm]:
    """The arms of a comparison; `prefix` is what all prompts begin with, the system prompt."""
    sinks: dict[str, Sinks] = {
        "1 dummy": DummySinks(1),
        "4 dummies": DummySinks(4),
        SYSTEM: SharedPrefix(prefix),
    }
    return {way.label: Arm(way.method, sinks.get(way.behind, "drop")) for way in taken}
