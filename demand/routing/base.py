"""What every router answers to, and what it sees of units and engines."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

from demand.policies.job import Job
from demand.units import Execution


@final
@dataclass(slots=True, eq=False)
class ReadyUnit:
    """An llm unit that is ready to be served: its calls go to one engine, all of them.

    Attributes:
        job: whose unit it is; `job.distribution` and `job.age` say what is known of its demand.
        execution: the unit, with its calls. What they will produce only an oracle may read.
        now: second at which it is ready.
        requests: calls of it.
        prompt_tokens: of all calls, those included that an engine may have KV of.
        last: number of the engine that served the last llm unit of the run; `None` for the first.
    """

    job: Job
    execution: Execution
    now: float
    requests: int
    prompt_tokens: int
    last: int | None


class SeenEngine(Protocol):
    """An engine as it is at the second at which a router has to choose.

    All is exact and up to date: routers of real engines know less, and later. A step under way
    counts as begun and not as ended.
    """

    @property
    def number(self) -> int:
        """From 0 on."""

    @property
    def requests(self) -> int:
        """Requests that were routed here and are not over."""

    @property
    def waiting(self) -> int:
        """Of those, requests that hold no KV on the device."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of their prompts that have never been computed or found."""

    @property
    def kv_share(self) -> float:
        """Share of the blocks that requests hold; what calls have left is free (`Retention`)."""

    def found_tokens(self, unit: ReadyUnit) -> int:
        """Prompt tokens of `unit`, over its calls, that would be found here if it began now."""


class Router(ABC):
    """Chooses an engine for each llm unit of a job, when the unit is ready.

    A router is configuration only: a frozen dataclass that is shared freely. What it remembers from
    one choice to the next is `new_state`, made once per simulation and handed to it each time.
    Whether a job stays with an engine is up to the router; a unit does.

        @dataclass(frozen=True)
        class RoundRobin(Router):
            def new_state(self, engines):
                return itertools.cycle(range(engines))

            def choose(self, unit, engines, state):
                return next(state)
    """

    def new_state(self, engines: int) -> Any:
        """What is remembered in a simulation of so many engines; `None` for nothing."""
        return None

    @abstractmethod
    def choose(self, unit: ReadyUnit, engines: Sequence[SeenEngine], state: Any) -> int:
        """Number of the engine that is to serve `unit`.

        Args:
            unit: what is ready.
            engines: all of them, by number.
            state: of `new_state`.
        """

    def departed(self, job: Job, state: Any) -> None:  # noqa: B027
        """Told of every job as it finishes."""
