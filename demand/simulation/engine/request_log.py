"""What became of each request, as the engine notes it: when it held how much, and made tokens."""

from array import array
from typing import NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from demand.graph.run_columns import Ints
from demand.seconds import Floats
from demand.simulation.engine.compact import MOST, columns, move
from demand.simulation.engine.job_on_engine import Calls


@final
class RequestLog:
    """Takes in the requests that are over, with their histories (`Calls.history`).

    A history has no more than what the rest follows from, two numbers a change. What changes when
    `step` steps have been carried out is one of:

    - `step, tokens`: it makes a token in each step from now on, and has the KV of so many at the
      end of the first. For how long follows from the tokens it has at the next change, or from when
      it is over; until that change it makes none, and keeps its KV.
    - `~step, tokens`: it computes a part of its prompt, up to so many tokens, and makes none.
    - `~step, ~tokens`: it loses its blocks, after it had so many tokens.
    """

    def __init__(self) -> None:
        # The last of them, then those before: seven numbers a request, and their histories.
        self._requests: list[float] = []
        self._moved_requests = array("d")
        self._changes: list[int] = []
        self._moved_changes = array("d")

    def add(self, calls: Calls, step: int) -> None:
        """`calls` are over as `step` steps have been carried out."""
        history, requests = calls.history, self._requests
        requests += (
            calls.job.index,
            calls.position,
            calls.number,
            calls.count,
            calls.requested,
            step,
            len(history),
        )
        self._changes += history
        if len(requests) > MOST:
            move(requests, self._moved_requests)
            move(self._changes, self._moved_changes)

    def arrays(self) -> "RequestArrays":
        """What was noted, in order of job, unit and call."""
        requests = columns(self._requests, self._moved_requests, 7)
        changes = columns(self._changes, self._moved_changes, 2).astype(np.int64)
        numbers = requests[:, -1].astype(np.int64) // 2
        at = np.cumsum(numbers) - numbers
        order = np.lexsort(requests[:, 2::-1].T)
        requests, numbers, at = requests[order], numbers[order], at[order]
        job, unit, call, count, _, over, _ = requests.astype(np.int64).T
        first = np.cumsum(numbers) - numbers
        group = np.repeat(np.arange(order.size), numbers)
        changes = changes[np.arange(group.size) + (at - first)[group]]
        step, tokens = changes.T
        segments = _segments(group, step, tokens, first + numbers - 1, over)
        return RequestArrays(job, unit, call, count, requests[:, 4], segments)


def _segments(group: Ints, step: Ints, tokens: Ints, last: Ints, over: Ints) -> "Segments":
    """Histories as segments.

    Args:
        group: `[c]` number of the requests that changed.
        step: `[c]` first number of each change.
        tokens: `[c]` second number of each change.
        last: `[g]` number of the last change of each.
        over: `[g]` steps carried out when they were over.
    """
    makes, start = step >= 0, np.where(step < 0, ~step, step)
    until, upto = np.append(start[1:], 0), np.append(np.where(tokens < 0, -tokens, tokens)[1:], 0)
    until[last] = over
    upto[last] = tokens[last] + over - start[last]  # tokens of the step that would follow
    end = np.where(makes, start + upto - tokens, until)
    changes = np.array((group, start, end, np.maximum(tokens, 0), makes))
    at = np.flatnonzero(end < until)
    pauses = np.array((group[at], end[at], until[at], upto[at] - 1, np.zeros_like(at)))
    found = np.concatenate((changes, pauses), axis=1)
    found = found[:, found[2] > found[1]]  # the rest was undone before the next step
    group, start, end, tokens, making = found[:, np.lexsort((found[1], found[0]))]
    return Segments(group, start, end, tokens, making > 0)


class Segments(NamedTuple):
    """Steps in which requests fared alike, in order of request and time.

    Attributes:
        group: `[m]` number of the requests.
        start: `[m]` number of the first step.
        end: `[m]` number of the step after the last.
        tokens: `[m]` whose KV each holds at the end of the first step; while it makes tokens one
            more at the end of each step that follows.
        makes: `[m]` whether each makes a token in every step; if not, none.
    """

    group: Ints
    start: Ints
    end: Ints
    tokens: Ints
    makes: NDArray[np.bool_]


class RequestArrays(NamedTuple):
    """Groups of requests that fared alike in every step, in order of job, unit and call.

    Attributes:
        job: `[g]` their job, by order of arrival.
        unit: `[g]` position of their unit in its run.
        call: `[g]` number of the first of them within the unit.
        requests: `[g]` how many they are.
        requested: `[g]` second at which their unit asked for them.
        segments: how they fared.
    """

    job: Ints
    unit: Ints
    call: Ints
    requests: Ints
    requested: Floats
    segments: Segments
