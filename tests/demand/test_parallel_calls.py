"""How parallel calls count is `parallel_calls=`; its old name, `demand=`, warns and still works."""

import pytest

from demand import (
    CostModel,
    CurrentUnit,
    DemandError,
    DemandEstimator,
    Execution,
    NearestRuns,
    NoRefinement,
    PDGraph,
    PearsonFilter,
    Progress,
    ProgressRegression,
    Unit,
    WholeRuns,
    calibrate,
    drift,
)

FAN = Execution.of_calls(Unit("fan", "tool"), seconds=[1.0, 2.0, 6.0])
GRAPH = PDGraph.fit([[FAN], [FAN]])
REFINEMENTS = [
    *(CurrentUnit(), NearestRuns(), NoRefinement(), WholeRuns()),
    *(PearsonFilter(minimum=1), ProgressRegression()),
]
CALLS = {
    "CostModel.seconds": lambda **how: CostModel().seconds(FAN, **how),
    "CostModel.run_seconds": lambda **how: CostModel().run_seconds([FAN], **how),
    "Progress.current_seconds": lambda **how: Progress((), "fan", 9.0, 6.0).current_seconds(**how),
    "PDGraph.remaining": lambda **how: GRAPH.remaining(**how).mean(),
    "PDGraph.walk_arrays": lambda **how: GRAPH.walk_arrays(**how).seconds[-1],
    "Refinement.remaining": lambda **how: WholeRuns().remaining(GRAPH, **how).mean(),
    "DemandEstimator": lambda **how: DemandEstimator({"a": GRAPH}, **how)("a").mean(),
    "drift": lambda **how: drift(GRAPH, 1, **how).tests[0].recent_mean,
    "calibrate": lambda **how: (
        calibrate(lambda _: GRAPH.remaining(), [[FAN]], (0,), **how).overall.observed
    ),
    **{
        f"{type(refinement).__name__}.fit": lambda refinement=refinement, **how: (
            refinement.fit(GRAPH, **how).remaining(Progress()).mean()
        )
        for refinement in REFINEMENTS
    },
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_old_keyword_warns_and_still_works(call):
    assert call() == pytest.approx(9.0)
    assert call(parallel_calls="critical_path") == pytest.approx(6.0)
    with pytest.warns(DeprecationWarning, match="demand= of .* is now parallel_calls="):
        assert call(demand="critical_path") == pytest.approx(6.0)
    with pytest.raises(DemandError, match="drop demand="):
        call(demand="sum", parallel_calls="critical_path")


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_way_to_count_that_does_not_exist_is_refused(call):
    with pytest.raises(DemandError, match="parallel_calls is 'mean'; expected one of sum, critic"):
        call(parallel_calls="mean")


def test_the_old_attribute_of_an_estimator_warns():
    with pytest.warns(DeprecationWarning, match="now parallel_calls"):
        assert DemandEstimator({}, parallel_calls="critical_path").demand == "critical_path"
