"""Chunks compiled in batches, padded at the end."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from picache.chunk import Form
from picache.linking.stopwatch import Stopwatch
from picache.store import ChunkStore

if TYPE_CHECKING:
    from picache.hf.model import HFModel

MOST_TOKENS = 16384
"""Tokens of a batch, padding included, where a single chunk has no more."""
PADDED = 1.5
"""Tokens of a batch, padding included, for each of its chunks' own."""


def compile_together(model: "HFModel", store: ChunkStore, forms: Sequence[Form]) -> set[str]:
    """Prefill the chunks that a store lacks, several at once, and store them.

    A chunk stands alone in its row, from position 0. Padding stands behind it, where no token of
    the chunk attends to.

    Args:
        model: whose rotary frequencies do not follow the length of the text.
        store: where the chunks are put.
        forms: the chunks as they are prefilled.

    Returns:
        The keys of these chunks, each of which counts as a miss.

    Raises:
        StoreFull: when there is no room; those before are stored.
    """
    different = {form.key: form for form in forms}
    lacking = {
        key: form
        for key, form in different.items()
        if not model.everywhere(key in store or store.get(key) is not None)  # which counts it
    }
    for batch in _batches(sorted(lacking.values(), key=lambda form: len(form.ids))):
        watch = Stopwatch()
        ids = torch.zeros(len(batch), len(batch[-1].ids), dtype=torch.int64)
        for row, form in zip(ids, batch, strict=True):
            row[: len(form.ids)] = torch.tensor(form.ids)
        computed = model.prefill(ids)
        seconds = watch.elapsed / sum(len(form.ids) for form in batch)
        for index, form in enumerate(batch):
            own = (slice(index, index + 1), slice(None), slice(len(form.ids)))
            # Copied, so that a chunk does not keep the memory of the whole batch.
            kv = [(_copied(keys[own]), _copied(values[own])) for keys, values in computed]
            store.put(form.key, kv, replace(form.header, compile_seconds=seconds * len(form.ids)))
    return set(lacking)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _batches(forms: Sequence[Form]) -> Iterator[list[Form]]:
    """Chunks of ascending length in batches within `MOST_TOKENS` and `PADDED`."""
    batch: list[Form] = []
    tokens = 0
    for form in forms:
        padded, tokens = (len(batch) + 1) * len(form.ids), tokens + len(form.ids)
        if batch and (padded > MOST_TOKENS or padded > PADDED * tokens):
            yield batch
            batch, tokens = [], len(form.ids)
        batch.append(form)
    if batch:
        yield batch
