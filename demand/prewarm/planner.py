"""Start times from a threshold on the probability of being in time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from typing_extensions import override

from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.prewarm.base import Prewarmer, Start, Successor, check_warm_seconds, fitting
from demand.seconds import one_number


@final
@dataclass(frozen=True)
class PrewarmPlanner(Prewarmer):
    """The prewarming of Hermes (arXiv 2506.14851): solve p_s * P(t_c > t_s + t_p) = K for t_s.

    p_s is the probability that the unit downstream is taken, t_c the time at which the current
    unit completes, t_p the duration of the warm-up, t_s its start. If p_s < K it never starts;
    else it starts as late as K lets it, so that it idles as little as possible.

    With samples the left side is a falling staircase and equality has no solution as a rule. We
    take the latest t_s at which P(t_c >= t_s + t_p) >= K / p_s, a warm-up that ends just as the
    current unit does being in time: t_s = r - t_p, where r is the least sample with
    P(t_c > r) < K / p_s. If even t_s = 0 is too late for that, it starts at once and hides a part
    of the warm-up.

    A larger K starts earlier, or never: it asks for more certainty of being in time (the artifact's
    threshold works the other way, `ArtifactPrewarm`). Of two successors the likelier starts
    later, being certain enough for longer: the rule bounds a probability and weighs no cost, which
    `CostAwarePlanner` does.

    A plan made when the unit starts is to be kept. To plan anew at every instant, on the condition
    that the unit still runs, is another rule: it puts the start off as long as P(t_c > t_s + t_p)
    stays above K / p_s, which is for ever if t_c is memoryless.

    Args:
        threshold: K (0.5 in the paper).

    Raises:
        DemandError: a threshold outside (0, 1).
    """

    threshold: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", one_number("threshold", self.threshold))
        if not 0.0 < self.threshold < 1.0:
            raise DemandError(
                f"threshold is {self.threshold}; expected 0 < K < 1, such as 0.5: a probability "
                "that a warm-up is wanted and in time"
            )

    def start_seconds(
        self, remaining: Distribution, probability: float, warm_seconds: float
    ) -> float | None:
        """t_s, the start of the warm-up in seconds from now; `None` for never.

        Raises:
            DemandError: a probability outside [0, 1], or a warm-up that is negative or not finite.
        """
        warm_seconds = check_warm_seconds(warm_seconds)
        if not 0.0 <= probability <= 1.0:
            raise DemandError(f"probability is {probability}; expected 0 to 1")
        if probability < self.threshold:
            return None
        # P(t_c > r) < K / p_s: the first sample by which more than 1 - K / p_s are over.
        values, survival = remaining.values, 1.0 - remaining.weights.cumsum()
        late = survival < self.threshold / probability - 1e-12
        return max(0.0, float(values[late.argmax()]) - warm_seconds)

    @override
    def plan(
        self, remaining: Distribution, successors: Sequence[Successor], capacity: float
    ) -> list[Start]:
        """Start every successor likely enough; where capacity runs short, the likelier ones."""
        starts = []
        for successor in sorted(successors, key=_likelier_first):
            seconds = self.start_seconds(remaining, successor.probability, successor.warm_seconds)
            if seconds is not None:
                starts.append((Start(successor.unit, seconds), successor))
        chosen = [start for start, _ in fitting(starts, capacity)]
        return sorted(chosen, key=lambda start: start.seconds)


def _likelier_first(successor: Successor) -> float:
    return -successor.probability
