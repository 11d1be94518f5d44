"""What users of an engine measure of its requests: first tokens, times between tokens, KV held."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, final, get_args

import numpy as np
from numpy.typing import NDArray

from demand.arguments import share
from demand.errors import DemandError
from demand.graph.run_columns import Ints
from demand.html_table import cell, html_table
from demand.plotting import axes
from demand.seconds import Floats, one_of_seconds
from demand.simulation.engine.request_log import RequestArrays, RequestLog
from demand.simulation.engine.step_times import StepLog, StepTimes
from demand.simulation.engine.weighted_quantiles import weighted_quantiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Measure = Literal["ttft", "tbt"]
MEASURES: tuple[Measure, ...] = get_args(Measure)

CAPTION = "TTFT over requests, TBT over gaps between tokens, in seconds"
LEVELS = (0.5, 0.95, 0.99)
"""Quantiles of the table."""

SPREAD = 1 << 22
"""Stretches of decoding looked at together, over all requests: bounds the memory it takes."""


class Gaps(NamedTuple):
    """Times between two tokens of a request that follow each other, with what they belong to.

    Attributes:
        label: `[n]` number of the request, or of what was asked for.
        seconds: `[n]`.
        times: `[n]` how often each occurs.
    """

    label: Ints
    seconds: Floats
    times: Ints


@final
@dataclass(frozen=True, eq=False)
class ServedRequests:
    """The requests that an engine served, in order of job, unit and call; seconds throughout.

    Tokens are produced when the step ends that computes them. The time to first token (TTFT) counts
    from the second at which the unit was reached, so that a wait for a cold backend is in it. Times
    between tokens (TBT) are those between two tokens of one request, being preempted included; a
    request of one token has none. Quantiles are `np.quantile`, over requests or over all gaps.

    Args:
        log: of the requests that are over.
        steps: when each step was carried out.
        kv_seconds_per_token: of the engine.
        block_tokens: tokens in a block.
        applications: of each job, by name.
    """

    log: RequestLog
    steps: StepLog
    kv_seconds_per_token: float
    block_tokens: int
    applications: Sequence[str]

    @cached_property
    def arrays(self) -> RequestArrays:
        """How the requests fared, those that fared alike as one."""
        return self.log.arrays()

    @cached_property
    def times(self) -> StepTimes:
        """When each step was carried out."""
        return self.steps.times(self.kv_seconds_per_token)

    def __len__(self) -> int:
        return int(self.arrays.requests.sum())

    @property
    def job(self) -> Ints:
        """`[r]` the job of each, by order of arrival."""
        return self._each(self.arrays.job)

    @property
    def unit(self) -> Ints:
        """`[r]` position of its unit in the run of its job."""
        return self._each(self.arrays.unit)

    @property
    def call(self) -> Ints:
        """`[r]` its number within the unit."""
        first = np.cumsum(self.arrays.requests) - self.arrays.requests
        return np.arange(len(self)) + self._each(self.arrays.call - first)

    @property
    def requested(self) -> Floats:
        """`[r]` second at which its unit was reached."""
        return self._each(self.arrays.requested)

    @property
    def finished(self) -> Floats:
        """`[r]` second of its last token."""
        return self._each(self._last)

    @property
    def tokens(self) -> Ints:
        """`[r]` tokens produced."""
        return self._each(self._tokens)

    @property
    def ttft(self) -> Floats:
        """`[r]` seconds from the request to its first token."""
        return self._each(self._ttft)

    @property
    def tpot(self) -> Floats:
        """`[r]` mean seconds between its tokens (time per output token); NaN for one token."""
        return self._each(self._tpot)

    @property
    def kv_block_seconds(self) -> Floats:
        """`[r]` blocks of KV that it held on the device, times the seconds it held them."""
        return self._each(self._kv_block_seconds)

    def tbt(self, q: float) -> Floats:
        """`[r]` q-quantile of the times between the tokens of each; NaN for one token.

        Raises:
            DemandError: `q` is not a share.
        """
        return self._each(self._own_tbt(share("q", q)))

    def ttft_quantile(self, q: float, application: str | None = None) -> float:
        """The q-quantile of TTFT over the requests, of an application or of all; NaN for none.

        Raises:
            DemandError: `q` is not a share, or an unknown application.
        """
        q, own = share("q", q), self._of(application)
        found = self.ttft[self._each(own)]
        return float(np.quantile(found, q)) if found.size else math.nan

    def tbt_quantile(self, q: float, application: str | None = None) -> float:
        """The q-quantile of TBT over the gaps of all requests, or those of an application.

        NaN where there is no gap.

        Raises:
            DemandError: as `ttft_quantile`.
        """
        q = share("q", q)
        label, seconds, count = self._pooled_gaps
        own = label == self._code(application) if application is not None else label >= 0
        kept = np.zeros(np.count_nonzero(own), dtype=np.int64), seconds[own], count[own]
        return float(weighted_quantiles(*kept, q, 1)[0])

    def within(
        self, *, ttft: float = math.inf, tbt: float = math.inf, tpot: float = math.inf
    ) -> NDArray[np.bool_]:
        """`[r]` whether each met the bounds: its first token, all its gaps, their mean.

        A request of one token meets those of gaps.

        Raises:
            DemandError: a bound that is negative or no number.
        """
        met = self._ttft <= _bound("ttft", ttft)
        for name, value, found in (
            ("tbt", tbt, lambda: self._own_tbt(1.0)),
            ("tpot", tpot, lambda: self._tpot),
        ):
            bound = _bound(name, value)
            if bound < math.inf:
                met &= ~(found() > bound)  # NaN is not
        return self._each(met)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Applications that were served, in order."""
        return tuple(sorted(set(self.applications)))

    @cached_property
    def table(self) -> list[dict[str, Any]]:
        """A row for all and one an application: requests, tokens, quantiles, KV-seconds."""
        rows = []
        for name in (None, *self.names):
            own = self._of(name)
            count = self.arrays.requests[own]
            row: dict[str, Any] = {
                "application": "all" if name is None else name,
                "requests": int(count.sum()),
                "tokens": int((count * self._tokens[own]).sum()),
            }
            for q in LEVELS:
                row[f"p{100 * q:.0f}_ttft_seconds"] = self.ttft_quantile(q, name)
            for q in LEVELS:
                row[f"p{100 * q:.0f}_tbt_seconds"] = self.tbt_quantile(q, name)
            row["kv_block_seconds"] = float((count * self._kv_block_seconds[own]).sum())
            rows.append(row)
        return rows

    def figure(self, of: Measure = "ttft", ax: "Axes | None" = None) -> "Axes":
        """The share of requests, or of gaps, up to each second: a line an application.

        Args:
            of: "ttft", over requests, or "tbt", over the gaps between tokens.
            ax: axes to draw into; those of a new figure by default, which is ``axes.figure``.

        Raises:
            DemandError: an unknown measure, or matplotlib is not installed.
        """
        if of not in MEASURES:
            raise DemandError(f"of is {of!r}; expected one of {', '.join(MEASURES)}")
        ax = axes(ax, (6.4, 4.4))
        for code, name in enumerate(self.names):
            if of == "ttft":
                own = self._of(name)
                seconds, count = self._ttft[own], self.arrays.requests[own]
            else:
                label, seconds, count = self._pooled_gaps
                seconds, count = seconds[label == code], count[label == code]
            if count.sum():
                order = np.argsort(seconds)
                upto = np.cumsum(count[order])
                ax.step(seconds[order], upto / upto[-1], where="post", label=name)
        what = "time to first token" if of == "ttft" else "time between tokens"
        over = "requests" if of == "ttft" else "gaps between tokens"
        ax.set(xlabel=f"{what}, s", ylabel=f"share of {over}", xscale="log", ylim=(0.0, 1.02))
        if ax.lines:
            ax.legend(fontsize=8)
        return ax

    def _cells(self) -> list[list[str]]:
        cells = [[name.removesuffix("_seconds").replace("_", " ") for name in self.table[0]]]
        return cells + [[cell(value) for value in row.values()] for row in self.table]

    def _repr_html_(self) -> str:
        return html_table(CAPTION, self._cells())

    def __repr__(self) -> str:
        cells = self._cells()
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        lines = [
            "  ".join([name.ljust(widths[0]), *map(str.rjust, rest, widths[1:])])
            for name, *rest in cells
        ]
        return "\n".join([*lines, CAPTION])

    def _each(self, of_groups: Any) -> Any:
        """The numbers of groups as numbers of requests."""
        return np.repeat(of_groups, self.arrays.requests)

    def _code(self, application: str) -> int:
        if application not in self.names:
            raise DemandError(
                f"application is {application!r}; served were {', '.join(self.names)}"
            )
        return self.names.index(application)

    def _of(self, application: str | None) -> NDArray[np.bool_]:
        """`[g]` which groups are of an application."""
        if application is None:
            return np.ones(self.arrays.requests.size, dtype=bool)
        return self._codes == self._code(application)

    @cached_property
    def _codes(self) -> Ints:
        """`[g]` the position in `names` of the application of each group."""
        position = {name: code for code, name in enumerate(self.names)}
        of_jobs = np.array([position[name] for name in self.applications], dtype=np.int64)
        return of_jobs[self.arrays.job]

    @cached_property
    def _making(self) -> tuple[Ints, Ints, Ints, NDArray[np.bool_]]:
        """Of the segments that make tokens: group, first and last step, whether it is the first."""
        group, start, end, _, makes = self.arrays.segments
        group, start, last = group[makes], start[makes], end[makes] - 1
        return group, start, last, np.append(True, group[1:] != group[:-1])[: group.size]

    @cached_property
    def _ttft(self) -> Floats:
        _, start, _, first = self._making
        return self.times.end(start[first]) - self.arrays.requested

    @cached_property
    def _last(self) -> Floats:
        _, _, last, first = self._making
        return self.times.end(last[np.append(first[1:], True)[: first.size]])

    @cached_property
    def _tokens(self) -> Ints:
        group, start, last, _ = self._making
        tokens = np.zeros(self.arrays.requests.size, dtype=np.int64)
        np.add.at(tokens, group, last - start + 1)
        return tokens

    @cached_property
    def _tpot(self) -> Floats:
        took = self._last - self.arrays.requested - self._ttft
        return np.where(self._tokens > 1, took / np.maximum(self._tokens - 1, 1), np.nan)

    @cached_property
    def _links(self) -> tuple[Ints, Floats]:
        """Gaps between two segments that make tokens: group, seconds."""
        group, start, last, first = self._making
        later = np.flatnonzero(~first)
        return group[later], self.times.end(start[later]) - self.times.end(last[later - 1])

    @cached_property
    def _pieces(self) -> tuple[Ints, Floats, Ints]:
        """Runs of steps in which nothing changed: first step, seconds of a step, how many.

        A segment's gaps are the steps after its first, so that each comprises whole pieces.
        """
        _, start, last, _ = self._making
        total = int(self.times.steps.sum())
        if self.times.alike:
            firsts = np.concatenate([self.times.firsts, start + 1, last + 1])
            firsts = np.unique(firsts[firsts < total])
        else:
            firsts = np.arange(total)
        return firsts, self.times.seconds(firsts), np.diff(np.append(firsts, total))

    @cached_property
    def _ranges(self) -> tuple[Ints, Ints, Ints]:
        """Gaps within the segments: group, first piece, piece after the last."""
        group, start, last, _ = self._making
        firsts = self._pieces[0]
        several = last > start
        low, high = (np.searchsorted(firsts, step[several] + 1) for step in (start, last))
        return group[several], low, high

    @cached_property
    def _pooled_gaps(self) -> Gaps:
        """The gaps of all requests by application, each by its number in `names`."""
        _, seconds, steps = self._pieces
        group, low, high = self._ranges
        linked, between = self._links
        count = self.arrays.requests
        found = [Gaps(self._codes[linked], between, count[linked])]
        for code in range(len(self.names)):
            own = self._codes[group] == code
            served = np.zeros(steps.size + 1, dtype=np.int64)  # requests, piece by piece
            np.add.at(served, low[own], count[group[own]])
            np.add.at(served, high[own], -count[group[own]])
            times = np.cumsum(served)[:-1] * steps
            there = np.flatnonzero(times)
            found.append(Gaps(np.full(there.size, code), seconds[there], times[there]))
        return Gaps(*(np.concatenate(column) for column in zip(*found, strict=True)))

    def _own_tbt(self, q: float) -> Floats:
        """`[g]` quantile of the gaps of a request of each group."""
        groups = self.arrays.requests.size
        found = np.full(groups, np.nan)
        for first, end, (label, seconds, count) in self._own_gaps():
            found[first:end] = weighted_quantiles(label - first, seconds, count, q, end - first)
        return found

    def _own_gaps(self) -> Iterator[tuple[int, int, Gaps]]:
        """The gaps of a request of each group, some groups at a time: from which, to which."""
        _, seconds, steps = self._pieces
        group, low, high = self._ranges
        linked, between = self._links
        spread = np.zeros(self.arrays.requests.size, dtype=np.int64)
        np.add.at(spread, group, high - low)
        part = np.cumsum(spread) // SPREAD
        firsts = np.flatnonzero(np.append(True, part[1:] != part[:-1])[: part.size])
        for first, end in pairwise([*firsts.tolist(), part.size]):
            own = slice(*np.searchsorted(group, (first, end)))
            sizes = high[own] - low[own]
            piece = np.arange(sizes.sum()) + np.repeat(low[own] - (np.cumsum(sizes) - sizes), sizes)
            link = slice(*np.searchsorted(linked, (first, end)))
            ones = np.ones(link.stop - link.start, dtype=np.int64)
            yield (
                first,
                end,
                Gaps(
                    np.concatenate([np.repeat(group[own], sizes), linked[link]]),
                    np.concatenate([seconds[piece], between[link]]),
                    np.concatenate([steps[piece], ones]),
                ),
            )

    @cached_property
    def _kv_block_seconds(self) -> Floats:
        group, start, end, tokens, makes = self.arrays.segments
        size, groups = self.block_tokens, self.arrays.requests.size
        blocks = -(-tokens // size)
        until = self.times.before(end - 1) + self.times.seconds(end - 1)
        held = np.zeros(groups)
        np.add.at(held, group, blocks * (until - self.times.before(start)))
        # A request that makes tokens takes a block more whenever the last one is full.
        steps = np.where(makes, end - start, 1)
        taken = -(-(tokens + steps - 1) // size) - blocks
        segment = np.repeat(np.arange(taken.size), taken)
        nth = np.arange(segment.size) - np.repeat(np.cumsum(taken) - taken, taken)
        step = start[segment] + (blocks[segment] + nth) * size + 1 - tokens[segment]
        np.add.at(held, group[segment], until[segment] - self.times.before(step))
        return held


def _bound(name: str, value: object) -> float:
    seconds = one_of_seconds(name, value)
    if not seconds >= 0.0:
        raise DemandError(f"{name} is {value}; expected seconds of at least 0, infinity for none")
    return seconds
