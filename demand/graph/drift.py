"""Has the application changed? A statistical test of its recent runs against the older ones."""

import math
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import ArrayLike

from demand.arguments import instance_of, renamed_keyword, whole_number
from demand.errors import DemandError
from demand.graph.pdgraph import PDGraph
from demand.html_table import cell, html_table
from demand.seconds import Floats, as_numbers
from demand.units import ParallelCalls, check_parallel_calls


def kolmogorov_smirnov(first: ArrayLike, second: ArrayLike) -> tuple[float, float]:
    """Two-sample Kolmogorov-Smirnov test: `(statistic, p)`.

    The statistic is the largest distance between the two empirical CDFs; p is the chance of one
    as large for samples of one continuous distribution, by Kolmogorov's limit with the
    small-sample correction of Stephens (1970). Ties make it conservative.

    Args:
        first: `[m]` independent samples.
        second: `[n]` independent samples.

    Raises:
        DemandError: an empty sample, or a NaN.
    """
    x, y = np.sort(as_numbers("first", first)), np.sort(as_numbers("second", second))
    if not x.size or not y.size or math.isnan(x[-1]) or math.isnan(y[-1]):
        raise DemandError(
            f"the samples have {x.size} and {y.size} entries; expected at least one number each"
        )
    both = np.concatenate([x, y])
    below = np.searchsorted(x, both, "right") / x.size - np.searchsorted(y, both, "right") / y.size
    statistic = float(np.abs(below).max())
    root = math.sqrt(x.size * y.size / (x.size + y.size))
    scaled = (root + 0.12 + 0.11 / root) * statistic
    if scaled < 0.3:  # where the series converges slowly and p is 1 to five digits
        return statistic, 1.0
    terms = (2 * (-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 30))
    return statistic, min(max(math.fsum(terms), 0.0), 1.0)


@dataclass(frozen=True)
class DriftTest:
    """One comparison of recent runs with older ones.

    Attributes:
        what: "run" for total seconds of a run, or the name of a unit for a run's seconds in it.
        older_mean: mean seconds of the older runs.
        recent_mean: mean seconds of the recent runs.
        statistic: Kolmogorov-Smirnov statistic, the largest distance of the two empirical CDFs.
        p: chance of such a distance if nothing changed.
        drifted: whether p is below the false-alarm rate shared among all tests (Holm).
    """

    what: str
    older_mean: float
    recent_mean: float
    statistic: float
    p: float
    drifted: bool


@final
@dataclass(frozen=True)
class DriftReport:
    """What changed between the older and the recent runs of a graph.

    Attributes:
        older: number of older runs.
        recent: number of recent runs.
        false_alarm_rate: chance that anything is said to have drifted though nothing has.
        tests: of the whole run first, then of each unit.
    """

    older: int
    recent: int
    false_alarm_rate: float
    tests: tuple[DriftTest, ...]

    @property
    def drifted(self) -> tuple[str, ...]:
        """What has changed: "run", names of units; empty if nothing has."""
        return tuple(test.what for test in self.tests if test.drifted)

    def __str__(self) -> str:
        width = max(len(test.what) for test in self.tests)
        rows = [
            f"{t.what:<{width}}{t.older_mean:>12.4g}{t.recent_mean:>12.4g}{t.statistic:>9.3f}"
            f"{t.p:>11.2g}  {'drifted' if t.drifted else ''}".rstrip()
            for t in self.tests
        ]
        head = f"{'':<{width}}{'older s':>12}{'recent s':>12}{'KS':>9}{'p':>11}"
        return "\n".join([self._title, head, *rows])

    def _repr_html_(self) -> str:
        rows = [
            [t.what, *map(cell, (t.older_mean, t.recent_mean, t.statistic, t.p))]
            for t in self.tests
        ]
        found = f"drifted: {', '.join(self.drifted) or 'nothing'}"
        head = ["", "older s", "recent s", "KS", "p"]
        return html_table(f"{self._title}; {found}", [head, *rows])

    @property
    def _title(self) -> str:
        return (
            f"{self.recent} recent runs against {self.older} older ones, "
            f"false-alarm rate {self.false_alarm_rate:g}"
        )


@renamed_keyword("demand", "parallel_calls")
def drift(
    graph: PDGraph,
    recent: int = 100,
    *,
    false_alarm_rate: float = 0.01,
    parallel_calls: ParallelCalls = "sum",
) -> DriftReport:
    """Compare the `recent` newest runs that a graph remembers with all older ones.

    Two-sample Kolmogorov-Smirnov tests, one for the total seconds of a run and one for its seconds
    in each unit (0 where the unit did not run). Each run gives one number to each test, so that
    samples are independent if runs are. The rate holds for all tests of one call together (Holm's
    method). Whoever calls this after every run should divide the rate by the number of calls, or
    call it once every `recent` runs.

    Args:
        graph: with enough runs in its window.
        recent: newest runs that are compared with the rest.
        false_alarm_rate: chance of any alarm where nothing has changed.
        parallel_calls: whether parallel calls count by their "sum" or by the longest of them.

    Raises:
        DemandError: no older runs or no recent ones, or a rate outside (0, 1).
    """
    check_parallel_calls(parallel_calls)
    columns = instance_of("graph", graph, PDGraph).columns()
    recent = whole_number("recent", recent)
    older = len(graph.runs) - recent
    if older < 1 or recent < 1:
        raise DemandError(
            f"recent is {recent} of {len(graph.runs)} remembered runs; expected at least one on "
            "either side: observe more runs, or compare fewer"
        )
    if not 0.0 < false_alarm_rate < 1.0:
        raise DemandError(f"false_alarm_rate is {false_alarm_rate}; expected 0 < rate < 1")
    names = ["run", *(unit.name for unit in columns.units)]
    table = np.column_stack(
        [columns.run_seconds(parallel_calls), columns.unit_seconds(parallel_calls)]
    )
    pairs = [kolmogorov_smirnov(column[:older], column[older:]) for column in table.T]
    alarms = _holm(np.array([p for _, p in pairs]), false_alarm_rate)
    means = table[:older].mean(axis=0), table[older:].mean(axis=0)
    tests = tuple(
        DriftTest(name, float(before), float(after), statistic, p, bool(alarm))
        for name, before, after, (statistic, p), alarm in zip(
            names, *means, pairs, alarms, strict=True
        )
    )
    return DriftReport(older, recent, false_alarm_rate, tests)


def _holm(p: Floats, rate: float) -> np.ndarray:
    """Which null hypotheses are rejected at a family-wise error rate (Holm 1979)."""
    order = np.argsort(p)
    passed = np.cumprod(p[order] <= rate / np.arange(p.size, 0, -1)).astype(bool)
    alarms = np.empty(p.size, dtype=bool)
    alarms[order] = passed
    return alarms
