"""The grid of decode.py: arms, policies, contexts, batches and budgets, the most wanted first.

Loads no package of ours: kvpress's process, which runs another transformers, reads it too.
"""

from dataclasses import asdict, dataclass

import torch
from transformers import Cache, PreTrainedModel

EVICT_EVERY = 64  # SnapKV while decoding; a window of the clock holds a whole number of them
COMPILED = ("dense static", "ours compiled", "no attention")
BOUNDED = ("RaaS", "H2O", "StreamingLLM", "SnapKV", "Random")


@dataclass(frozen=True)
class Cell:
    """One arm at one length, batch and budget.

    Attributes:
        arm: "dense eager" (DynamicCache), "dense static" (StaticCache, compiled by `generate`),
            "ours eager", "ours compiled", "kvpress" or "no attention" (the floor).
        policy: its name; "" for the dense arms and the floor.
        context: tokens seen before the first step that is timed.
        batch: rows.
        budget: tokens kept (Quest: attended to); None where everything is.
    """

    arm: str
    policy: str
    context: int
    batch: int
    budget: int | None = None

    @property
    def name(self) -> str:
        """What `--only` is matched against."""
        policy = f" {self.policy}" if self.policy else ""
        budget = "" if self.budget is None else f"({self.budget})"
        return f"{self.arm}{policy}{budget}, batch {self.batch}, context {self.context}"

    @property
    def graph(self) -> tuple:
        """Cells of the same graph need no compilation beyond the first one's.

        What a bounded policy holds has the same shape at every context.
        """
        kept = None if self.policy in BOUNDED else self.context
        return self.arm, self.policy, self.budget, self.batch, kept

    def asdict(self) -> dict:
        return asdict(self) | {"name": self.name}


def main_grid(scale: int = 1024) -> list[Cell]:
    """Part 1: batch 1, from 4k to 128k seen; `scale` is what "k" stands for.

    RaaS comes at all contexts in turn, so that a graph that has to be made anew would show.
    """
    contexts, budget = [thousands * scale for thousands in (32, 4, 128)], 2 * scale
    cells = [Cell("ours compiled", "RaaS", context, 1, budget) for context in contexts]
    for context in contexts:
        cells += [
            Cell("dense static", "", context, 1),
            Cell("ours compiled", "Quest", context, 1, budget),
        ]
    for context in contexts:
        cells += [
            Cell("dense eager", "", context, 1),
            Cell("ours eager", "RaaS", context, 1, budget),
            Cell("ours eager", "Quest", context, 1, budget),
        ]
    return cells


def wide_grid(scale: int = 1024) -> list[Cell]:
    """Part 2, the most wanted first: batches, the other policies, other budgets."""
    cells = []
    for batch in (32, 8):
        cells += [
            Cell("dense static", "", 16 * scale, batch),
            Cell("dense eager", "", 16 * scale, batch),
            Cell("ours compiled", "RaaS", 16 * scale, batch, scale),
            Cell("ours eager", "RaaS", 16 * scale, batch, scale),
        ]
    cells.append(Cell("ours compiled", "Quest", 16 * scale, 8, scale))
    for policy in ("StreamingLLM", "H2O", "SnapKV", "Random"):
        cells.append(Cell("ours compiled", policy, 32 * scale, 1, 2 * scale))
    cells.append(Cell("ours compiled", "Full", 32 * scale, 1))
    for budget in (scale, 4 * scale, scale // 2):
        cells.append(Cell("ours compiled", "RaaS", 32 * scale, 1, budget))
    for policy in ("StreamingLLM", "H2O"):
        cells.append(Cell("ours eager", policy, 32 * scale, 1, 2 * scale))
    return cells


def floors(cells: list[Cell]) -> list[Cell]:
    """The floor of each batch of `cells`: the compiled forward without attention."""
    return [Cell("no attention", "", 0, batch) for batch in sorted({c.batch for c in cells})]


def peer_grid(scale: int = 1024) -> list[Cell]:
    """What runs in the environment of kvpress, its own transformers' dense arm with it."""
    cells = []
    for context in (32 * scale, 4 * scale):
        cells.append(Cell("dense eager, kvpress's transformers", "", context, 1))
        policies = ("Knorm", "StreamingLLM", "SnapKV", "Knorm while decoding")
        cells += [Cell("kvpress", policy, context, 1, 2 * scale) for policy in policies]
    return cells


def window_of(cell: Cell, window: int) -> int:
    """Steps in a window of the clock: a quarter where each waits for Python, whole evictions."""
    if cell.arm in COMPILED or cell.policy in ("SnapKV", "Knorm while decoding"):
        return window
    return max(16, window // 4)  # a page at least


def random_kv(
    model: PreTrainedModel, cache: Cache, batch: int, tokens: int, generator: torch.Generator
) -> None:
    """Put random keys and values of `tokens` tokens into every layer of an empty cache."""
    config = model.config
    size = (batch, config.num_key_value_heads, tokens, config.head_dim)
    given = dict(dtype=model.dtype, device=model.device, generator=generator)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(size, **given), torch.randn(size, **given), layer)
