"""The refinement of Hermes: samples filtered by what correlated units upstream have shown."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np
from typing_extensions import override

from demand.arguments import instance_of, renamed_keyword, set_whole_numbers
from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.graph.pdgraph import PDGraph
from demand.graph.run_columns import ATTRIBUTES, Ints, RunColumns
from demand.graph.walks import MAX_UNITS, WalkArrays, check_over
from demand.refine.base import Refined, Refinement
from demand.seconds import Floats, one_number
from demand.units import CostModel, Execution, ParallelCalls, Progress


@final
@dataclass(frozen=True)
class PearsonFilter(Refinement):
    """Predicts by random walks that draw, at each unit ahead, from similar past runs only.

    Kept as the ablation of the paper, and nobody's default; it will stay, so making one does not
    warn. On held-out runs of real agents (docs/results/refinement.json, seven sets) it predicts as
    walks without filters do (3 % better on one of them). Of the distance from no refinement to SRPT
    it closes 23 % on ReAct's gpt35 under SERPT, where FCFS closes 10 %, and nothing under Gittins;
    what it closes elsewhere FCFS or `NearestRuns` exceeds, and on tau-bench and coding agents it
    loses 58 to 122 %. Where a unit has ended it takes longest of all, 0.7 ms an answer
    (docs/results/estimator.json). Prefer `NearestRuns` or `ProgressRegression` where progress is to
    tell something; docs/demand_graphs.md has the tables.

    Hermes (arXiv 2506.14851, on cross-unit correlation): where an attribute of a unit upstream
    (input tokens, output tokens, parallelism, seconds) correlates with one downstream by more
    than 0.5 in absolute value (Pearson), the stored tuples of the unit downstream are filtered by
    the upstream value observed, and random walks do the rest.

    Our reading, where the paper as quoted leaves it open: upstream means the last execution of a
    unit before the sample in its run, the unit itself included where it is in a loop; a filter
    keeps the `1 / buckets` of the samples with the nearest upstream values, instead of a bucket
    with fixed edges; filters are applied from the strongest correlation on, and one that would
    leave fewer than `minimum` samples is left out. The public artifact has none of this in its
    ranking.

    A filter holds for the first visit that a walk pays to a unit: what comes before later rounds
    of a loop is drawn, not observed. Were it to hold for all, an agent whose prompt is short, and
    which therefore does not stop yet, would never stop in any walk.

    Args:
        threshold: of the absolute correlation (0.5 in the paper).
        buckets: a filter keeps one in so many samples (10 in the paper).
        minimum: samples that must be left.
        walks: random walks for each question (1000 in the paper).
        seed: of the walks.

    Raises:
        DemandError: a threshold outside [0, 1), or buckets, minimum or walks below 1.
    """

    threshold: float = 0.5
    buckets: int = 10
    minimum: int = 30
    walks: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        threshold = one_number("threshold", self.threshold)
        object.__setattr__(self, "threshold", threshold)
        if not 0.0 <= threshold < 1.0:
            raise DemandError(f"threshold is {threshold}; expected 0 <= threshold < 1")
        set_whole_numbers(self, "buckets", "minimum", "walks", least=1)
        set_whole_numbers(self, "seed", least=0)

    @override
    @renamed_keyword("demand", "parallel_calls")
    def fit(self, graph: PDGraph, parallel_calls: ParallelCalls = "sum") -> Refined:
        """Correlate every unit with those before it, O(units * executions), and walk from each."""
        instance_of("graph", graph, PDGraph)
        columns = graph.columns()
        arrays = graph.walk_arrays(parallel_calls)
        filters: dict[int, list[Filter]] = {arrays.node(u.name): [] for u in columns.units}
        for number, upstream in enumerate(columns.units):
            before = _last_before(columns, number)
            for down in columns.units:
                node = arrays.node(down.name)
                rows = np.flatnonzero(columns.unit == node - 2)
                filters[node] += self._filters(columns, upstream.name, before[rows], rows)
        for found in filters.values():
            found.sort(key=lambda f: -f.correlation)
        rng = np.random.default_rng(self.seed)
        rest = np.zeros((len(arrays.nodes), self.walks))
        for node in filters:
            rest[node] = arrays.walk(arrays.unfinished(node, 0.0), rng, self.walks, MAX_UNITS)
        return FilteredWalks(self, graph.cost, arrays, rest, filters, parallel_calls)

    def _filters(
        self, columns: RunColumns, upstream: str, before: Ints, rows: Ints
    ) -> "list[Filter]":
        preceded = before >= 0
        if preceded.sum() < self.minimum:
            return []
        seen = columns.attributes[before[preceded]]
        correlations = _pearson(seen, columns.attributes[rows[preceded]])
        filters = []
        for at, strongest in enumerate(correlations.max(axis=1)):
            if strongest > self.threshold:
                values = np.full(rows.size, np.nan)
                values[preceded] = seen[:, at]
                filters.append(Filter(upstream, ATTRIBUTES[at], float(strongest), values))
        return filters


class Filter(NamedTuple):
    """An attribute of a unit upstream that correlates with attributes of a unit downstream.

    Attributes:
        upstream: name of the unit.
        attribute: of its last execution.
        correlation: the strongest, in absolute value, with an attribute downstream.
        values: `[samples]` that preceded each sample of the unit downstream; NaN for none.
    """

    upstream: str
    attribute: str
    correlation: float
    values: Floats


@final
@dataclass(frozen=True, eq=False)
class FilteredWalks(Refined):
    """Random walks over a graph, with the filters that progress puts on the samples of its nodes.

    Attributes:
        config: the refinement.
        cost: of the graph.
        arrays: all samples.
        rest: `[nodes, walks]` seconds to the end from each node, without filters. A walker that
            has no filter ahead of it takes its own of these instead of walking on; so answers
            differ by what was seen, and not by chance.
        filters: of each node, strongest first.
        parallel_calls: how parallel calls count.
    """

    config: PearsonFilter
    cost: CostModel
    arrays: WalkArrays
    rest: Floats
    filters: Mapping[int, list[Filter]]
    parallel_calls: ParallelCalls

    def kept(self, progress: Progress) -> dict[int, Ints]:
        """Positions of the samples kept, for each node where a filter applies."""
        instance_of("progress", progress, Progress)
        last = {execution.unit.name: execution for execution in progress.executed}
        kept = {}
        for node, filters in self.filters.items():
            chosen: Ints | None = None
            for one in filters:
                if one.upstream in last:
                    near = self._near(one, self._value(last[one.upstream], one.attribute))
                    both = near if chosen is None else np.intersect1d(chosen, near)
                    if both.size >= self.config.minimum:
                        chosen = both
            if chosen is not None:
                kept[node] = chosen
        return kept

    @override
    def remaining(self, progress: Progress) -> Distribution:
        """Seconds to the end by random walks that draw from the samples kept."""
        config = self.config
        kept = self.kept(progress)
        near = self.arrays.keeping(kept)
        rng = np.random.default_rng(config.seed)
        # Filters are for what comes: a unit that has finished only says what follows it.
        begins = self.arrays if progress.current is None else near
        total, at = begins.first_draws(progress, self.parallel_calls).draw(rng, config.walks)
        ahead = np.zeros((config.walks, len(self.arrays.nodes)), dtype=bool)  # filters that hold
        ahead[:, list(kept)] = True
        if progress.current is not None:
            ahead[:, self.arrays.node(progress.current)] = False
        walking = np.flatnonzero(at)
        for _ in range(MAX_UNITS):
            filtered = ahead[walking].any(axis=1)
            plain = walking[~filtered]
            total[plain] += self.rest[at[plain], plain]
            walking = walking[filtered]
            if not walking.size:
                break
            first_visit = ahead[walking, at[walking]]
            ahead[walking, at[walking]] = False
            near.step(total, at, walking[first_visit], rng)
            self.arrays.step(total, at, walking[~first_visit], rng)
            walking = walking[at[walking] != 0]
        check_over(walking, config.walks, MAX_UNITS)
        return Distribution(total)

    def _near(self, one: Filter, value: float) -> Ints:
        """The share of the samples with the nearest upstream values, ties included."""
        distance = np.abs(one.values - value)  # NaN sorts last and compares false
        share = -(-np.count_nonzero(~np.isnan(distance)) // self.config.buckets)
        return np.flatnonzero(distance <= np.partition(distance, share - 1)[share - 1])

    def _value(self, execution: Execution, attribute: str) -> float:
        if attribute == "seconds":
            return self.cost.seconds(execution)
        return float(getattr(execution, attribute))


def _last_before(columns: RunColumns, unit: int) -> Ints:
    """`[n]` the last execution of `unit` before each execution in its run; -1 for none."""
    at = np.where(columns.unit == unit, np.arange(columns.unit.size), -1)
    last = np.append(-1, np.maximum.accumulate(at)[:-1])
    return np.where(last >= columns.starts[columns.run], last, -1)


def _pearson(x: Floats, y: Floats) -> Floats:
    """Absolute correlations of the columns of `[n, p]` and `[n, q]`; 0 where one is constant."""
    return np.abs(_standardised(x).T @ _standardised(y)) / x.shape[0]


def _standardised(x: Floats) -> Floats:
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    constant = deviation <= 1e-9 * np.abs(mean)  # up to rounding
    return np.where(constant, 0.0, x - mean) / np.where(constant, 1.0, deviation)
