"""Hand-sized cases of an engine that serves running requests first, as vLLM does."""

import numpy as np
import pytest

from demand import (
    FCFS,
    SERPT,
    ClassMean,
    CostModel,
    Distribution,
    Execution,
    Oracle,
    Unit,
    Workload,
    hermes_applications,
    poisson_workload,
)
from demand.policies import Hysteresis, RequestFCFS, TimeSlice
from demand.simulation.engine import Engine, simulate_engine
from tests.demand.engine_twin import step_by_step
from tests.demand.test_engine import one_unit

THINK = Unit("think", "llm")
SECOND_A_TOKEN = CostModel(0.0, 1.0)


def counting(*limits, preemption="recompute", **more):
    return Engine.counting_steps(
        *limits, preemption=preemption, scheduling="running_first", **more
    )  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "again", "end"), [("none", 0, [10, 7]), ("recompute", 8, [12, 2])]
)
def test_a_shorter_job_displaces_where_places_are_full(mode, again, end):
    workload = one_unit([(4, 10), (4, 2)], arrivals=[0, 5])
    engine = counting(1, preemption=mode)
    result = simulate_engine(workload, Oracle(), engine, cost=SECOND_A_TOKEN)
    assert result.completion_times.tolist() == end
    assert (result.prefilled_again, result.preemptions) == (again, again // 8)


def test_a_shorter_job_that_lacks_blocks_displaces_nobody():
    """By rank it takes the blocks of the longer one, whose eight tokens are computed again."""
    workload = one_unit([(4, 10), (8, 2)], arrivals=[0, 5])
    engine = counting(2, blocks=4, block_tokens=4)
    result = simulate_engine(workload, Oracle(), engine, cost=SECOND_A_TOKEN)
    assert result.completion_times.tolist() == [10, 7]
    assert result.prefilled_again == 0
    by_rank = Engine.counting_steps(2, blocks=4, block_tokens=4, preemption="recompute")
    result = simulate_engine(workload, Oracle(), by_rank, cost=SECOND_A_TOKEN)
    assert result.completion_times.tolist() == [12, 2]
    assert result.prefilled_again == 8


def test_a_prompt_is_admitted_when_all_of_it_fits_not_its_first_part():
    """Five tokens would; vLLM wants blocks for all twelve (its `scheduler_reserve_full_isl`)."""
    workload = one_unit([(4, 8), (12, 1)], arrivals=[0, 1])
    engine = counting(2, token_budget=5, blocks=4, block_tokens=4)
    result = simulate_engine(workload, RequestFCFS(), engine)
    assert result.completion_times.tolist() == [8, 7 + 3]


def test_nobody_is_admitted_in_a_step_in_which_blocks_ran_out():
    """The first two need a block each and one is free: the second loses its own, and waits."""
    workload = one_unit([(4, 6), (4, 6), (1, 1)], arrivals=[0, 0, 1])
    engine = counting(2, blocks=3, block_tokens=4, preemption="none")
    result = simulate_engine(workload, RequestFCFS(), engine)
    assert result.preemptions == 1
    assert result.prefilled_again == 4
    # Steps 2 to 6 are of the first alone: the second needs two blocks, and one is free.
    assert result.completion_times.tolist() == [6, 6 + 5, 7 - 1]


def test_the_one_that_lacks_blocks_may_be_the_last_in_order_and_stalls_those_after_it():
    """The first to be admitted has the worst rank by then: it gives way, the other waits a step."""
    workload = Workload(
        [0, 0], [1, 1], "ab", {n: Distribution([1.0]) for n in "ab"}, priorities=[0, 0],
        runs=[[Execution(THINK, 4, 5)], [Execution(THINK, 3, 5)]],
    )  # fmt: skip
    engine = counting(2, blocks=2, block_tokens=4, preemption="none")

    class Later(FCFS):
        """The later job first."""

        def rank(self, job, now):
            return -job.index if job.attained_service else job.index

    result = simulate_engine(workload, Later(), engine, cost=SECOND_A_TOKEN)
    twin = step_by_step(workload, Later(), engine, SECOND_A_TOKEN)
    np.testing.assert_array_equal(result.completion_times, twin.completion_times)
    assert result.preemptions == twin.preemptions == 1
    assert result.steps == twin.steps  # the step in which nobody is served is none


@pytest.mark.parametrize("scheduling", ["running_first", "by_rank"])
def test_hysteresis_pays_87_tokens_for_a_lead_of_one(scheduling):
    """Between two that run its margin of five cancels: the blocks of the worse one are lost."""
    workload = Workload(
        [0, 1], [1, 1], "ab", {"a": Distribution([50.0]), "b": Distribution([49.0])},
        runs=[[Execution(THINK, 80, 20)], [Execution(THINK, 7, 8)]],
    )  # fmt: skip
    engine = Engine.counting_steps(
        4, blocks=100, block_tokens=1, preemption="recompute", scheduling=scheduling
    )
    policy = Hysteresis(ClassMean(), margin=5.0)
    assert simulate_engine(workload, policy, engine).prefilled_again == 87
    roomy = Engine.counting_steps(4, preemption="recompute", scheduling=scheduling)
    assert simulate_engine(workload, policy, roomy).prefilled_again == 0


def test_what_recomputation_costs_serpt_without_labels_and_what_helps():
    drawn = poisson_workload(hermes_applications(200), 50.0, 150, 0)
    values = np.concatenate([known.values for known in drawn.distributions.values()])
    workload = Workload(
        drawn.arrivals, drawn.demands, ["any"] * len(drawn), {"any": Distribution(values)},
        runs=drawn.runs,
    )  # fmt: skip
    nobody, displaced = Engine(32, preemption="none"), Engine(32)
    baseline = simulate_engine(workload, FCFS(), nobody).mean
    assert simulate_engine(workload, SERPT(), displaced).mean > 5.0 * baseline
    assert simulate_engine(workload, TimeSlice(SERPT(), 100.0), displaced).mean < 1.5 * baseline
    assert simulate_engine(workload, SERPT(), nobody).mean < baseline
