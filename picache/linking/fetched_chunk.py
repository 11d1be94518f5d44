"""One chunk's keys and values: found in the store, or compiled when the store has lost them."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from picache.chunk import KV, Form
from picache.errors import CorruptChunk, StoreFull, StoreUnavailable
from picache.kernels.placing import Resident
from picache.linking.stopwatch import Stopwatch
from picache.store import ChunkStore
from picache.store.quantize import decode, encode

if TYPE_CHECKING:
    from picache.hf.model import HFModel


def compile_chunk(model: "HFModel", ids: tuple[int, ...]) -> list[KV]:
    """Prefill a chunk alone, at positions from 0 (EPIC, arXiv 2410.15332, section 3)."""
    return model.prefill(torch.tensor([ids]))


class FetchedChunk:
    """The KV of one chunk, layer by layer, compiled where the store has none or a damaged one.

    Args:
        model: the model the chunk is compiled with.
        store: where its KV is looked up, and put when it was compiled.
        form: the chunk as it is prefilled.
        watch: measures the time of "look_up" and "compile"; by the clock.
        must_store: whether it is an error (`StoreFull`) that a chunk was compiled and finds no room
            in the store, as when the user asks for it to be compiled. A link goes on with the KV in
            hand. A disk that fails is no error for either.
        see: called before it is compiled; raises where the model is not what the form's header
            says.

    Attributes:
        hit: whether the store had it.
        nbytes: bytes that it takes in the store; 0 where it was compiled just now.
        tier: where the store had it: "device", "host" or "disk"; "device" when it was compiled
            just now.
    """

    def __init__(
        self,
        model: "HFModel",
        store: ChunkStore,
        form: Form,
        watch: Stopwatch,
        must_store: bool = False,
        see: Callable[[], None] | None = None,
    ) -> None:
        self._model, self._store, self._form, self._watch = model, store, form, watch
        self._device = model.device
        self._compiled: list[KV] = []
        self._damaged = False
        with self._watch.span("look_up"):
            found = store.get(form.key)
        self._stored = found if model.everywhere(found is not None) else None
        self.hit = self._stored is not None
        self.tier = "device" if self._stored is None else self._stored.tier
        self.nbytes = 0 if self._stored is None else self._stored.nbytes
        if self._stored is None:
            if see is not None:
                see()
            with suppress(StoreUnavailable if must_store else StoreFull):
                self._compile()

    def _compile(self) -> None:
        """Prefill the chunk and store it; on `StoreFull` the KV is in hand all the same."""
        with self._watch.span("compile"):
            own = Stopwatch()
            computed = compile_chunk(self._model, self._form.ids)
            header = replace(self._form.header, compile_seconds=own.elapsed)
            storage = self._store.storage  # a link goes on with what a hit would give
            self._compiled = [decode(encode(kv, storage), kv[0].dtype) for kv in computed]
            self._store.put(self._form.key, computed, header)

    def layers(self, layers: range) -> list[KV]:
        """Keys and values ``[1, kv_heads, tokens, head_dim]`` of layers, on the model's device.

        Raises:
            CorruptChunk: when the file is damaged; the store has dropped it, `mend` compiles it.
        """
        if self._stored is None:
            return self._compiled[layers.start : layers.stop]
        try:
            return self._stored.layers(layers, self._device)
        except CorruptChunk:
            self._damaged = True
            raise

    def resident(self) -> Resident | None:
        """All layers on the model's device; None where they are to be loaded."""
        if self._stored is None:
            return Resident.of(self._compiled)
        return self._stored.resident(self._device)

    def mend(self) -> None:
        """Compile the chunk again if it was found damaged; not while the model runs a pass."""
        if self._damaged:
            self._damaged, self._stored, self.hit = False, None, False
            with suppress(StoreFull):
                self._compile()
