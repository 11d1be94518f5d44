"""Backends with cold starts: what units need warm besides the engine."""

import math
from dataclasses import dataclass
from typing import Literal, final, get_args

from demand.arguments import positive_number, set_whole_numbers
from demand.errors import DemandError
from demand.prewarm.base import check_warm_seconds
from demand.seconds import one_of_seconds

Scope = Literal["job", "application", "unit"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


@final
@dataclass(frozen=True)
class Pool:
    """Instances that serve units once they are warm.

    A unit whose backend is not warm waits: for an instance that is being warmed, or for a slot
    in which to warm one. A free slot is taken first, then that of the idle instance least
    recently used (LRU). Units that wait for slots are served in the order of the policy.

    Args:
        slots: instances that are warm, or being warmed, at once.
        warm_seconds: duration of a warm-up, the cold start.
        scope: who can use a warm instance: the "job" it was warmed for, any job of the
            "application", or any job at a "unit" of the same name.
        shared: whether one instance serves any number of units at once (an adapter, a model
            server), or one at a time (a container). A unit's parallel calls share its instance.
        keep_seconds: how long an idle instance stays warm; 0 for never, infinity until its slot
            is needed. Instances of the scope "job" end with their job.
        footprint: what one instance occupies, for planners that weigh it.

    Raises:
        DemandError: no slots, a negative time, or an unknown scope.
    """

    slots: int
    warm_seconds: float
    scope: Scope = "unit"
    shared: bool = False
    keep_seconds: float = math.inf
    footprint: float = 1.0

    def __post_init__(self) -> None:
        set_whole_numbers(self, "slots", least=1)
        object.__setattr__(self, "warm_seconds", check_warm_seconds(self.warm_seconds))
        object.__setattr__(self, "keep_seconds", one_of_seconds("keep_seconds", self.keep_seconds))
        object.__setattr__(self, "footprint", positive_number("footprint", self.footprint))
        if not self.keep_seconds >= 0.0:
            raise DemandError(f"keep_seconds is {self.keep_seconds}; expected at least 0")
        if self.scope not in SCOPES:
            raise DemandError(f"scope is {self.scope!r}; expected one of {', '.join(SCOPES)}")

    @classmethod
    def containers(cls, slots: int, warm_seconds: float, keep_seconds: float = math.inf) -> "Pool":
        """Sandboxes with the files of one job."""
        return cls(slots, warm_seconds, "job", False, keep_seconds)

    @classmethod
    def models(cls, slots: int, warm_seconds: float, keep_seconds: float = math.inf) -> "Pool":
        """Weights on a device, a set for each unit, shared by all jobs."""
        return cls(slots, warm_seconds, "unit", True, keep_seconds)

    @classmethod
    def adapters(cls, slots: int, warm_seconds: float, keep_seconds: float = math.inf) -> "Pool":
        """LoRA adapters of an engine, one for each application, for its llm units."""
        return cls(slots, warm_seconds, "application", True, keep_seconds)

    @classmethod
    def prefixes(cls, slots: int, warm_seconds: float, keep_seconds: float = math.inf) -> "Pool":
        """KV prefixes or linked chunks of one job, loaded to the device for its llm units."""
        return cls(slots, warm_seconds, "job", True, keep_seconds)


@final
@dataclass(frozen=True)
class PoolReport:
    """What became of a pool.

    Attributes:
        uses: units that needed it.
        warm: of those, how many found an instance warm.
        late: how many found one being warmed, and waited for the rest.
        cold: how many had to have one warmed for them.
        wait_seconds: that units waited for it, over all uses.
        idle_seconds: that instances were warm and used by nobody, over all instances.
        unused: warm-ups started ahead that nobody used.
        unused_seconds: that those took, as far as they went.
    """

    uses: int
    warm: int
    late: int
    cold: int
    wait_seconds: float
    idle_seconds: float
    unused: int
    unused_seconds: float
