"""Are the predicted distributions right? PIT, CRPS and coverage on held-out runs."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np

from demand.arguments import (
    check_callable,
    check_instance,
    instance_of,
    renamed_keyword,
    warn_renamed_method,
    whole_number,
)
from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.html_table import cell, html_table
from demand.plotting import axes
from demand.refine.predictor import PendingCall, Predictor
from demand.seconds import Floats, one_of_seconds
from demand.stages import between_stages, progress_after, seconds_after, stage_ahead
from demand.units import CostModel, Execution, ParallelCalls, Progress, check_run, check_waits

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEVELS = (0.5, 0.8, 0.95)
"""Of the central intervals whose coverage is reported."""


def crps(predicted: Distribution, observed: float) -> float:
    """Continuous ranked probability score in seconds, smaller is better.

    E|X - y| - E|X - X'| / 2 with X, X' from the prediction and y the observation, which is the
    integral of (F(x) - 1[x >= y])^2 (Gneiting and Raftery 2007); the absolute error for a point
    mass. Exact for atoms, O(n).
    """
    observed = _check_observed(observed)
    x, w = predicted.values, predicted.weights
    below = np.cumsum(w)
    pairs = 2.0 * (below[:-1] * (1.0 - below[:-1])) @ np.diff(x)
    return float(w @ np.abs(x - observed) - pairs / 2.0)


def pit(predicted: Distribution, observed: float, uniform: float) -> float:
    """Probability integral transform, randomised over an atom: F(y-) + u P(X = y).

    Uniform over [0, 1] if predictions are right and `uniform` is.
    """
    observed = _check_observed(observed)
    x, w = predicted.values, predicted.weights
    below = float(w[x < observed].sum())
    return min(below + uniform * float(w[x == observed].sum()), 1.0)


def _check_observed(observed: float) -> float:
    seconds = one_of_seconds("observed", observed)
    if not math.isfinite(seconds):
        raise DemandError(f"observed is {seconds}; expected the finite seconds that were seen")
    return seconds


@dataclass(frozen=True, eq=False)
class CalibrationPoint:
    """Scores at one progress point.

    Attributes:
        after_units: finished units at which was asked; `None` for all points together.
        runs: held-out runs that were not over by then.
        observed: mean seconds that remained.
        predicted: mean of the predicted means.
        crps: mean score in seconds.
        coverage: share of runs inside the central interval of each of `LEVELS`.
        pits: `[runs]` randomised PIT values.
    """

    after_units: int | None
    runs: int
    observed: float
    predicted: float
    crps: float
    coverage: tuple[float, ...]
    pits: Floats


@final
@dataclass(frozen=True, eq=False)
class CalibrationReport:
    """How well a refinement predicts the remaining seconds of held-out runs.

    Attributes:
        points: scores at each progress point asked for that any run reached.
        overall: over all points, each question counting alike.
    """

    points: tuple[CalibrationPoint, ...]
    overall: CalibrationPoint

    def __str__(self) -> str:
        head = "after units   runs  remaining s  predicted s    CRPS s" + "".join(
            f"{f'in {level:.0%}':>8}" for level in LEVELS
        )
        rows = [
            f"{'all' if p.after_units is None else p.after_units:>11}{p.runs:>7}"
            f"{p.observed:>13.4g}{p.predicted:>13.4g}{p.crps:>10.4g}"
            + "".join(f"{share:>8.0%}" for share in p.coverage)
            for p in (*self.points, self.overall)
        ]
        return "\n".join([head, *rows])

    def _repr_html_(self) -> str:
        head = ["after units", "runs", "remaining s", "predicted s", "CRPS s"]
        rows = [
            ["all" if p.after_units is None else cell(p.after_units), cell(p.runs)]
            + [cell(seconds) for seconds in (p.observed, p.predicted, p.crps)]
            + [f"{share:.0%}" for share in p.coverage]
            for p in (*self.points, self.overall)
        ]
        return html_table(
            "held-out runs", [[*head, *(f"in {level:.0%}" for level in LEVELS)], *rows]
        )

    def pit_histogram(self, bins: int = 10) -> Floats:
        """`[bins]` share of the PIT values in each bin, times `bins`: 1 where calibrated.

        A hump: predictions too wide; a valley: too narrow; a slope: too long or too short.
        """
        counts, _ = np.histogram(self.overall.pits, bins, (0.0, 1.0))
        return counts * bins / self.overall.pits.size

    def figure(self, ax: "Axes | None" = None, bins: int = 10) -> "Axes":
        """Histogram of the PIT values, beside what calibrated predictions would show.

        Raises:
            DemandError: matplotlib is not installed.
        """
        ax = axes(ax, (4.0, 3.0))
        edges = np.linspace(0.0, 1.0, bins + 1)
        ax.stairs(self.pit_histogram(bins), edges, fill=True, alpha=0.6)
        ax.axhline(1.0, color="black", linewidth=1.0, linestyle="--")
        ax.set(xlabel="PIT of the remaining seconds", ylabel="density", xlim=(0.0, 1.0))
        return ax

    def draw(self, ax: "Axes | None" = None, bins: int = 10) -> "Axes":
        """The old name of `figure`."""
        warn_renamed_method("CalibrationReport", "draw", "figure")
        return self.figure(ax, bins)


@renamed_keyword("predict", "remaining")
@renamed_keyword("demand", "parallel_calls")
def calibrate(
    remaining: Callable[[Progress], Distribution],
    runs: Sequence[Sequence[Execution]],
    after_units: Sequence[int] = (0, 1, 2, 4, 8, 16, 32, 64),
    *,
    cost: CostModel | None = None,
    parallel_calls: ParallelCalls = "sum",
    seed: int = 0,
) -> CalibrationReport:
    """Ask for the remaining seconds of held-out runs, and compare with what they took.

    Args:
        remaining: gives these seconds, from a progress, such as `refinement.fit(graph).remaining`
            or a `DemandEstimator` with the application filled in; it must not have seen `runs`.
        runs: finished runs.
        after_units: progress points: finished units at which to ask. A run counts where it is
            not over by then, as a scheduler asks only about what is there; so an atom at 0 of
            the prediction does not count either. Units that can go side by side are over in the
            order in which the run has them; the critical path is asked where nothing of the stage
            ahead is over alone, since elsewhere it does not say how far the others have come.
        cost: seconds of an execution, as in the graph.
        parallel_calls: how parallel calls count, as in the refinement.
        seed: of the randomised PIT.

    Raises:
        DemandError: no run reaches any of the points, or a unit the graph does not know.
    """
    check_callable("remaining", remaining, "a function such as refinement.fit(graph).remaining")

    def ask(number: int, units: int) -> Distribution | None:
        if parallel_calls == "critical_path" and not between_stages(checked[number], units):
            return None
        return remaining(progress_after(checked[number], units, cost))

    checked = _checked(runs)
    return _report(ask, checked, after_units, cost, parallel_calls, seed)


def calibrate_calls(
    predictor: Predictor,
    application: str,
    runs: Sequence[Sequence[Execution]],
    after_units: Sequence[int] = (0, 1, 2, 4, 8, 16, 32, 64),
    *,
    prompts: Sequence[Sequence[str]] | None = None,
    cost: CostModel | None = None,
    parallel_calls: ParallelCalls = "sum",
    seed: int = 0,
) -> CalibrationReport:
    """Ask a predictor before calls of held-out runs, and compare with what the runs still took.

    As `calibrate`, at those progress points where the stage ahead is of calls to a model alone, and
    nothing of it is over.

    Args:
        predictor: what predicts, such as `refinement.fit(graph)` or a `DemandEstimator`; it must
            not have seen `runs`.
        application: whose runs they are.
        runs: finished runs.
        after_units: finished units at which to ask.
        prompts: of each unit of each run, its prompt ("" for a unit that has none); `None` where
            only their lengths are known.
        cost: seconds of an execution, as in the graph.
        parallel_calls: how parallel calls count, as in the predictor.
        seed: of the randomised PIT.

    Raises:
        DemandError: no run makes a call at any of the points, other prompts than units, or what is
            no predictor.
    """
    expected = "an object with a method predict(call), such as a DemandEstimator"
    check_instance("predictor", predictor, Predictor, expected)
    checked = _checked(runs)
    if prompts is not None and [len(run) for run in checked] != [len(texts) for texts in prompts]:
        raise DemandError("prompts are not as many as units; give one for each unit of each run")

    def ask(number: int, units: int) -> Distribution | None:
        run = checked[number]
        ahead = stage_ahead(run, units, cost)
        if ahead is None or ahead.unit.kind != "llm":
            return None
        prompt = None if prompts is None else prompts[number][units]
        return predictor.predict(PendingCall.of_run(application, run, units, prompt, cost))

    return _report(ask, checked, after_units, cost, parallel_calls, seed)


def _checked(runs: Sequence[Sequence[Execution]]) -> list[tuple[Execution, ...]]:
    if not isinstance(runs, Iterable):
        raise DemandError(f"runs is {runs!r:.200}; expected a list of runs, each of executions")
    checked = [check_run(f"runs[{at}]", run) for at, run in enumerate(runs)]
    for at, run in enumerate(checked):
        check_waits(f"runs[{at}]", run)
    return checked


def _report(
    ask: Callable[[int, int], Distribution | None],
    runs: Sequence[tuple[Execution, ...]],
    after_units: Sequence[int],
    cost: CostModel | None,
    parallel_calls: ParallelCalls,
    seed: int,
) -> CalibrationReport:
    """Scores of what `ask` says of a run, by its number, after some units; `None` is not asked."""
    after_units = [whole_number("after_units", units, least=0) for units in after_units]
    cost = CostModel() if cost is None else instance_of("cost", cost, CostModel)
    rng = np.random.default_rng(whole_number("seed", seed, least=0))
    asked: list[tuple[int, list[tuple[float, ...]]]] = []
    for units in after_units:
        rows = []
        for number, run in enumerate(runs):
            if len(run) > units and (told := ask(number, units)) is not None:
                left = seconds_after(run, units, cost, parallel_calls)
                predicted = instance_of("what remaining says", told, Distribution).condition(0.0)
                rows.append(_scores(predicted, left, rng.random()))
        if rows:
            asked.append((units, rows))
    if not asked:
        raise DemandError(
            f"none of {len(runs)} runs has more units than {list(after_units)}, or can be asked "
            "there: a predictor before calls to a model, and it and the critical path between "
            "stages; ask at other points, or give longer runs"
        )
    everything = [row for _, rows in asked for row in rows]
    return CalibrationReport(
        tuple(_point(units, rows) for units, rows in asked), _point(None, everything)
    )


def _scores(predicted: Distribution, left: float, uniform: float) -> tuple[float, ...]:
    inside = [
        predicted.quantile((1 - level) / 2) <= left <= predicted.quantile((1 + level) / 2)
        for level in LEVELS
    ]
    mean = predicted.mean()
    return (left, mean, crps(predicted, left), *inside, pit(predicted, left, uniform))


def _point(units: int | None, rows: list[tuple[float, ...]]) -> CalibrationPoint:
    table = np.array(rows, dtype=np.float64)
    observed, predicted, score, *coverage = table[:, :-1].mean(axis=0).tolist()
    return CalibrationPoint(
        units, len(rows), observed, predicted, score, tuple(coverage), table[:, -1]
    )
