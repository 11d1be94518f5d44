"""What became of jobs served by several engines, and of each engine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, final

import numpy as np

from demand.arguments import share
from demand.html_table import cell, html_table
from demand.routing.base import Router
from demand.seconds import Floats
from demand.simulation.engine.engine import Engine
from demand.simulation.engine.pools import PoolReport
from demand.simulation.engine.result import Prefixes
from demand.simulation.engine.served_requests import LEVELS, ServedRequests
from demand.simulation.result import Result


@final
@dataclass(frozen=True, eq=False)
class EngineShare:
    """What one of several engines did.

    Attributes:
        number: of the engine, from 0 on.
        units: llm units that were routed to it.
        steps: how many it carried out.
        decisions: how often a batch was formed, empty ones too.
        busy_seconds: what the steps took.
        mean_batch: requests in a step, on average.
        preemptions: of requests, as `EngineResult`.
        prefilled_again: tokens whose KV was lost and computed again.
        swapped_blocks: blocks copied to the host or back.
        peak_blocks: the most blocks held at once.
        requests: what became of each request; jobs by their order of arrival in the cluster.
        prefixes: what was found of the KV that calls left here.
    """

    number: int
    units: int
    steps: int
    decisions: int
    busy_seconds: float
    mean_batch: float
    preemptions: int
    prefilled_again: int
    swapped_blocks: int
    peak_blocks: int
    requests: ServedRequests = field(repr=False)
    prefixes: Prefixes


@final
@dataclass(frozen=True, eq=False)
class ClusterResult(Result):
    """What became of each job served by several engines behind a router.

    Slowdowns, preemptions and events are as of `EngineResult`, over all engines.

    Attributes:
        engine: limits and times of each engine.
        router: chose among them.
        engines: what each did, by number.
        moves: llm units that went to another engine than the last one of their run.
        backends: what became of each pool, by its name.
    """

    engine: Engine
    router: Router
    engines: tuple[EngineShare, ...] = field(repr=False)
    moves: int
    backends: Mapping[str, PoolReport] = field(repr=False)

    @property
    def steps(self) -> int:
        """Steps carried out, over all engines."""
        return sum(engine.steps for engine in self.engines)

    @property
    def busy_seconds(self) -> float:
        """What the steps took, over all engines."""
        return sum(engine.busy_seconds for engine in self.engines)

    @property
    def imbalance(self) -> float:
        """Busy seconds of the busiest engine over the mean of all: 1 if all are equally busy.

        NaN if none ever was.
        """
        busy = [engine.busy_seconds for engine in self.engines]
        return max(busy) / (sum(busy) / len(busy)) if max(busy) else float("nan")

    @cached_property
    def prefixes(self) -> Prefixes:
        """What was found of the KV that calls left, over all engines."""
        found = [engine.prefixes for engine in self.engines]
        return Prefixes(*(sum(column) for column in zip(*found, strict=True)))

    @cached_property
    def ttft(self) -> Floats:
        """`[requests]` seconds to the first token, of all engines one after the other."""
        return np.concatenate([engine.requests.ttft for engine in self.engines])

    def ttft_quantile(self, q: float) -> float:
        """The q-quantile of the time to first token over all requests; NaN for none.

        Raises:
            DemandError: `q` is not a share.
        """
        q = share("q", q)
        return float(np.quantile(self.ttft, q)) if self.ttft.size else float("nan")

    @cached_property
    def table(self) -> list[dict[str, Any]]:
        """A row for all and one an engine: units, load, batch, what was found, first tokens."""
        until = float((self.workload.arrivals + self.completion_times).max())
        seconds = until - float(self.workload.arrivals.min())
        rows = [
            {
                "engine": engine.number,
                "units": engine.units,
                "requests": len(engine.requests),
                "busy_share": engine.busy_seconds / seconds if seconds else float("nan"),
                "mean_batch": engine.mean_batch,
                "preemptions": engine.preemptions,
                "prefilled_again": engine.prefilled_again,
                "hit_rate": engine.prefixes.hit_rate,
                "p95_ttft_seconds": engine.requests.ttft_quantile(0.95),
            }
            for engine in self.engines
        ]
        total: dict[str, Any] = {"engine": "all"}
        for name in ("units", "requests", "preemptions", "prefilled_again"):
            total[name] = sum(row[name] for row in rows)
        total["busy_share"] = sum(row["busy_share"] for row in rows) / len(rows)
        in_steps = sum(engine.mean_batch * engine.steps for engine in self.engines)
        total["mean_batch"] = in_steps / max(self.steps, 1)
        total["hit_rate"] = self.prefixes.hit_rate
        total["p95_ttft_seconds"] = self.ttft_quantile(0.95)
        return [{name: total[name] for name in rows[0]}, *rows]

    def summary(self) -> dict[str, float]:
        """The figures of every result, and those of the engines together."""
        total, reports = self.table[0], self.backends.values()
        return super().summary() | {
            "moves": self.moves,
            "imbalance": self.imbalance,
            "busy_share": total["busy_share"],
            "steps": self.steps,
            "busy_seconds": self.busy_seconds,
            "mean_batch": total["mean_batch"],
            "prefilled_again": total["prefilled_again"],
            "swapped_blocks": sum(engine.swapped_blocks for engine in self.engines),
            **{f"p{100 * q:.0f}_ttft_seconds": self.ttft_quantile(q) for q in LEVELS},
            "prefix_misses": 1.0 - self.prefixes.hit_rate,
            "held_block_seconds": self.prefixes.held_block_seconds,
            "backend_wait_seconds": sum(report.wait_seconds for report in reports),
            "backend_idle_seconds": sum(report.idle_seconds for report in reports),
        }

    def _repr_html_(self) -> str:
        names = [name.replace("_", " ") for name in self.table[0]]
        rows = [[cell(value) for value in row.values()] for row in self.table]
        engines = html_table(f"{len(self.engines)} engines by {self.router!r}", [names, *rows])
        return super()._repr_html_() + engines

    def __repr__(self) -> str:
        found = f", {self.prefixes.hit_rate:.1%} of prompt tokens found again"
        return (
            f"ClusterResult({self.policy!r}, {len(self.engines)} engines by {self.router!r}, "
            f"{self.completion_times.size} jobs, mean {self.mean:.4g} s, "
            f"p95 {self.quantile(0.95):.4g} s, {self.table[0]['busy_share']:.0%} busy, "
            f"the busiest {self.imbalance:.3g} times the mean, {self.moves} units moved, "
            f"{self.preemptions} preemptions, p95 TTFT {self.ttft_quantile(0.95):.4g} s"
            f"{found if self.prefixes.looked_up else ''})"
        )
