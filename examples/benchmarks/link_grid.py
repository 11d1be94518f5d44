"""The grid of link.py: what is timed, at which lengths, the most wanted first."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from picache import CacheBlend, ChunkStore, LegoLink, LinkMethod, NaiveReuse, ProphetKV

FULL = ("full prefill, sdpa", "full prefill, flash")
PREFIX = "prefix caching"
COMPILED = "LegoLink-16, compiled"
METHODS: dict[str, LinkMethod] = {
    "naive": NaiveReuse(),
    "LegoLink-16": LegoLink(16),
    "CacheBlend 15 %": CacheBlend(0.15),
    "ProphetKV 15 %": ProphetKV(0.15),
}
TIERS = ("device", "host", "disk")


@dataclass(frozen=True)
class Cell:
    """One arm on prompts of one length.

    Attributes:
        arm: of `FULL`, `PREFIX`, `COMPILED`, or of `METHODS`.
        tokens: of each prompt, its query included.
        chunks: that it is linked of; 1 for prefix caching, 0 for a full prefill.
        tier: where they lie; "" for a full prefill.
        batch: prompts at once.
    """

    arm: str
    tokens: int
    chunks: int = 0
    tier: str = ""
    batch: int = 1

    @property
    def name(self) -> str:
        """What `--only` is matched against."""
        of = f" of {self.chunks} chunks" if self.chunks > 1 else ""
        where = f", {self.tier}" if self.tier else ""
        return f"{self.arm}, {self.tokens} tokens{of}{where}, batch {self.batch}"

    def asdict(self) -> dict:
        return asdict(self) | {"name": self.name}


def grid(scale: int = 1024) -> list[Cell]:
    """All cells; `scale` is what "k" stands for.

    First LegoLink against a full prefill by length, then the other methods, tiers, numbers of
    chunks and batches.
    """
    k = scale
    lengths = [32 * k, 4 * k, 128 * k, 16 * k, k]
    cells = []
    for tokens in lengths:
        cells += [Cell("LegoLink-16", tokens, 16, "device"), Cell(FULL[0], tokens)]
        cells += [Cell(PREFIX, tokens, 1, "device"), Cell("naive", tokens, 16, "device")]
    for tokens in (32 * k, 4 * k):
        cells += [Cell(name, tokens, 16, "device") for name in list(METHODS)[2:]]
        cells += [Cell("LegoLink-16", tokens, 16, "host"), Cell(COMPILED, tokens, 16, "device")]
    for tokens in (4 * k, 16 * k):
        cells += [Cell("LegoLink-16", tokens, 16, "device", 8), Cell(FULL[0], tokens, batch=8)]
    cells += [Cell(COMPILED, 4 * k, 16, "device", 8)]
    cells += [Cell("LegoLink-16", 32 * k, chunks, "device") for chunks in (4, 64)]
    cells += [Cell("LegoLink-16", 4 * k, 16, "disk"), Cell("LegoLink-16", 32 * k, 16, "disk")]
    cells += [Cell(FULL[1], tokens) for tokens in lengths]
    for tokens in (128 * k, 16 * k, k):
        cells += [Cell(name, tokens, 16, "device") for name in list(METHODS)[2:]]
    return cells


def store_of(tier: str, folder: Path) -> ChunkStore:
    """A store that keeps every chunk in one tier."""
    if tier == "device":
        return ChunkStore()
    if tier == "host":
        return ChunkStore(device_bytes=1, host_bytes=math.inf)
    return ChunkStore(device_bytes=1, path=folder)


def texts(cell: Cell, query: int, vocab: int, seed: int) -> tuple[list[list[torch.Tensor]], list]:
    """Chunks and query of each prompt of a cell: token ids, the same for every arm.

    The prompts of a batch share the first half of their chunks.
    """
    generator = torch.Generator().manual_seed(seed + cell.tokens)
    first = torch.randint(3, vocab, (cell.tokens,), generator=generator)
    chunks, queries = [], []
    for row in range(cell.batch):
        ids = first.clone()
        if row:
            half = (cell.tokens - query) // 2
            new = torch.randint(3, vocab, (cell.tokens - half,), generator=generator)
            ids[half:] = new
        context = ids[:-query]
        chunks.append(list(context.tensor_split(max(1, cell.chunks))))
        queries.append(ids[-query:])
    return chunks, queries
