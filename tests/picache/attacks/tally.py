"""What an attack counts, and the chunks it looks for."""

import traceback
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache

import torch

from picache import ChunkStore, PICacheError
from picache.errors import CorruptChunk, StoreFull
from tests.picache.helpers import same_kv

KEYS = [f"{i:02}-attacked" for i in range(24)]


@cache
def chunk(key, tokens=64, layers=4):
    """The KV that belongs under a key, and under no other."""
    made = torch.Generator().manual_seed(KEYS.index(key))
    shape = (1, 2, tokens, 16)
    return [
        (torch.randn(shape, generator=made), torch.randn(shape, generator=made))
        for _ in range(layers)
    ]


@dataclass
class Tally:
    """Counts of one attack.

    Attributes:
        trials: operations asked of a store, or links.
        hits: of them, chunks that were found and right.
        refused: refusals that the interface promises: no room, chunks in use, a folder that cannot
            be opened or cleared.
        wrong: values that were not those put in.
        failures: what should not have been raised, and bounds that did not hold.
    """

    trials: int = 0
    hits: int = 0
    refused: int = 0
    wrong: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, other):
        self.trials += other.trials
        self.hits += other.hits
        self.refused += other.refused
        self.wrong += other.wrong
        self.failures += other.failures

    def expect(self, held, what):
        if not held:
            self.failures.append(what)

    def run(self, work, *args, refusals=(StoreFull,)):
        """Do one thing; its value, None where it was refused or failed."""
        self.trials += 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                return work(*args)
        except refusals:
            self.refused += 1
        except Exception:
            self.failures.append(traceback.format_exc())
        return None

    def get(self, store, key):
        """Look a chunk up and read all of it; one found damaged is a miss."""

        def look():
            found = store.get(key)
            try:
                return None if found is None else found.load()
            except CorruptChunk:
                return None

        kv = self.run(look)
        if kv is not None:
            right = same_kv(kv, chunk(key))
            self.hits += right
            self.wrong += not right

    def put(self, store, key):
        self.run(store.put, key, chunk(key))

    def anything(self, store, key, chance):
        """One operation of any kind, as a neighbour in the same process may do it."""
        kind = chance.choices(
            ["get", "put", "in", "stats", "pin", "using", "promote"], [40, 30, 10, 5, 5, 5, 5]
        )[0]
        if kind == "get":
            self.get(store, key)
        elif kind == "put":
            self.put(store, key)
        elif kind == "in":
            self.run(store.__contains__, key)
        elif kind == "stats":
            self.run(repr, store)
        elif kind == "pin":
            self.run(pin_a_while, store, key, refusals=(PICacheError,))
        elif kind == "using":
            self.run(use_a_while, self, store, key)
        else:
            self.run(promote, store, key)


def pin_a_while(store: ChunkStore, key):
    store.pin(key)
    store.unpin(key)


def use_a_while(tally, store: ChunkStore, key):
    with store.using([key]):
        tally.get(store, key)


def promote(store: ChunkStore, key):
    with suppress(CorruptChunk):
        store.promote(key, "cpu")
