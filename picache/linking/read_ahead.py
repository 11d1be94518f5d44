"""Reading the layers of a prompt's chunks before they are due, in several threads."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial

from picache.chunk import KV
from picache.store.failures import beside

READERS = 8
"""Threads; they wait for a disk or a network, or hash, which needs no Python."""
AHEAD = 2
"""Layers that are read beside the one that is asked for."""


class ReadAhead:
    """The KV of a prompt's chunks, layer by layer, of which the next layers are being read.

    When a layer is asked for, it and the `AHEAD` behind it are read and checked, each chunk of each
    layer by itself. An error is raised when the layer that it belongs to is asked for.

    Args:
        parts: for each chunk, a function that gives its KV in a layer; several threads call it.
        layers: how many there are.
        inside: gives a context manager in which a thread reads, such as a CUDA stream's.
    """

    def __init__(
        self,
        parts: Sequence[Callable[[int], KV]],
        layers: int,
        inside: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._parts, self._layers, self._inside = parts, layers, inside
        self._threads = ThreadPoolExecutor(
            min(READERS, len(parts)), "picache-read", initializer=partial(beside.set, True)
        )
        self._coming: dict[int, list[Future[KV]]] = {}
        self._begun = 0

    def __call__(self, layer: int) -> list[KV]:
        """What every chunk has in a layer; layers are asked for in their order, each once."""
        for index in range(self._begun, min(layer + AHEAD + 1, self._layers)):
            reads = [partial(self._read, part, index) for part in self._parts]
            self._coming[index] = [self._threads.submit(read) for read in reads]
            self._begun = index + 1
        return [future.result() for future in self._coming.pop(layer)]

    def _read(self, part: Callable[[int], KV], layer: int) -> KV:
        with self._inside():
            return part(layer)

    def close(self) -> None:
        """End the threads, once what is being read has been."""
        self._threads.shutdown(cancel_futures=True)
