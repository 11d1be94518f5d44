"""What is measured: full attention, link methods, retention policies, 8-bit storage, and pairs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from picache import (
    A3,
    APE,
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
from sparsity import (
    H2O,
    RKV,
    TOVA,
    LazyEviction,
    Policy,
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

FULL = "full"
LINK, RETAIN, STORE, BOTH, AT_REST = (
    "link",
    "retain",
    "store whole",
    "link, then retain",
    "retain, then store",
)
BUDGETS = (128, 64, 256)
"""Tokens a policy keeps of each KV head: every policy is measured at the first."""
STORES = ("exact", "int8", "fp8")
PREFIX = "the lead"
"""What stands for the prompt's own first tokens as sinks; `SharedPrefix` is made of their ids."""


@dataclass(frozen=True)
class Arm:
    """A way of serving.

    Attributes:
        kind: full, or one of the five above.
        method: its name without its budget; the arms of one make a curve.
        budget: as it is written; empty for none.
        link: how chunks are linked; None where nothing is.
        sinks: what chunks are compiled behind.
        policy: what is kept; None for all.
        storage: of what is at rest between requests: "exact", "int8" or "fp8".
        on_disk: whether that is in files, and not in memory.
    """

    kind: str
    method: str
    budget: str = ""
    link: LinkMethod | None = None
    sinks: Sinks | str = "drop"
    policy: Policy | None = None
    storage: str = "exact"
    on_disk: bool = False

    @property
    def label(self) -> str:
        return ", ".join(part for part in (self.method, self.budget) if part)


