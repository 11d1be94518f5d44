"""The arms of retention_evidence.py: every policy with no sinks, with four, and as it comes."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from sparsity import (
    H2O,
    RKV,
    TOVA,
    Full,
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
class RandomPages(Random):
    """`Random` in pages of any size."""

    page_size: int = 1


@dataclass(frozen=True)
class Way:
    """A policy in one setting.

    Attributes:
        family: the policy, among whose settings one is chosen.
        setting: what is set beside the budget; empty for a policy with one setting.
        policy: of a budget. Windows and intervals that are longer than the papers' smallest budgets
            are a quarter of the budget here, and no layer is left dense.
        twin: label of the arm that evicts at random beside it, with as many tokens in pages of the
            same size, sinks and prompt kept alike; empty for none.
        default: whether the setting is that of the class.
        control: whether it is there as a twin only, and no setting that may be chosen.
    """

    family: str
    setting: str
    policy: Callable[[int], Policy]
    twin: str
    default: bool = False
    control: bool = False

    @property
    def label(self) -> str:
        return ", ".join(part for part in (self.family, self.setting) if part)


BULK, PAGES_4, PAGES_16 = "a quarter at a time", "pages of 4", "pages of 16"
"""What the twins of policies are called that evict a quarter of the budget at once, or pages."""


def by_sinks(
    family: str,
    policy: Callable[[int, int], Policy],
    more: str = "",
    default: int | None = None,
    like: str = "",
) -> list[Way]:
    """A policy of a budget and of sinks, with none and with four.

    Args:
        family: see `Way`.
        policy: of a budget and a number of sinks.
        more: what else is set.
        default: the sinks that the class has by default; None where its default is another way.
        like: what is set beside the sinks in the twin.
    """
    found = []
    for sinks, said in ((0, "no sinks"), (4, "4 sinks")):
        setting = ", ".join(part for part in (more, said) if part)
        twin = ", ".join(part for part in ("random", like, said) if part)
        twin = "" if family == "random" else twin
        found.append(Way(family, setting, lambda b, s=sinks: policy(b, s), twin, sinks == default))
    return found


def paged(size: int, like: str) -> list[Way]:
    """The twins of policies that evict pages, with no sinks and with four."""
    return by_sinks(
        "random", lambda b, s: RandomPages(b, page_size=size, sinks=s, pin_prompt=False), like
    )


CONTROLS = [
    replace(way, control=True)
    for way in (
        *paged(4, PAGES_4),
        *paged(16, PAGES_16),
        Way("random", f"{PAGES_16}, prompt pinned", lambda b: RandomPages(b, page_size=16), ""),
        *by_sinks("random", lambda b, s: Random(
            b, sinks=s, pin_prompt=False, evict_every=b // 4), BULK),
    )
]  # fmt: skip
"""Eviction at random in pages, or many tokens at once."""

WAYS = [
    *by_sinks("random", lambda b, s: Random(b, sinks=s, pin_prompt=False)),
    Way("random", "prompt pinned", Random, "", True),
    *CONTROLS,
    *by_sinks("RaaS", lambda b, s: RaaS(b, sinks=s, pin_prompt=False), like=PAGES_16),
    *by_sinks("RaaS", lambda b, s: RaaS(b, sinks=s, pin_prompt=False, ties="score"),
              "ties by score", like=PAGES_16),
    Way("RaaS", "prompt pinned", RaaS, f"random, {PAGES_16}, prompt pinned", True),
    Way("RaaS", "top half, 4 sinks", lambda b: RaaS(b, sinks=4, pin_prompt=False, top_ratio=0.5),
        f"random, {PAGES_16}, 4 sinks"),
    Way("RaaS", "top half, pages of 4, 4 sinks",
        lambda b: RaaS(b, page_size=4, sinks=4, pin_prompt=False, top_ratio=0.5),
        f"random, {PAGES_4}, 4 sinks"),
    Way("RaaS", "pages of 4, 4 sinks",
        lambda b: RaaS(b, page_size=4, sinks=4, pin_prompt=False), f"random, {PAGES_4}, 4 sinks"),
    *by_sinks("ShareRaaS", lambda b, s: ShareRaaS(b, sinks=s), default=4, like=PAGES_4),
    Way("ShareRaaS", "pages of 16, 4 sinks",
        lambda b: ShareRaaS(b, page_size=16), f"random, {PAGES_16}, 4 sinks"),
    *by_sinks("H2O", lambda b, s: H2O(b, sinks=s), default=0),
    Way("Quest", "", lambda b: Quest(b, dense_layers=0), "", True),
    Way("Quest on the prompt, RaaS behind", "",
        lambda b: QuestRaaS(b // 2, prompt_budget=b // 2), "", True),
    *by_sinks("StreamingLLM", lambda b, s: StreamingLLM(b, sinks=s), default=4),
    Way("StreamingLLM", "absolute positions, 4 sinks",
        lambda b: StreamingLLM(b, positions="absolute"), "random, 4 sinks"),
    *by_sinks("TOVA", lambda b, s: TOVA(b, sinks=s), default=0),
    *by_sinks("SnapKV, decoding too",
              lambda b, s: SnapKV(b, sinks=s, window=b // 4, evict_every=b // 4), default=0,
              like=BULK),
    *by_sinks("PyramidKV, decoding too",
              lambda b, s: PyramidKV(b, sinks=s, window=b // 4, evict_every=b // 4), default=0,
              like=BULK),
    *by_sinks("R-KV", lambda b, s: RKV(b, sinks=s, evict_every=b // 4), default=0,
              like=BULK),
    *by_sinks("LazyEviction",
              lambda b, s: LazyEviction(b, sinks=s, evict_every=b // 4, ties="age"), like=BULK),
    *by_sinks("LazyEviction", lambda b, s: LazyEviction(b, sinks=s, evict_every=b // 4),
              "ties by score", default=4, like=BULK),
    *by_sinks("VaSE", lambda b, s: VaSE(
        b, sinks=s, window=b // 4, large=b // 4, evict_every=b // 4), default=4, like=BULK),
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
    f"random, {PAGES_16}, no sinks",
    f"random, {PAGES_16}, 4 sinks",
    f"random, {PAGES_16}, prompt pinned",
    f"random, {PAGES_4}, 4 sinks",
    f"random, {BULK}, no sinks",
    f"random, {BULK}, 4 sinks",
)
"""Arms of the setting for a CPU, the most telling ones first."""

PINNED = [
    Way("random", f"{PAGES_4}, prompt pinned", lambda b: RandomPages(b, page_size=4), "",
        control=True),
    Way("random", f"{BULK}, prompt pinned", lambda b: Random(b, evict_every=b // 4), "",
        control=True),
    Way("RaaS", "top half, pages of 4, prompt pinned",
        lambda b: RaaS(b, page_size=4, top_ratio=0.5), f"random, {PAGES_4}, prompt pinned"),
    Way("ShareRaaS", "prompt pinned", lambda b: ShareRaaS(b, sinks=0, pin_prompt=True),
        f"random, {PAGES_4}, prompt pinned"),
    Way("H2O", "prompt pinned", lambda b: H2O(b, pin_prompt=True), "random, prompt pinned"),
    Way("TOVA", "prompt pinned", lambda b: TOVA(b, pin_prompt=True), "random, prompt pinned"),
    Way("R-KV", "prompt pinned", lambda b: RKV(b, pin_prompt=True, evict_every=b // 4),
        f"random, {BULK}, prompt pinned"),
    Way("LazyEviction", "prompt pinned",
        lambda b: LazyEviction(b, sinks=0, pin_prompt=True, evict_every=b // 4),
        f"random, {BULK}, prompt pinned"),
]  # fmt: skip
"""Policies that are told to keep the prompt, where all of it is needed until the end."""

REASONING = [
    Way("full", "", lambda b: Full(), "", control=True),
    *(
        way
        for way in WAYS
        if way.label
        in (
            "random, 4 sinks",
            "random, prompt pinned",
            f"random, {PAGES_16}, no sinks",
            f"random, {PAGES_16}, 4 sinks",
            f"random, {PAGES_16}, prompt pinned",
            f"random, {PAGES_4}, 4 sinks",
            f"random, {BULK}, 4 sinks",
            "RaaS, no sinks",
            "RaaS, 4 sinks",
            "RaaS, prompt pinned",
            "RaaS, top half, pages of 4, 4 sinks",
            "ShareRaaS, 4 sinks",
            "H2O, 4 sinks",
            "Quest",
            "Quest on the prompt, RaaS behind",
            "StreamingLLM, 4 sinks",
            "TOVA, 4 sinks",
            "SnapKV, decoding too, 4 sinks",
            "R-KV, 4 sinks",
            "LazyEviction, 4 sinks",
            "LazyEviction, ties by score, 4 sinks",
            "VaSE, 4 sinks",
        )
    ),
    *PINNED,
]
"""Arms of reasoning_accuracy.py."""
