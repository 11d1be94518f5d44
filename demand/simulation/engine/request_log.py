"""What became of each request, as the engine notes it: when it held how much, and made tokens."""

from array import array
from typing import NamedTuple, final

import numpy as np

from demand.graph.run_columns import Ints
from demand.seconds import Floats
from demand.simulation.engine.compact import MOST, columns, move
from demand.simulation.engine.job_on_engine import Calls

NOTHING, ONE_TOKEN, DECODES = 0, 1, 2
"""What a request makes: nothing, one token in the step that follows, or one in every step."""


@final
class RequestLog:
    """Takes in the requests that are over, with their histories (`Calls.history`)."""

    def __init__(self) -> None:
        self._noted: list[float] = []  # the last of it
        self._moved = array("d")  # what was before
        self._changes = array("q")  # in each history

    def add(self, calls: Calls, step: int) -> None:
        """`calls` are over as `step` steps have been carried out."""
        job, history = calls.job, calls.history
        noted = self._noted
        noted += (job.index, job.position, calls.number, calls.count, job.requested, step)
        noted += history
        self._changes.append(len(history) // 3)
        if len(noted) > MOST:
            move(noted, self._moved)

    def arrays(self) -> "RequestArrays":
        """What was noted, in order of job, unit and call."""
        # Two triples for the request, then its history.
        triples = columns(self._noted, self._moved, 3)
        changes = np.array(self._changes)
        at = np.cumsum(changes + 2) - (changes + 2)
        names = triples[at].astype(np.int64)
        order = np.lexsort(names.T[::-1])
        at, changes = at[order], changes[order]
        job, unit, call = names[order].T
        count, requested, over = triples[at + 1].T
        first = np.cumsum(changes) - changes
        group = np.repeat(np.arange(order.size), changes)
        history = triples[np.arange(group.size) + (at + 2 - first)[group]]
        step, tokens, makes = history.astype(np.int64).T
        until = np.append(step[1:], 0)
        until[first + changes - 1] = over
        lasts = until > step  # what was undone before the next step is as if it had not been
        kept = (column[lasts] for column in (group, step, until, tokens, makes))
        return RequestArrays(job, unit, call, count.astype(np.int64), requested, Segments(*kept))


class Segments(NamedTuple):
    """Steps in which requests fared alike, in order of request and time.

    Attributes:
        group: `[m]` number of the requests.
        start: `[m]` number of the first step.
        end: `[m]` number of the step after the last.
        tokens: `[m]` whose KV each holds at the end of the first step; while it decodes one more
            at the end of each step that follows.
        makes: `[m]` `NOTHING`, `ONE_TOKEN` or `DECODES`.
    """

    group: Ints
    start: Ints
    end: Ints
    tokens: Ints
    makes: Ints


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
