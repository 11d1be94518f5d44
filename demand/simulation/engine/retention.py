"""Which of the KV that a run leaves behind between its calls stays on the device."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from demand.arguments import share
from demand.distribution.rank_table import RankTable
from demand.graph.pdgraph import PDGraph
from demand.seconds import Floats, check_seconds
from demand.simulation.engine.next_use import next_use
from demand.units import CostModel

Bools = NDArray[np.bool_]

NO_LIMIT = 1 << 62
"""More blocks than any engine has."""


@final
@dataclass(slots=True, eq=False)
class LeftKV:
    """The KV that one call left on the device when it was over, or lost its place.

    Attributes:
        application: of the run.
        unit: name of the unit that the call was of.
        blocks: full blocks, the first of its tokens; the last one is given up first.
        since: second at which it was left.
        used: how many were left or found again before: the order of use.
        of_run: whether a call of the run may still find it; if not, the run is over or its next
            call began otherwise.
        waits: whether its own request waits to go on, having lost its place.
        wanted: second at which the call was asked for that may find it; None before.
        table: ranks of the seconds to its next use, where the retention asks for them.
        elsewhere: whether the run's last call was asked of another engine; it is held no longer.
        reach: blocks that a call of the run can find at most, by what its calls elsewhere shared.
    """

    application: str
    unit: str
    blocks: int
    since: float
    used: int
    of_run: bool = True
    waits: bool = False
    wanted: float | None = None
    table: RankTable | None = None
    elsewhere: bool = False
    reach: int = NO_LIMIT


class Retention(ABC):
    """A rule for the KV that calls leave behind.

    What is left lies in blocks that requests may have: they are taken when free ones run out, from
    the one of greatest rank first, its last block first. What is held is kept from requests that
    wait for admission, unless nobody runs; requests that run take it before one of them gives way.
    A frozen dataclass, configuration only.
    """

    @property
    def moves(self) -> bool:
        """Whether ranks or what is held change while nothing happens."""
        return False

    @property
    def limit(self) -> float:
        """Share of the blocks that may be held, at most."""
        return 0.0

    @property
    def knows_ends(self) -> bool:
        """Whether what a run left is given up when the run is over."""
        return False

    def table(self, unit: str, graph: PDGraph | None, cost: CostModel) -> RankTable | None:
        """What it wants to know of the next use of the KV of a unit; None for nothing."""
        return None

    @abstractmethod
    def rank(self, left: LeftKV, now: float) -> float:
        """The greater, the sooner it is given up."""

    def holds(self, left: LeftKV, now: float) -> bool:
        """Whether to keep it from requests that wait, within `limit`."""
        return False

    def holds_at(self, left: LeftKV, seconds: Floats) -> Bools:
        """`[n]`: `holds` at each of `[n]` seconds on the clock, between which nothing happens."""
        return np.array([self.holds(left, second) for second in seconds.tolist()], dtype=np.bool_)


@final
@dataclass(frozen=True)
class LRU(Retention):
    """The least recently used is given up first, and nothing is held: vLLM's prefix caching.

    That is the free queue of vLLM's block pool (automatic prefix caching, 0.32.0): blocks of a
    request that is over are free, found again by their contents, and taken from the least recently
    freed on, the last block of a request before its first. It knows nothing of runs: what those
    that are over have left waits its turn like any other.
    """

    @override
    def rank(self, left: LeftKV, now: float) -> float:
        """The order of use."""
        return -left.used


@final
@dataclass(frozen=True)
class KeepAll(Retention):
    """All that a run leaves is held until its next call, or its end.

    A run then comes back to its KV however long its tool took, and its blocks serve nobody
    meanwhile. What does not fit the limit is kept as by `LRU`, the most recently used held first.

    Args:
        limit: share of the blocks that may be held.

    Raises:
        DemandError: no share.
    """

    limit: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", share("limit", self.limit))

    @property
    @override
    def knows_ends(self) -> bool:
        return True

    @override
    def rank(self, left: LeftKV, now: float) -> float:
        """The order of use, after all that no call can find."""
        return -left.used if left.of_run else math.inf

    @override
    def holds(self, left: LeftKV, now: float) -> bool:
        """Until the run's next call is asked for, which may find it."""
        return left.of_run and left.wanted is None


