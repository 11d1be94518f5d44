"""The arguments of `PIC`, checked; an error names what was expected and what to write instead."""

import os
from collections.abc import Callable
from typing import Any

from picache.arguments import real_number
from picache.errors import PICacheError
from picache.sinks import DummySinks, SharedPrefix, Sinks
from picache.store import ChunkStore


def spelled(given: object) -> str:
    """How an error names an argument: a class as a class, a text as it is, the rest by type."""
    if isinstance(given, type):
        return f"the class {given.__name__}"
    return f"the text {given!r}" if isinstance(given, str) else type(given).__name__


def as_store(given: object) -> ChunkStore:
    """The store that was given; a new one without a bound for None."""
    if given is None:
        return ChunkStore()
    if isinstance(given, ChunkStore):
        return given
    remedy = "give store=ChunkStore(), or leave it out"
    if isinstance(given, str | os.PathLike):
        remedy = f"to keep chunks on disk give store=ChunkStore(path={os.fspath(given)!r})"
    raise PICacheError(f"store must be a ChunkStore, got {spelled(given)}: {remedy}")


def as_tokenizer(given: object) -> Callable[..., Any] | None:
    """The tokenizer that was given, or None; PICacheError when it cannot be called with a text."""
    if given is None:
        return None
    if isinstance(given, str):
        raise PICacheError(
            f"tokenizer must be a tokenizer of transformers, got {spelled(given)}: load it with "
            f"AutoTokenizer.from_pretrained({given!r})"
        )
    if isinstance(given, ChunkStore):
        raise PICacheError("tokenizer is a ChunkStore: write PIC(model, store=...)")
    if isinstance(given, type) or not callable(given):
        raise PICacheError(
            f"tokenizer must be a tokenizer of transformers, got {spelled(given)}: load it with "
            "AutoTokenizer.from_pretrained(...), or wrap one of the library tokenizers as "
            "PreTrainedTokenizerFast(tokenizer_object=...)"
        )
    return given


def as_sinks(given: object) -> Sinks:
    """What chunks are compiled behind; PICacheError when it is none of the four kinds."""
    if isinstance(given, DummySinks | SharedPrefix):
        return given
    if isinstance(given, str) and given in ("drop", "keep"):
        return given  # type: ignore[return-value]  # one of the two
    raise PICacheError(
        f"sinks must be 'drop', 'keep', DummySinks(...) or SharedPrefix(...), got {given!r}"
    )


def as_flops_per_byte(given: object) -> float | None:
    """What moving a byte of KV costs, in floating-point operations; None where that is ignored."""
    if given is None:
        return None
    needs = "flops_per_byte must be at least 0 or None"
    return real_number(needs, given, lambda flops: flops >= 0)
