import math

import pytest

from demand import CostModel, DemandError, Execution, Progress, Unit

LLM = Unit("plan", "llm")
TOOL = Unit("search", "search")


def test_llm_seconds_come_from_tokens_over_all_calls():
    assert CostModel().seconds(Execution(LLM, 1000, 100, parallelism=3)) == pytest.approx(18.3)
    cheap = CostModel(prefill_seconds_per_token=0.0, decode_seconds_per_token=0.01)
    assert cheap.seconds(Execution(LLM, 1000, 100)) == pytest.approx(1.0)


def test_other_seconds_are_measured_per_call():
    assert CostModel().seconds(Execution(TOOL, seconds=1.5, parallelism=4)) == 6.0
    run = [Execution(LLM, 0, 100), Execution(TOOL, seconds=1.5)]
    assert CostModel().run_seconds(run) == pytest.approx(7.5)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Unit("plan", "gpu"), "kind 'gpu'; expected one of llm, tool"),
        (lambda: Unit("end", "tool"), "unit name is 'end'"),
        (lambda: Unit("", "tool"), "unit name is ''"),
        (lambda: Execution(LLM), "llm without tokens"),
        (lambda: Execution(LLM, 1, 1, seconds=2.0), "drop seconds"),
        (lambda: Execution(LLM, -1, 1), "input_tokens of unit 'plan' is -1"),
        (lambda: Execution(LLM, 1, math.inf), "output_tokens of unit 'plan' is inf"),
        (lambda: Execution(TOOL), "has no seconds"),
        (lambda: Execution(TOOL, seconds=math.nan), "seconds of unit 'search' is nan"),
        (lambda: Execution(TOOL, seconds=1.0, parallelism=0), "parallelism of unit 'search' is 0"),
        (lambda: CostModel(-1.0), "rate -1.0"),
        (lambda: Progress(attained_seconds=1.0), "no unit is current"),
        (lambda: Progress(current="plan", attained_seconds=-1.0), "attained_seconds is -1.0"),
    ],
)
def test_bad_input_is_refused(make, says):
    with pytest.raises(DemandError, match=says):
        make()
