"""One prompt of a batch: what is to be linked, and what linking made of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from picache.chunk import KV, Form
from picache.methods.base import Layout


@dataclass(frozen=True)
class Row:
    """One row of a batch, to be linked: its chunks in prompt order, and its query.

    Attributes:
        chunks: as they are prefilled; the first is an exact prefix of the prompt.
        query: token ids of what follows the last chunk.
        query_dropped: ids of special tokens that came with the query and are not in the prompt.
        seams: see `LinkReport`.
    """

    chunks: tuple[Form, ...]
    query: tuple[int, ...]
    query_dropped: tuple[int, ...] = ()
    seams: tuple[bool | None, ...] = ()

    @property
    def ids(self) -> Tensor:
        """Token ids of the linked prompt, int64 ``[tokens]``."""
        query = torch.tensor(self.query, dtype=torch.int64)
        return torch.cat([*(form.prompt_ids for form in self.chunks), query])

    def layout(self, num_layers: int) -> Layout:
        """Where the chunks, without the sinks they were compiled behind, and the query stand."""
        lengths = tuple(len(form.ids) - form.skip for form in self.chunks)
        return Layout(lengths, len(self.query), num_layers)


@dataclass(frozen=True)
class LinkedRow:
    """One row of a batch, linked.

    Attributes:
        ids: token ids, int64 ``[tokens]``.
        layout: where the chunks stand.
        kv: keys and values of every token, layer by layer.
        logits: of the first new token, ``[1, vocab_size]``.
        in_places: whether its keys and values lie in the places of an arena; `kv` is empty then.
    """

    ids: Tensor
    layout: Layout
    kv: list[KV]
    logits: Tensor
    in_places: bool


class RowPlaces(Sequence[KV]):
    """The places of one row of a batch, layer by layer: views, made when they are asked for.

    Args:
        places: of the batch, keys and values ``[batch, kv_heads, places, head_dim]`` of each layer.
        row: which one.
        tokens: how many of the places.
    """

    def __init__(self, places: Sequence[KV], row: int, tokens: int) -> None:
        self._places, self._row, self._tokens = places, slice(row, row + 1), slice(tokens)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, layer: Any) -> Any:
        keys, values = self._places[layer]
        return keys[self._row, :, self._tokens], values[self._row, :, self._tokens]
