"""A call that is about to be made, and who says from it what its application still needs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from demand.arguments import instance_of, set_whole_numbers
from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.seconds import one_number
from demand.stages import progress_after, stage_ahead
from demand.units import CostModel, Execution, Progress, Unit


@dataclass(frozen=True)
class PendingCall:
    """A call to a model before its first token: what is known of it, and of its run until then.

    Args:
        application: name of the application.
        unit: whose call it is; of kind "llm". Of several that go side by side their stage, where
            that is known (`of_run`); an adapter, which does not know what will follow, names the
            unit of the first call.
        input_tokens: of its prompt, per call; `None` where nobody has counted them.
        parallelism: calls made side by side. An adapter, which is given them one by one and asks at
            the first, does not know how many will follow, and says 1.
        progress: the units that its run has finished.
        prompt: the text, or the ids of its tokens; `None` where only its length is known.

    Raises:
        DemandError: a unit of another kind, tokens that are negative or not finite, fewer calls
            than one, or a progress in mid-unit.
    """

    application: str
    unit: Unit
    input_tokens: float | None = None
    parallelism: int = 1
    progress: Progress = field(default_factory=Progress)
    prompt: str | Sequence[int] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        instance_of("application of a call", self.application, str)
        if instance_of("unit of a call", self.unit, Unit).kind != "llm":
            raise DemandError(
                f"unit {self.unit.name!r} of a call is of kind {self.unit.kind!r}; expected an llm"
            )
        if self.input_tokens is not None:
            tokens = one_number("input_tokens of a call", self.input_tokens)
            if not 0.0 <= tokens < math.inf:
                raise DemandError(
                    f"input_tokens of a call are {tokens}; expected a number of at least 0, or "
                    "None if they are not known"
                )
            object.__setattr__(self, "input_tokens", tokens)
        set_whole_numbers(self, "parallelism", least=1)
        if instance_of("progress of a call", self.progress, Progress).current is not None:
            raise DemandError(
                f"the call comes in the middle of unit {self.progress.current!r}; expected a "
                "progress between units, before its first token"
            )

    @classmethod
    def of_run(
        cls,
        application: str,
        run: Sequence[Execution],
        finished: int,
        prompt: str | Sequence[int] | None = None,
        cost: CostModel | None = None,
    ) -> "PendingCall":
        """The call that `run` makes after `finished` units, told of what comes before it alone.

        Where units go side by side, that is their stage, with all its calls and the mean of their
        prompts; `cost` then gives the seconds of the stages before, by default those of the default
        cost model. `prompt` is that of its first call.

        Raises:
            DemandError: as the class, a run that has no more units than that, a stage of which
                something is over, or one in which other units go beside the calls.
        """
        if not 0 <= finished < len(run):
            raise DemandError(
                f"{finished} of the {len(run)} units of the run are finished; expected one ahead"
            )
        progress = progress_after(run, finished, cost)
        ahead = stage_ahead(run, finished, cost)
        if ahead is None:
            raise DemandError(
                f"of the stage of unit {finished} of the run something is over, and the call comes "
                f"in the middle of unit {progress.current!r}; ask where between_stages(run, "
                "finished) is true"
            )
        tokens, calls = ahead.input_tokens or None, ahead.parallelism
        return cls(application, ahead.unit, tokens, calls, progress, prompt)


@runtime_checkable
class Predictor(Protocol):
    """Who says, from a call before its first token, what its application still needs.

    Any object with this method is one, such as a model that reads the prompt (LTR, arXiv
    2408.15792; ELIS, arXiv 2505.09142). It is asked as a call is submitted: before its first token,
    and so at each call of a run anew. A `DemandEstimator` is one, too.
    """

    def predict(self, call: PendingCall) -> Distribution:
        """Distribution of the seconds its run needs from here on, `call` itself included."""
