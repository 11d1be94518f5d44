"""What became of jobs served by an engine, and of the engine itself."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from demand.simulation.engine.engine import Engine
from demand.simulation.engine.pools import PoolReport
from demand.simulation.engine.served_requests import LEVELS, ServedRequests
from demand.simulation.result import Result


class Goodput(NamedTuple):
    """What met its bounds (`EngineResult.goodput`).

    Attributes:
        requests_per_second: requests that did, a second from the first arrival to the last finish.
        jobs_per_second: jobs that did, and all of their requests.
        request_share: share of the requests; NaN if there were none.
        job_share: share of the jobs.
    """

    requests_per_second: float
    jobs_per_second: float
    request_share: float
    job_share: float


class Prefixes(NamedTuple):
    """What calls found of the KV that others had left (`Engine.retention`).

    Attributes:
        looked_up: prompt tokens of all requests.
        found: of those, tokens whose KV was on the device when the request was first admitted.
        findable: of those, tokens that would have been found if nothing were ever given up.
        held_block_seconds: blocks held from requests that wait, as each step begins, times its
            seconds.
    """

    looked_up: int = 0
    found: int = 0
    findable: int = 0
    held_block_seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of the prompt tokens that were found; 0 if none were looked up."""
        return self.found / self.looked_up if self.looked_up else 0.0


@final
@dataclass(frozen=True, eq=False)
class EngineResult(Result):
    """What became of each job served by an engine in continuous batches.

    A slowdown can be below 1 here: demand adds up the seconds of parallel calls, by the cost
    model, and the engine runs them side by side. Its preemptions are of requests, not jobs: that
    one lost its place and KV, or, with `scheduling="by_rank"`, was left out of a step after one it
    was in. Its events are jobs that arrive, requests that are submitted, preempted and over, timed
    actions outside of the engine (ends of other units, warm-ups and what is planned for later),
    and steps, repeated ones included.

    Attributes:
        engine: its limits and times.
        completion_steps: `[n]` steps begun from arrival to finish.
        steps: how many were carried out.
        decisions: how often a batch was formed, empty ones too; steps in between repeat the last.
        busy_seconds: what the steps took.
        mean_batch: requests in a step, on average.
        prefilled_again: tokens whose KV was lost and computed again.
        swapped_blocks: blocks copied to the host or back.
        peak_blocks: the most blocks held at once.
        backends: what became of each pool, by its name.
        requests: what became of each request: first tokens, times between tokens, KV held.
        prefixes: what was found of the KV that calls left.
    """

    engine: Engine
    completion_steps: NDArray[np.int64] = field(repr=False)
    steps: int
    decisions: int
    busy_seconds: float
    mean_batch: float
    prefilled_again: int
    swapped_blocks: int
    peak_blocks: int
    backends: Mapping[str, PoolReport] = field(repr=False)
    requests: ServedRequests = field(repr=False)
    prefixes: Prefixes = field(repr=False, default=Prefixes())

    @property
    def mean_completion_steps(self) -> float:
        """Mean over jobs of `completion_steps`."""
        return float(self.completion_steps.mean())

    @property
    def kv_block_seconds(self) -> float:
        """The integral of the blocks held on the device over the seconds of the steps."""
        return float(self.requests.kv_block_seconds.sum())

    def goodput(
        self, *, ttft: float = math.inf, tbt: float = math.inf, tpot: float = math.inf
    ) -> Goodput:
        """How much met its bounds: each request these, each job its deadline if it has one.

        Args:
            ttft: seconds to the first token of a request.
            tbt: seconds between any two tokens of a request that follow each other.
            tpot: mean seconds between the tokens of a request (time per output token).

        Raises:
            DemandError: a bound that is negative or no number.
        """
        good = self.requests.within(ttft=ttft, tbt=tbt, tpot=tpot)
        finished = self.workload.arrivals + self.completion_times
        jobs = finished <= self.workload.deadlines
        jobs[self.requests.job[~good]] = False
        seconds = float(finished.max() - self.workload.arrivals.min())
        return Goodput(
            float(good.sum()) / seconds if seconds else math.nan,
            float(jobs.sum()) / seconds if seconds else math.nan,
            float(good.mean()) if good.size else math.nan,
            float(jobs.mean()),
        )

    def summary(self) -> dict[str, float]:
        """The figures of every result, and those of the engine."""
        reports, requests = self.backends.values(), self.requests
        return super().summary() | {
            "mean_completion_steps": self.mean_completion_steps,
            "steps": self.steps,
            "busy_seconds": self.busy_seconds,
            "mean_batch": self.mean_batch,
            "prefilled_again": self.prefilled_again,
            "swapped_blocks": self.swapped_blocks,
            "peak_blocks": self.peak_blocks,
            **{f"p{100 * q:.0f}_ttft_seconds": requests.ttft_quantile(q) for q in LEVELS},
            **{f"p{100 * q:.0f}_tbt_seconds": requests.tbt_quantile(q) for q in LEVELS},
            "kv_block_seconds": self.kv_block_seconds,
            "prefix_misses": 1.0 - self.prefixes.hit_rate,
            "held_block_seconds": self.prefixes.held_block_seconds,
            "backend_wait_seconds": sum(report.wait_seconds for report in reports),
            "backend_idle_seconds": sum(report.idle_seconds for report in reports),
        }

    def __repr__(self) -> str:
        found = f", {self.prefixes.hit_rate:.1%} of prompt tokens found again"
        return (
            f"EngineResult({self.policy!r}, {self.completion_times.size} jobs, "
            f"mean {self.mean:.4g} s, p95 {self.quantile(0.95):.4g} s, {self.steps} steps of "
            f"{self.mean_batch:.3g} requests, {self.preemptions} preemptions, "
            f"{self.prefilled_again} tokens prefilled again, "
            f"p95 TTFT {self.requests.ttft_quantile(0.95):.4g} s, "
            f"p95 TBT {self.requests.tbt_quantile(0.95):.4g} s"
            f"{found if self.prefixes.looked_up else ''})"
        )
