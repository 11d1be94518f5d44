"""Where the keys and values of a batch come from: each different chunk is fetched once."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

from picache.chunk import KV
from picache.kernels.placing import Resident
from picache.linking.fetched_chunk import FetchedChunk, compile_chunk
from picache.linking.row import Row
from picache.linking.stopwatch import Stopwatch
from picache.store import ChunkStore
from picache.store.together import layer_groups

if TYPE_CHECKING:
    from picache.hf.model import HFModel

Part = Callable[[range], list[KV]]
"""Gives the KV of a chunk in layers that follow each other."""


class Sources:
    """The chunks of all rows of a batch, fetched or compiled, and queries that are compiled alone.

    Args:
        model: the model the chunks are compiled with.
        store: where their KV lives; it must be kept from evicting them (`ChunkStore.using`).
        rows: of the batch.
        compile_queries: whether the queries are compiled alone, like chunks.
        watch: measures "look_up" and "compile"; by the clock.
        see: called before anything is compiled; see `FetchedChunk`.

    Attributes:
        chunks: by key; a chunk may stand in several places and rows.
    """

    def __init__(
        self,
        model: "HFModel",
        store: ChunkStore,
        rows: Sequence[Row],
        compile_queries: bool,
        watch: Stopwatch,
        see: Callable[[], None],
    ) -> None:
        different = {form.key: form for row in rows for form in row.chunks}
        self.chunks = {
            key: FetchedChunk(model, store, form, watch, see=see) for key, form in different.items()
        }
        self._rows, self._num_layers = rows, len(model.rotations)
        self._queries: list[list[KV]] = []
        if compile_queries:
            see()
            with watch.span("compile"):
                self._queries = [compile_chunk(model, row.query) for row in rows]

    def of(self, row: Row) -> list[FetchedChunk]:
        """The chunks of a row in prompt order."""
        return [self.chunks[form.key] for form in row.chunks]

    @property
    def prefetch_from(self) -> Literal["host", "disk"] | None:
        """The slowest tier that a chunk is in; None where all are on the device.

        Of all rows: a chunk that several of them hold is loaded once, in one CUDA stream.
        """
        tiers = {chunk.tier for chunk in self.chunks.values()}
        if "disk" in tiers:
            return "disk"
        return "host" if "host" in tiers else None

    @property
    def layer_groups(self) -> list[range]:
        """The layers in the groups in which those of all chunks are loaded."""
        return layer_groups(self._num_layers, sum(chunk.nbytes for chunk in self.chunks.values()))

    def skips(self, row: Row) -> list[int]:
        """How many of the first tokens of each part of a row, its sinks, are left out."""
        return [*(form.skip for form in row.chunks), *([0] if self._queries else [])]

    def compiled_tokens(self, row: Row) -> int:
        """Tokens of the parts of a row as compiled, sinks included."""
        query = len(row.query) if self._queries else 0
        return sum(len(form.ids) for form in row.chunks) + query

    def parts(self) -> list[list[Part]]:
        """For each row, functions that give the KV of its parts in a group of layers, asked once.

        What a chunk that stands in several places has there is loaded when it is first asked for,
        and let go when it has been given to the last of them.
        """
        uses = Counter(form.key for row in self._rows for form in row.chunks)
        shared: dict[str, Part] = {
            key: LoadedOnce(chunk.layers, uses[key]) if uses[key] > 1 else chunk.layers
            for key, chunk in self.chunks.items()
        }
        parts = [[shared[form.key] for form in row.chunks] for row in self._rows]
        for row, query in zip(parts, self._queries, strict=False):
            row.append(partial(_of, query))
        return parts

    def residents(self, index: int) -> list[Resident] | None:
        """The parts of a row in all layers; None where one of them is to be loaded."""
        found = [chunk.resident() for chunk in self.of(self._rows[index])]
        if self._queries:
            found.append(Resident.of(self._queries[index]))
        parts = [part for part in found if part is not None]
        return parts if len(parts) == len(found) else None

    def mend(self) -> None:
        """Compile again what was found damaged; not while the model runs a pass."""
        for chunk in self.chunks.values():
            chunk.mend()


class LoadedOnce:
    """Loads each group of layers of a chunk once for all places that ask for it, one time each.

    Args:
        load: gives their KV.
        places: how many there are.
    """

    def __init__(self, load: Part, places: int) -> None:
        self._load, self._places = load, places
        self._turn = threading.Lock()  # rows are put together by threads of their own
        self._held: dict[range, tuple[list[KV], int]] = {}

    def __call__(self, layers: range) -> list[KV]:
        """The KV of a group of layers."""
        with self._turn:
            if layers in self._held:
                kv, left = self._held.pop(layers)
            else:
                kv, left = self._load(layers), self._places
            if left > 1:
                self._held[layers] = kv, left - 1
            return kv


def _of(kv: list[KV], layers: range) -> list[KV]:
    return kv[layers.start : layers.stop]
