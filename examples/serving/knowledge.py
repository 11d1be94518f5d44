"""What is known of the demand of applications: graphs learnt from a training stream."""

from collections.abc import Mapping, Sequence
from typing import Any

from serving.applications import Call

from demand import (
    CostModel,
    CurrentUnit,
    DemandEstimator,
    Distribution,
    Execution,
    PDGraph,
    Policy,
    Progress,
    Unit,
)


class Knowledge:
    """Answers what an application still needs, from graphs that learn nothing while it is asked.

    Seconds are counted by tokens at fixed rates, and not measured: what is served next then does
    not depend on how busy the machine happened to be. Of an application without a run nothing is
    known but what it was served, as `DemandEstimator` has it.

    Args:
        runs: of the training stream, by application.
        cost: seconds of a token computed, and of one written.
    """

    def __init__(self, runs: Mapping[str, Sequence[Sequence[Execution]]], cost: CostModel) -> None:
        self.cost, self.runs = cost, runs
        self.graphs = {name: PDGraph.fit(of, name=name, cost=cost) for name, of in runs.items()}
        self._ask = DemandEstimator(self.graphs, CurrentUnit(), cost=cost)
        self._answers: dict[Any, Distribution] = {}
        self._tables: dict[Any, Any] = {}

    @classmethod
    def of_record(cls, record: Mapping[str, Sequence], cost: CostModel) -> "Knowledge":
        """The same from what `record` gave."""
        runs = {
            name: [[Execution(Unit(unit, "llm"), *tokens) for unit, *tokens in run] for run in of]
            for name, of in record.items()
        }
        return cls(runs, cost)

    def record(self) -> dict[str, list]:
        """The training stream as JSON keeps it: of each execution the unit and its tokens."""
        return {
            name: [[[e.unit.name, e.input_tokens, e.output_tokens] for e in run] for run in of]
            for name, of in self.runs.items()
        }

    def on_arrival(self, application: str) -> Distribution:
        """Seconds that a run of an application needs."""
        return self._remaining(application, Progress())

    def remaining(
        self, application: str, executed: tuple[Execution, ...], upcoming: Call
    ) -> Distribution:
        """Seconds that a run still needs which has executed units, and comes to a call next."""
        return self._remaining(application, Progress(executed, upcoming.unit))

    def table(self, policy: Policy, distribution: Distribution) -> Any:
        """What a policy computes once for a distribution that was given here."""
        key = policy, id(distribution)  # which stays in `_answers`
        if key not in self._tables:
            self._tables[key] = policy.table(distribution)
        return self._tables[key]

    def _remaining(self, application: str, progress: Progress) -> Distribution:
        key = application, progress
        if key not in self._answers:
            self._answers[key] = self._ask(application, progress)
        return self._answers[key]
