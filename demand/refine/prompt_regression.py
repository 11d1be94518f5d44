"""A prediction by regression on the length of a prompt and on the calls before it."""

from dataclasses import astuple, dataclass
from typing import final

import numpy as np
from typing_extensions import override

from demand.arguments import instance_of, renamed_keyword
from demand.distribution.distribution import Distribution
from demand.graph.pdgraph import PDGraph
from demand.graph.run_columns import Ints, RunColumns
from demand.refine.base import Refined, Refinement
from demand.refine.features import ProgressFeatures
from demand.refine.log_ridge import LogFit, LogRidge, RidgeSettings
from demand.refine.predictor import PendingCall
from demand.refine.regression import ProgressRegression
from demand.seconds import Floats
from demand.units import ParallelCalls, Progress


@final
@dataclass(frozen=True)
class PromptRegression(RidgeSettings, Refinement):
    """Predicts, before the first token of a call, from the length of its prompt and past calls.

    Ours, after the place of the predictors of LTR (arXiv 2408.15792) and ELIS (arXiv 2505.09142),
    which are asked before a request is scheduled. They read the prompt with a model (OPT-125M ranks
    requests by output length; BGE and layers behind it say how many tokens are left); this one
    reads its length alone. The seconds that remain from a call on are regressed, by their
    logarithm, on the tokens of its prompt, its unit, how many calls are made side by side, and on
    what `ProgressRegression` knows of the run until then. Every call of every remembered run whose
    prompt tokens are known is one observation.

    An adapter says of every call that it is the only one (`PendingCall`), so that inside an engine
    what a unit of parallel calls needs is predicted too low; units of different names that go side
    by side count as one call each.

    Asked without a call (`remaining`), or about one whose prompt nobody has counted, it answers as
    `ProgressRegression`.

    Arguments and errors are those of `RidgeSettings`.
    """

    @override
    @renamed_keyword("demand", "parallel_calls")
    def fit(self, graph: PDGraph, parallel_calls: ParallelCalls = "sum") -> Refined:
        """Solve the least squares for all calls, and those of `ProgressRegression`."""
        instance_of("graph", graph, PDGraph)
        columns = graph.columns()
        at_progress = ProgressRegression(*astuple(self)).fit(graph, parallel_calls)
        features = ProgressFeatures.of_graph(columns, graph.cost, parallel_calls)
        calls = _calls(columns)
        if not calls.size:
            return PromptRegressed(features, None, at_progress)
        seen = features.of_columns(columns)
        ahead = _ahead(
            columns.attributes[calls, 0],
            columns.attributes[calls, 2],
            columns.unit[calls],
            len(columns.units),
        )
        run = seen.run[calls]
        predicted = LogRidge(*astuple(self)).fit(
            np.hstack([seen.features[calls], ahead]),
            seen.remaining[calls],
            run=run,
            weights=graph.run_weights()[run],
        )
        return PromptRegressed(features, predicted, at_progress)


@final
@dataclass(frozen=True, eq=False)
class PromptRegressed(Refined):
    """A fitted regression on calls.

    Attributes:
        features: of a progress.
        predicted: from them and from those of the call ahead, the seconds that remain; `None`
            where no call had prompt tokens.
        at_progress: asked where no call is ahead, or none whose tokens are known.
    """

    features: ProgressFeatures
    predicted: LogFit | None
    at_progress: Refined

    @override
    def remaining(self, progress: Progress) -> Distribution:
        return self.at_progress.remaining(progress)

    @override
    def predict(self, call: PendingCall) -> Distribution:
        if self.predicted is None or call.input_tokens is None:
            return self.remaining(call.progress)
        unit = self.features.number(call.unit.name)
        ahead = _ahead(
            np.array([call.input_tokens]),
            np.array([float(call.parallelism)]),
            np.array([unit]),
            len(self.features.units),
        )
        return self.predicted(np.append(self.features.of_progress(call.progress), ahead[0]))


def _calls(columns: RunColumns) -> Ints:
    """Positions of the executions that are calls to a model whose prompt tokens are known."""
    llm = np.array([unit.kind == "llm" for unit in columns.units])
    return np.flatnonzero(llm[columns.unit] & (columns.attributes[:, 0] > 0.0))


def _ahead(
    input_tokens: Floats,
    parallelism: Floats,
    unit: Ints,
    units: int,
) -> Floats:
    """`[n, 2 + units]` features of the calls ahead."""
    return np.column_stack(
        [np.log1p(input_tokens), np.log1p(parallelism), unit[:, None] == np.arange(units)]
    )
