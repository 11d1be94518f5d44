"""Arms measured on the same things: a table with paired intervals, a figure, a JSON file.

The packages do not import each other, so this file stands in each of them, the same but for the
error; `tests/test_comparison.py` holds the copies together.
"""

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsity.errors import SparsityError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESAMPLES = 2000


class Interval(NamedTuple):
    """A mean, with the ends of its 95 % bootstrap interval."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.estimate):
            return "-"
        return f"{self.estimate:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True, eq=False)
class Comparison(Mapping[str, Mapping[str, Interval]]):
    """What each arm measured, on the same units; ``result["LegoLink(k=16)"]["accuracy"]``.

    A unit is a problem, a text or a seed. Intervals are percentile bootstraps over units. The units
    drawn are the same for all arms and metrics, so that what two arms share cancels in
    `difference`.

    Args:
        measured: by arm, then by metric, one number a unit, fp64 `[units]`; the first arm is the
            reference.
        unit: what the numbers are of, in the plural: "problems".
        higher_is_better: the metrics of which more is better; of all others less is.
        settings: whatever else belongs to the record: model, versions, seed.
        seed: of the bootstrap.
        drawn: the two metrics that `figure` draws if none are named; by default the first two.
    """

    measured: dict[str, dict[str, NDArray[np.float64]]]
    unit: str
    higher_is_better: frozenset[str] = frozenset()
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    drawn: tuple[str, str] | None = None

    def __getitem__(self, arm: str) -> dict[str, Interval]:
        if arm not in self.measured:
            raise SparsityError(f"there is no arm {arm!r}; there are {', '.join(self.measured)}")
        return {metric: self._interval(v) for metric, v in self.measured[arm].items()}

    def __contains__(self, arm: object) -> bool:
        return arm in self.measured

    def __iter__(self) -> Iterator[str]:
        return iter(self.measured)

    def __len__(self) -> int:
        return len(self.measured)

    @property
    def reference(self) -> str:
        """Name of the arm the others are held against."""
        return next(iter(self.measured))

    @property
    def units(self) -> int:
        """How many problems, texts or seeds every arm was measured on."""
        return len(next(iter(self.measured[self.reference].values())))

    def difference(self, arm: str, metric: str, of: str | None = None) -> Interval:
        """Mean of (arm - other) over units, paired, with its interval.

        Args:
            arm: name of the arm.
            metric: which of its numbers.
            of: the other arm; the reference by default.

        Raises:
            SparsityError: an arm or a metric that was not measured.
        """
        sides = []
        for name in (arm, self.reference if of is None else of):
            if name not in self.measured or metric not in self.measured[name]:
                raise SparsityError(
                    f"no {metric!r} of {name!r}: arms are {', '.join(self.measured)}, metrics "
                    f"{', '.join(self.measured[self.reference])}"
                )
            sides.append(self.measured[name][metric])
        return self._interval(sides[0] - sides[1])

    def loss(self, arm: str, metric: str, of: str | None = None) -> Interval:
        """How much worse an arm is than the other, paired: positive where it is worse.

        Raises:
            SparsityError: as `difference`.
        """
        found = self.difference(arm, metric, of)
        if metric not in self.higher_is_better:
            return found
        return Interval(*(0.0 - value for value in (found.estimate, found.high, found.low)))

    @cached_property
    def _draws(self) -> NDArray[np.int64]:
        """Units drawn for each resample, `[RESAMPLES, units]`: the same for all intervals."""
        size = self.units
        return np.random.default_rng(self.seed).integers(size, size=(RESAMPLES, size))

    def _interval(self, values: NDArray[np.float64]) -> Interval:
        low, high = np.quantile(values[self._draws].mean(axis=1), [0.025, 0.975])
        return Interval(float(values.mean()), float(low), float(high))

    @property
    def table(self) -> list[dict[str, Any]]:
        """A row an arm: its name, and for each metric the mean and the interval's ends."""
        rows = []
        for arm in self:
            row: dict[str, Any] = {"arm": arm}
            for metric, interval in self[arm].items():
                row[metric] = interval.estimate
                row[f"{metric}_interval"] = [interval.low, interval.high]
            rows.append(row)
        return rows

    def _cells(self) -> list[list[str]]:
        metrics = list(self.measured[self.reference])
        rows = [["arm", *(m.replace("_", " ") for m in metrics)]]
        for arm in self:
            found = self[arm]
            rows.append([arm, *(str(found[m]) for m in metrics)])
        return rows

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        lines = [
            "  ".join([name.ljust(widths[0]), *map(str.rjust, rest, widths[1:])])
            for name, *rest in cells
        ]
        return "\n".join([*lines, self._caption])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head, *rows = self._cells()
        lines = ["<tr>" + "".join(f"<th>{escape(c)}</th>" for c in head) + "</tr>"]
        lines += ["<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows]
        return f"<table><caption>{escape(self._caption)}</caption>{''.join(lines)}</table>"

    @property
    def _caption(self) -> str:
        return f"{self.units} {self.unit}, 95 % intervals of the mean"

    def figure(
        self, x: str | None = None, y: str | None = None, ax: "Axes | None" = None
    ) -> "Axes":
        """One metric against another, a point an arm, with the interval of `y`.

        Args:
            x: name of a metric; the first of `drawn` by default.
            y: name of another; the second of `drawn` by default.
            ax: axes to draw into; those of a new figure by default, which is ``axes.figure``.

        Raises:
            SparsityError: matplotlib is not installed, or a metric that was not measured.
        """
        if ax is None:
            try:
                from matplotlib.figure import Figure
            except ImportError as error:
                raise SparsityError(
                    'a picture needs matplotlib: pip install "picache[plots]"'
                ) from error
            ax = Figure(figsize=(6.4, 4.4), layout="constrained").add_subplot()
        first, *others = self.measured[self.reference]
        across, up = self.drawn or (first, others[0] if others else first)
        x, y = x or across, y or up
        for metric in (x, y):
            if metric not in self.measured[self.reference]:
                known = ", ".join(self.measured[self.reference])
                raise SparsityError(f"no metric {metric!r}; there are {known}")
        for arm in self:
            found = self[arm]
            mean, low, high = found[y]
            ax.errorbar(found[x].estimate, mean, [[mean - low], [high - mean]], fmt="o", capsize=3)
            ax.annotate(
                arm,
                (found[x].estimate, mean),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=8,
            )
        ax.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "))
        return ax

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The table, the settings and every number as JSON; also written to `path`, if given.

        Raises:
            SparsityError: a path that is a folder, or in a folder that is missing.
        """
        numbers = {
            arm: {m: v.tolist() for m, v in found.items()} for arm, found in self.measured.items()
        }
        record = {"settings": self.settings, "table": self.table, "values": numbers}
        text = json.dumps(_finite(record), indent=1)
        if path is not None:
            target = Path(path)
            if target.is_dir() or not target.parent.is_dir():
                raise SparsityError(
                    f"path is {str(target)!r}; expected a file, in a folder that there is"
                )
            handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(text + "\n")
                os.replace(temporary, target)
            except BaseException:
                os.unlink(temporary)
                raise
        return text


def _finite(value: Any) -> Any:
    """`value` without NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
