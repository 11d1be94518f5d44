"""Reading the layers of a prompt's chunks before they are due, in several threads."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial

from picache.chunk import KV
from picache.linking.sources import Part
from picache.store.failures import beside

READERS = 8
"""Threads; they wait for a disk or a network, or hash, which needs no Python."""
AHEAD = 2
"""Groups of layers that are read beside the one that is asked for."""


class ReadAhead:
    """The KV of a prompt's chunks, one group of layers after the other, the next being read.

    When a group is asked for, it and the `AHEAD` behind it are read and checked, each chunk by
    itself. An error is raised when the group that it belongs to is asked for.

    Args:
        parts: for each chunk, a function that gives its KV in a group; several threads call it.
        layer_groups: the layers of the model.
        inside: gives a context manager in which a thread reads, such as a CUDA stream's.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        layer_groups: Sequence[range],
        inside: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._parts, self._groups, self._inside = parts, layer_groups, inside
        self._threads = ThreadPoolExecutor(
            min(READERS, len(parts)), "picache-read", initializer=partial(beside.set, True)
        )
        self._coming: dict[int, list[Future[list[KV]]]] = {}
        self._begun = 0

    def __call__(self, index: int) -> list[list[KV]]:
        """What every chunk has in a group; groups are asked for in their order, each once."""
        for group in range(self._begun, min(index + AHEAD + 1, len(self._groups))):
            reads = [partial(self._read, part, self._groups[group]) for part in self._parts]
            self._coming[group] = [self._threads.submit(read) for read in reads]
            self._begun = group + 1
        found = [future.result() for future in self._coming[index]]
        del self._coming[index]  # not where one has failed: who asks again is told the same
        return found

    def _read(self, part: Part, layers: range) -> list[KV]:
        with self._inside():
            return part(layers)

    def close(self) -> None:
        """End the threads, once what is being read has been."""
        self._threads.shutdown(cancel_futures=True)
