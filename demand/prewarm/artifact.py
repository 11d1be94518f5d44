"""Start times as the public artifact of Hermes sets them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from typing_extensions import override

from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.prewarm.base import Prewarmer, Start, Successor, fitting
from demand.seconds import one_number, one_of_seconds


@final
@dataclass(frozen=True)
class ArtifactPrewarm(Prewarmer):
    """Start once p_s * P(t_c <= t_s + slack) reaches a threshold: the rule of Hermes' artifact.

    p_s is the probability that the unit downstream is taken, t_c the time at which the current
    unit completes, t_s the start of the warm-up.

    The equation of the paper (`PrewarmPlanner`) bounds the probability that the warm-up is in
    time; the artifact starts once the current unit is likely enough to be over within a slack, so
    that a larger threshold starts later. Its slack is a constant, 1 s for KV prefixes and 0.3 s
    for LoRA adapters.

    Departures from the artifact: the probability of the branch counts, where the artifact warms
    for the next call of the same session, which is sure to come; its bound against starting too
    late (at most 1, which never binds) is left out; the slack is the warm-up unless given.

    Args:
        threshold: 0.1 in the artifact.
        slack_seconds: `None` for the duration of the warm-up.

    Raises:
        DemandError: a threshold outside (0, 1), or a negative slack.
    """

    threshold: float = 0.1
    slack_seconds: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", one_number("threshold", self.threshold))
        if not 0.0 < self.threshold < 1.0:
            raise DemandError(f"threshold is {self.threshold}; expected 0 < threshold < 1")
        if self.slack_seconds is None:
            return
        slack = one_of_seconds("slack_seconds", self.slack_seconds)
        object.__setattr__(self, "slack_seconds", slack)
        if not slack >= 0.0:
            raise DemandError(f"slack_seconds is {slack}; expected at least 0")

    @override
    def plan(
        self, remaining: Distribution, successors: Sequence[Successor], capacity: float
    ) -> list[Start]:
        """Start each successor likely enough a slack before the quantile threshold / p_s of t_c."""
        starts = []
        for successor in sorted(successors, key=lambda s: -s.probability):
            if successor.probability >= self.threshold:
                end = remaining.quantile(min(self.threshold / successor.probability, 1.0))
                slack = successor.warm_seconds if self.slack_seconds is None else self.slack_seconds
                starts.append((Start(successor.unit, max(0.0, end - slack)), successor))
        chosen = [start for start, _ in fitting(starts, capacity)]
        return sorted(chosen, key=lambda start: start.seconds)
