import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


def test_measured_seconds_of_an_llm_come_before_the_cost_model():
    measured = Execution(LLM, 1000, 100, parallelism=3, seconds=2.0, longest_seconds=4.0)
    assert CostModel().seconds(measured) == 6.0
    assert CostModel().seconds(measured, "critical_path") == 4.0


def test_the_critical_path_is_the_longest_call():
    cost = CostModel()
    searched = Execution.of_calls(TOOL, seconds=[1.0, 2.0, 6.0])
    assert (searched.parallelism, searched.seconds, searched.longest_seconds) == (3, 3.0, 6.0)
    assert (cost.seconds(searched), cost.seconds(searched, "critical_path")) == (9.0, 6.0)
    planned = Execution.of_calls(LLM, input_tokens=[10, 30], output_tokens=[100, 300])
    assert cost.seconds(planned) == pytest.approx(0.004 + 24.0)
    assert cost.seconds(planned, "critical_path") == pytest.approx(0.002 + 18.0)
    assert cost.run_seconds([searched, planned], "critical_path") == pytest.approx(24.002)


def test_the_mean_call_stands_in_for_an_unknown_longest():
    assert CostModel().seconds(Execution(TOOL, seconds=1.5, parallelism=4), "critical_path") == 1.5


@given(st.lists(st.floats(0.0, 1e6), min_size=1, max_size=30))
def test_the_longest_call_is_at_most_the_sum_and_at_least_the_mean(seconds):
    execution = Execution.of_calls(TOOL, seconds=seconds)
    total = CostModel().seconds(execution)
    longest = CostModel().seconds(execution, "critical_path")
    assert total == pytest.approx(sum(seconds))
    assert longest == max(seconds)


def test_progress_counts_the_current_unit_as_demand_does():
    both = Progress(current="plan", attained_seconds=6.0, elapsed_seconds=2.0)
    assert (both.current_seconds("sum"), both.current_seconds("critical_path")) == (6.0, 2.0)
    with pytest.raises(DemandError, match="critical_path needs elapsed_seconds"):
        Progress(current="plan", attained_seconds=6.0).current_seconds("critical_path")
    with pytest.raises(DemandError, match="sum needs attained_seconds"):
        Progress(current="plan", elapsed_seconds=6.0).current_seconds("sum")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Unit("plan", "gpu"), "kind 'gpu'; expected one of llm, tool"),
        (lambda: Unit("end", "tool"), "unit name is 'end'"),
        (lambda: Unit("", "tool"), "unit name is ''"),
        (lambda: Execution(LLM), "llm without tokens"),
        (lambda: Execution(LLM, 1, 1, longest_seconds=2.0), "give longest_output_tokens instead"),
        (
            lambda: Execution(TOOL, seconds=1.0, longest_output_tokens=5.0),
            "give longest_seconds instead",
        ),
        (lambda: Execution(LLM, 1, 9, 2, longest_output_tokens=8), "between the mean and the sum"),
        (lambda: Execution(LLM, 1, 9, 2, longest_output_tokens=19), "between the mean and the sum"),
        (lambda: Execution(TOOL, seconds=1.0, longest_seconds=2.0), "between the mean and the sum"),
        (lambda: Execution(TOOL, seconds=0.0, longest_seconds=math.nan), "longest_seconds of unit"),
        (lambda: Execution.of_calls(TOOL), "entries; give lists of one length"),
        (lambda: Execution.of_calls(LLM, input_tokens=[1], output_tokens=[1, 2]), "one length"),
        (
            lambda: CostModel().seconds(Execution(TOOL, seconds=1.0), "max"),
            "parallel_calls is 'max'",
        ),
        (lambda: Progress(current="plan", elapsed_seconds=math.inf), "elapsed_seconds is inf"),
        (lambda: Progress(elapsed_seconds=1.0), "no unit is current"),
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


def test_no_call_is_negative_even_if_their_mean_is_not():
    with pytest.raises(DemandError, match="seconds of a call of unit 'a' are -1"):
        Execution.of_calls(Unit("a", "tool"), seconds=[-1, 3, 3])
    with pytest.raises(DemandError, match="tokens of a call of unit 'b' are -5"):
        Execution.of_calls(Unit("b", "llm"), input_tokens=[-5, 10])
