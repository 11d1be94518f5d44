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


def compile_together(model: "HFModel", store: ChunkStore, forms: Sequence[Form]) -> None:
    """Prefill the chunks that a store lacks, several at once, and store them.

    A chunk stands alone in its row, from position 0. Padding stands behind it, where no token of
    the chunk attends to.

    Args:
        model: whose rotary frequencies do not follow the length of the text.
        store: where the chunks are put.
        forms: the chunks as they are prefilled.

    Raises:
        StoreFull: when there is no room; those before are stored.
    """
    lacking = {form.key: form for form in forms if form.key not in store}
    for batch in _batches(sorted(lacking.values(), key=lambda form: len(form.ids))):
        watch = Stopwatch()
        ids = torch.zeros(len(batch), len(batch[-1].ids), dtype=torch.int64)
        for row, form in zip(ids, batch, strict=True):
            row[: len(form.ids)] = torch.tensor(form.ids)
        computed = model.prefill(ids)
        seconds = watch.elapsed / len(batch)
        for index, form in enumerate(batch):
            own = (slice(index, index + 1), slice(None), slice(len(form.ids)))
            # Copied, so that a chunk does not keep the memory of the whole batch.
            kv = [(_copied(keys[own]), _copied(values[own])) for keys, values in computed]
            store.put(form.key, kv, replace(form.header, compile_seconds=seconds))


def _copied(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _batches(forms: Sequence[Form]) -> Iterator[list[Form]]:
    """Chunks of ascending length in batches of at most `MOST_TOKENS`, padding included."""
    batch: list[Form] = []
    for form in forms:
        if batch and (len(batch) + 1) * len(form.ids) > MOST_TOKENS:
            yield batch
            batch = []
        batch.append(form)
    if batch:
        yield batch
