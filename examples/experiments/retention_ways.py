"""The arms of retention_evidence.py: every policy with no sinks, with four, and as it comes."""

from collections.abc import Callable
from dataclasses import dataclass

from sparsity import (
    H2O,
    RKV,
    TOVA,
    LazyEviction,
    PyramidKV,
    Quest,
    QuestRaaS,
    RaaS,
    Random,
    ShareRaaS,
    SnapKV,
    StreamingLLM,
    VaSE,
)
from sparsity.policies.base import Policy


@dataclass(frozen=True)
class Way:
    """A policy in one setting.

    Attributes:
        family: the policy, among whose settings one is chosen.
        setting: what is set beside the budget; empty for a policy with one setting.
        policy: of a budget. Windows and intervals that are longer than the papers' smallest budgets
            are a quarter of the budget here, and no layer is left dense.
        twin: label of the arm that evicts at random beside it; empty for that arm itself.
        default: whether the setting is that of the class.
    """

    family: str
    setting: str
    policy: Callable[[int], Policy]
    twin: str = "random, no sinks"
    default: bool = False

    @property
    def label(self) -> str:
        return ", ".join(part for part in (self.family, self.setting) if part)


def by_sinks(
    family: str, policy: Callable[[int, int], Policy], more: str = "", default: int | None = None
) -> list[Way]:
    """A policy of a budget and of sinks, with none and with four.

    Args:
        family: see `Way`.
        policy: of a budget and a number of sinks.
        more: what else is set.
        default: the sinks that the class has by default; None where its default is another way.
    """
    found = []
    for sinks, said in ((0, "no sinks"), (4, "4 sinks")):
        setting = ", ".join(part for part in (more, said) if part)
        twin = "" if family == "random" else f"random, {said}"
        found.append(Way(family, setting, lambda b, s=sinks: policy(b, s), twin, sinks == default))
    return found


WAYS = [
    *by_sinks("random", lambda b, s: Random(b, sinks=s, pin_prompt=False)),
    Way("random", "prompt pinned", Random, "", True),
    *by_sinks("RaaS", lambda b, s: RaaS(b, sinks=s, pin_prompt=False)),
    *by_sinks("RaaS", lambda b, s: RaaS(b, sinks=s, pin_prompt=False, ties="score"),
              "ties by score"),
    Way("RaaS", "prompt pinned", RaaS, "random, prompt pinned", True),
    Way("RaaS", "top half, 4 sinks", lambda b: RaaS(b, sinks=4, pin_prompt=False, top_ratio=0.5),
        "random, 4 sinks"),
    Way("RaaS", "top half, pages of 4, 4 sinks",
        lambda b: RaaS(b, page_size=4, sinks=4, pin_prompt=False, top_ratio=0.5),
        "random, 4 sinks"),
    Way("RaaS", "pages of 4, 4 sinks",
        lambda b: RaaS(b, page_size=4, sinks=4, pin_prompt=False), "random, 4 sinks"),
    *by_sinks("ShareRaaS", lambda b, s: ShareRaaS(b, sinks=s), default=4),
    Way("ShareRaaS", "pages of 16, 4 sinks",
        lambda b: ShareRaaS(b, page_size=16), "random, 4 sinks"),
    *by_sinks("H2O", lambda b, s: H2O(b, sinks=s), default=0),
    Way("Quest", "", lambda b: Quest(b, dense_layers=0), default=True),
    Way("Quest on the prompt, RaaS behind", "",
        lambda b: QuestRaaS(b // 2, prompt_budget=b // 2), "random, prompt pinned", True),
    *by_sinks("StreamingLLM", lambda b, s: StreamingLLM(b, sinks=s), default=4),
    Way("StreamingLLM", "absolute positions, 4 sinks",
        lambda b: StreamingLLM(b, positions="absolute"), "random, 4 sinks"),
    *by_sinks("TOVA", lambda b, s: TOVA(b, sinks=s), default=0),
    *by_sinks("SnapKV, decoding too",
              lambda b, s: SnapKV(b, sinks=s, window=b // 4, evict_every=b // 4), default=0),
    *by_sinks("PyramidKV, decoding too",
              lambda b, s: PyramidKV(b, sinks=s, window=b // 4, evict_every=b // 4), default=0),
    *by_sinks("R-KV", lambda b, s: RKV(b, sinks=s, evict_every=b // 4), default=0),
    *by_sinks("LazyEviction", lambda b, s: LazyEviction(b, sinks=s, evict_every=b // 4),
              default=0),
    *by_sinks("LazyEviction",
              lambda b, s: LazyEviction(b, sinks=s, evict_every=b // 4, ties="score"),
              "ties by score"),
    *by_sinks("VaSE", lambda b, s: VaSE(
        b, sinks=s, window=b // 4, large=b // 4, evict_every=b // 4), default=4),
]  # fmt: skip

FREE = (
    "random, 4 sinks",
    "RaaS, no sinks",
    "RaaS, 4 sinks",
    "RaaS, prompt pinned",
    "RaaS, ties by score, 4 sinks",
    "ShareRaaS, 4 sinks",
    "H2O, no sinks",
    "H2O, 4 sinks",
    "Quest",
    "StreamingLLM, 4 sinks",
    "TOVA, 4 sinks",
    "SnapKV, decoding too, 4 sinks",
)
"""Arms that decode freely, beside full attention."""

SMALL = (
    "RaaS, no sinks",
    "RaaS, 4 sinks",
    "RaaS, prompt pinned",
    "ShareRaaS, 4 sinks",
    "H2O, no sinks",
    "RaaS, ties by score, no sinks",
    "random, no sinks",
    "random, 4 sinks",
    "H2O, 4 sinks",
    "Quest",
    "StreamingLLM, 4 sinks",
    "LazyEviction, no sinks",
    "LazyEviction, 4 sinks",
    "LazyEviction, ties by score, no sinks",
    "SnapKV, decoding too, no sinks",
    "R-KV, no sinks",
    "R-KV, 4 sinks",
    "TOVA, no sinks",
)
"""Arms of the setting for a CPU, the most telling ones first."""