def policies() -> dict[str, Callable[[int], Policy]]:
    """Every policy by its budget, at its defaults but for what does not fit a prompt this long.

    A pinned prompt fills these budgets, which is refused: `RaaS` and `Random` do not pin it here.
    Windows and intervals that are longer than the budgets are a quarter of them, and no layer is
    left out.
    """
    return {
        "random tokens kept": lambda b: Random(b, pin_prompt=False),
        "StreamingLLM": StreamingLLM,
        "H2O": H2O,
        "TOVA": TOVA,
        "SnapKV": lambda b: SnapKV(b, window=min(64, b // 4)),
        "PyramidKV": lambda b: PyramidKV(b, window=min(64, b // 4)),
        "R-KV": lambda b: RKV(b, evict_every=b // 4),
        "LazyEviction": lambda b: LazyEviction(b, evict_every=b // 4),
        "VaSE": lambda b: VaSE(b, window=b // 4, large=b // 4, evict_every=b // 4),
        "RaaS": lambda b: RaaS(b, pin_prompt=False),
        "ShareRaaS": ShareRaaS,
        "Quest": lambda b: Quest(b, dense_layers=0),
        "Quest on the prompt, RaaS behind": lambda b: QuestRaaS(b // 2, prompt_budget=b // 2),
    }


SEVERAL = ("StreamingLLM", "H2O", "SnapKV", "RaaS", "Quest")
"""Policies that are measured at every budget."""
PAIRED = ("StreamingLLM", "H2O", "SnapKV", "RaaS", "Quest")
"""Policies behind a link."""
RESTED = ("SnapKV", "H2O", "RaaS")
"""Policies whose kept tokens are stored in 8 bits. They lie there at their own positions, so that
one which counts positions inside its cache (`StreamingLLM` as it comes) is not itself there."""


def linked() -> Iterator[Arm]:
    """Every link method once, behind what `link_evidence.json` found it better behind."""
    one = DummySinks(1)
    yield Arm(LINK, "naive", "", NaiveReuse())
    yield Arm(LINK, "naive, 1 dummy", "", NaiveReuse(), one)
    yield Arm(LINK, "LegoLink", "k = 4", LegoLink(4))
    for k in (4, 16, 64):
        yield Arm(LINK, "LegoLink, 1 dummy", f"k = {k}", LegoLink(k), one)
    yield Arm(LINK, "random tokens computed", "16 a chunk", RandomRecompute(16))
    for ratio in (0.05, 0.15, 0.3):
        yield Arm(LINK, "ProphetKV", f"{ratio:.0%}", ProphetKV(ratio))
    yield Arm(LINK, "ProphetKV, 1 dummy", "15%", ProphetKV(0.15), one)
    yield Arm(
        LINK,
        "LegoLink-1 + ProphetKV, 1 dummy",
        "5%",
        Combined((LegoLink(1), ProphetKV(1.0)), 0.05),
        one,
    )
    yield Arm(LINK, "LegoLink-4 + ProphetKV", "15%", Combined((LegoLink(4), ProphetKV(1.0)), 0.15))
    yield Arm(LINK, "A3", "15%", A3(0.15))
    yield Arm(LINK, "CacheBlend", "15%", CacheBlend(0.15))
    yield Arm(LINK, "true deviation", "15%", OracleDeviation(0.15))
    yield Arm(LINK, "APE", "", APE(), PREFIX)
    for storage, on_disk in (("int8", False), ("fp8", False), ("exact", True), ("int8", True)):
        where = f"chunks in {storage}" if storage != "exact" else "chunks"
        where += " on disk" if on_disk else ""
        yield Arm(LINK, f"LegoLink, 1 dummy, {where}", "k = 16", LegoLink(16), one, None, storage,
                  on_disk)  # fmt: skip


def arms(budgets: Sequence[int] = BUDGETS) -> list[Arm]:
    """All of them, full attention first."""
    made, one, budget = policies(), DummySinks(1), budgets[0]
    kept = f"{budget} kept"
    found = [Arm(FULL, FULL), *linked()]
    found += [Arm(STORE, "prompt stored whole", s, NaiveReuse(), storage=s) for s in STORES]
    for each in budgets:
        for name, policy in made.items():
            if each == budget or name in SEVERAL:
                found.append(Arm(RETAIN, name, f"{each} kept", policy=policy(each)))
    for name in PAIRED:
        label = f"LegoLink-16, 1 dummy, then {name}"
        found.append(Arm(BOTH, label, kept, LegoLink(16), one, made[name](budget)))
    label = "LegoLink-16, 1 dummy, chunks in int8 on disk, then SnapKV"
    found.append(Arm(BOTH, label, kept, LegoLink(16), one, made["SnapKV"](budget),
                     "int8", True))  # fmt: skip
    for name in RESTED:
        for storage in ("int8", "fp8") if name == RESTED[0] else ("int8",):
            found.append(Arm(AT_REST, f"{name}, then {storage}", kept,
                             policy=made[name](budget), storage=storage))  # fmt: skip
    # As they come, these do not go together, which is refused; the record holds what is said.
    found.append(Arm(RETAIN, "RaaS, prompt pinned", kept, policy=RaaS(budget)))
    found.append(Arm(BOTH, "LegoLink-16, 1 dummy, then RaaS, prompt pinned", kept,
                     LegoLink(16), one, RaaS(budget)))  # fmt: skip
    found.append(Arm(AT_REST, "PyramidKV, then int8", kept,
                     policy=made["PyramidKV"](budget), storage="int8"))  # fmt: skip
    single = RaaS(budget, page_size=1, pin_prompt=False)
    found.append(Arm(AT_REST, "RaaS in pages of one token, then int8", kept,
                     policy=single, storage="int8"))  # fmt: skip
    absolute = StreamingLLM(budget, positions="absolute")
    found.append(Arm(AT_REST, "StreamingLLM, absolute positions, then int8", kept,
                     policy=absolute, storage="int8"))  # fmt: skip
    return found


def sinks_of(arm: Arm, lead: tuple[int, ...]) -> Sinks:
    """What its chunks are compiled behind, the prompt's own `lead` where the arm says so."""
    return SharedPrefix(lead) if arm.sinks == PREFIX else arm.sinks  # type: ignore[return-value]