@final
@dataclass(frozen=True)
class NextUse(Retention):
    """What will be used soon is kept: by the Gittins rank of the seconds to the next use.

    Keeping the KV of a run for D seconds more saves a prefill if its next call comes by then, and
    occupies its blocks until then or for D. Per block, the most saved for a second of occupation is
    sup_D P(T <= D) / E[min(T, D)] over the time T to the next call, given the seconds since the
    last one: the inverse of the Gittins rank of T. Blocks are given up from the greatest rank on.
    T has the law that the demand graph of the application says: seconds of the units between two
    calls of one unit (of tools as recorded, of other calls by the cost model), never where a run
    ended without another. Waiting for the engine is not in it. What a call that waits already will
    find is given up last of all.

    The idea to keep KV by the expected time to the next call is that of Continuum (arXiv
    2511.02230, a time to live from the latency of the tool), KVFlow (2507.07400, steps to the next
    execution) and SAGA (2605.00528, Belady's order predicted from the workflow). Departures:
    the distribution and its conditioning in place of a point prediction, the Gittins rank as the
    price, no prefetch from the host.

    Args:
        price: rank in seconds up to which KV is held; 0 holds nothing.
        limit: share of the blocks that may be held.

    Raises:
        DemandError: a price that is negative or not finite, or no share.
    """

    price: float = 0.0
    limit: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "price", check_seconds("price", self.price))
        object.__setattr__(self, "limit", share("limit", self.limit))

    @property
    @override
    def moves(self) -> bool:
        return True

    @property
    @override
    def knows_ends(self) -> bool:
        return True

    @override
    def table(self, unit: str, graph: PDGraph | None, cost: CostModel) -> RankTable | None:
        """Gittins ranks of the seconds to the next use, by the seconds since the last.

        None where the graph does not know the unit, whose KV is given up by the time it lies.
        """
        known = None if graph is None else next_use(graph, unit, cost)
        return None if known is None else RankTable(known)

    @override
    def rank(self, left: LeftKV, now: float) -> float:
        """The Gittins rank of the seconds to its next use; below 0 where that is asked for."""
        if not left.of_run:
            return math.inf
        if left.wanted is not None:
            return -1.0 / (1.0 + left.wanted)  # of those the last to be asked for goes first
        seconds = max(now - left.since, 0.0)
        return seconds if left.table is None else left.table.at(seconds)

    @override
    def holds(self, left: LeftKV, now: float) -> bool:
        """While its rank is no greater than the price."""
        return self.price > 0.0 and 0.0 <= self.rank(left, now) <= self.price

    @override
    def holds_at(self, left: LeftKV, seconds: Floats) -> Bools:
        """The same, all at once."""
        if not self.price or not left.of_run or left.wanted is not None:
            return np.zeros(seconds.shape, dtype=np.bool_)
        ages = np.maximum(seconds - left.since, 0.0)
        return (ages if left.table is None else left.table(ages)) <= self.price


@final
class Tables:
    """`Retention.table` by application and unit, each made once."""

    def __init__(
        self,
        retention: Retention,
        graphs: Mapping[str, PDGraph],
        costs: Mapping[str, CostModel],
    ) -> None:
        self._retention = retention
        self._graphs = graphs
        self._costs = costs
        self._made: dict[tuple[str, str], RankTable | None] = {}

    def of(self, application: str, unit: str) -> RankTable | None:
        """That of a unit of an application."""
        key = application, unit
        if key not in self._made:
            graph, cost = self._graphs.get(application), self._costs[application]
            self._made[key] = self._retention.table(unit, graph, cost)
        return self._made[key]
