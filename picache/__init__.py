"""Position-independent caching: compile the KV of each text chunk once, link chunks in any order.

    pic = PIC(model, tokenizer)
    chunks = [pic.compile(document) for document in documents]
    prompt = pic.link(chunks, question, method=LegoLink(k=16))
    out = model.generate(**prompt, max_new_tokens=64)

After EPIC (arXiv 2410.15332).
"""

from picache import presets as presets
from picache.chunk import Chunk
from picache.compare import compare
from picache.comparison import Comparison
from picache.errors import CorruptChunk, PICacheError, StoreFull
from picache.linking.prompt import LinkedPrompt
from picache.linking.report import LinkReport
from picache.methods import (
    A3,
    APE,
    CacheBlend,
    Combined,
    FullRecompute,
    LegoLink,
    NaiveReuse,
    OracleDeviation,
    ProphetKV,
    RandomRecompute,
)
from picache.methods.base import Evidence, Layout, LinkMethod
from picache.methods.presets import Arm, arms
from picache.pic import PIC
from picache.problem import Problem
from picache.problem_file import load_problems
from picache.sinks import DummySinks, SharedPrefix
from picache.store import ChunkStore, StoredChunk

__all__ = [
    "A3",
    "APE",
    "PIC",
    "Arm",
    "CacheBlend",
    "Chunk",
    "ChunkStore",
    "Combined",
    "Comparison",
    "CorruptChunk",
    "DummySinks",
    "Evidence",
    "FullRecompute",
    "Layout",
    "LegoLink",
    "LinkMethod",
    "LinkReport",
    "LinkedPrompt",
    "NaiveReuse",
    "OracleDeviation",
    "PICacheError",
    "Problem",
    "ProphetKV",
    "RandomRecompute",
    "SharedPrefix",
    "StoreFull",
    "StoredChunk",
    "arms",
    "compare",
    "load_problems",
]
