"""A predictor before the first token on an engine: like a step at a time, the truth, the prior."""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from demand import (
    SERPT,
    CostModel,
    DemandEstimator,
    Distribution,
    Engine,
    Execution,
    Gittins,
    LeastLoaded,
    Oracle,
    PDGraph,
    PendingCall,
    PromptRegression,
    Unit,
    Workload,
    simulate,
    simulate_cluster,
    simulate_engine,
)
from demand.policies import ClassMean, Hysteresis
from demand.simulation.engine.calls import execution_seconds
from tests.demand.engine_twin import step_by_step
from tests.demand.plans import plans
from tests.demand.test_engine import (
    TEST,
    THINK,
    WHOLE_COST,
    container,
    engines_and_policies,
    like_vllm_and_policies,
    llm,
    runs,
    workloads,
)

served_by = engines_and_policies | like_vllm_and_policies
calls_alone = st.lists(llm, min_size=1, max_size=3)
WIDE = Engine.counting_steps(64, preemption="none", scheduling="running_first")


class Says:
    """Some whole seconds that hang on all it is told; two modes, so that ages matter."""

    def __init__(self):
        self.asked = []

    def predict(self, call):
        executed = len(call.progress.executed)
        told = (call.application, call.unit.name, call.input_tokens, call.parallelism, executed)
        self.asked.append(told)
        tokens = int(call.input_tokens)
        low = 1 + (7 * tokens + 5 * executed + 3 * call.parallelism + len(call.unit.name)) % 23
        return Distribution([low, low + tokens % 19])


class Truth:
    """Knows what each run still needs; each job of the workload is of its own application."""

    def __init__(self, workload, cost):
        self.left = {
            name: np.cumsum([execution_seconds(one, cost) for one in run][::-1])[::-1]
            for name, run in zip(workload.applications, workload.runs, strict=True)
        }

    def predict(self, call):
        return Distribution([self.left[call.application][len(call.progress.executed)]])


def each_its_own(workload):
    """`workload` with an application a job, of which nothing true is known."""
    names = [str(at) for at in range(len(workload))]
    known = {name: Distribution([9.0, 1.0 + at]) for at, name in enumerate(names)}
    return replace(workload, applications=names, distributions=known)


@settings(max_examples=100, deadline=None)
@given(workloads(plans(st.one_of(llm, llm, container), most=5)) | workloads(), served_by)
def test_it_is_asked_as_in_steps_one_at_a_time(workload, served):
    engine, policy = served
    ours, theirs = Says(), Says()
    result = simulate_engine(workload, policy, engine, predictor=ours, cost=WHOLE_COST)
    twin = step_by_step(workload, policy, engine, WHOLE_COST, predictor=theirs)
    np.testing.assert_array_equal(result.completion_times, twin.completion_times)
    assert (result.steps, result.preemptions) == (twin.steps, twin.preemptions)
    assert ours.asked == theirs.asked


@settings(max_examples=60, deadline=None)
@given(workloads(runs), served_by)
def test_by_the_truth_the_shortest_mean_is_the_oracle(workload, served):
    """Before each call what is left is known, as whole quarters: every rank is the oracle's."""
    engine, _ = served
    workload = each_its_own(workload)
    truth = Truth(workload, WHOLE_COST)
    told = simulate_engine(workload, SERPT(), engine, predictor=truth, cost=WHOLE_COST)
    oracle = simulate_engine(workload, Oracle(), engine, cost=WHOLE_COST)
    np.testing.assert_array_equal(told.completion_times, oracle.completion_times)
    for name in ("steps", "preemptions", "prefilled_again", "swapped_blocks", "peak_blocks"):
        assert getattr(told, name) == getattr(oracle, name), name


@settings(max_examples=60, deadline=None)
@given(
    workloads(calls_alone),
    served_by,
    st.sampled_from([SERPT(), Gittins(), Hysteresis(SERPT(), 4.0)]),
)
def test_what_was_known_changes_nothing(workload, served, policy):
    """Of two modes, the larger never reached: halves are exact, and so is what is left of them."""
    known = {name: Distribution([d.values[0], 512.0]) for name, d in workload.distributions.items()}
    workload = replace(workload, distributions=known)

    class Prior:
        def predict(self, call):
            attained = sum(execution_seconds(one, WHOLE_COST) for one in call.progress.executed)
            return workload.distributions[call.application].condition(attained)

    told, blind = (
        simulate_engine(workload, policy, served[0], predictor=each, cost=WHOLE_COST)
        for each in (Prior(), None)
    )
    np.testing.assert_array_equal(told.completion_times, blind.completion_times)
    assert told.preemptions == blind.preemptions


@settings(max_examples=50, deadline=None)
@given(workloads(runs), served_by)
def test_an_engine_behind_a_router_and_a_queue_ask_the_same(workload, served):
    engine, policy = served
    demands = [WHOLE_COST.run_seconds(run) for run in workload.runs]
    graph = PDGraph.fit([[Execution(TEST, seconds=1.0)]], cost=WHOLE_COST)  # for its cost alone
    workload = each_its_own(replace(workload, demands=demands))
    workload = replace(workload, graphs=dict.fromkeys(workload.applications, graph))
    one, routed, queue = Says(), Says(), Says()
    alone = simulate_engine(workload, policy, engine, predictor=one)
    cluster = simulate_cluster(workload, policy, engine, 1, LeastLoaded(), predictor=routed)
    np.testing.assert_array_equal(cluster.completion_times, alone.completion_times)
    assert routed.asked == one.asked
    simulate(workload, policy, predictor=queue)
    assert sorted(queue.asked) == sorted(one.asked)


def test_of_units_side_by_side_it_is_asked_before_any_of_them_is_served():
    """Two tools, and a call after each: the first one waits in vain until the other is asked."""
    long = Execution(Unit("long", "llm"), 1, 30, after=())
    think = Execution(THINK, 4, 3, 3, longest_output_tokens=5, after=(0,))
    write = Execution(Unit("write", "llm"), 8, 2, after=(1,))
    run = [Execution(TEST, seconds=4.0, after=()), Execution(TEST, seconds=9.0, after=()),
           think, write]  # fmt: skip
    engine = Engine.counting_steps(1, preemption="none", scheduling="running_first")
    jobs = Workload(
        [0.0, 0.0], [1.0] * 2, "ab", {name: Distribution([1.0]) for name in "ab"},
        runs=[[long], run],
    )  # fmt: skip
    for cost in (WHOLE_COST, CostModel(0.1, 0.7)):  # of sums that are exact, and rounded
        says = Says()
        simulate_engine(jobs, SERPT(), engine, predictor=says, cost=cost)
        assert says.asked == [("a", "long", 1.0, 1, 0), ("b", "think + write", 5.0, 4, 1)]
    says = Says()
    simulate_engine(jobs, SERPT(), WIDE, predictor=says)
    assert says.asked == [("a", "long", 1.0, 1, 0)]  # the other call has been served by then


def test_it_speaks_after_the_estimator():
    run = [Execution(THINK, 4, 3), Execution(THINK, 5, 3)]
    jobs = Workload([0.0], [1.0], "a", {"a": Distribution([1.0])}, runs=[run])
    said = []

    class Last(SERPT):
        def table(self, distribution):
            said.append(distribution.mean())
            return super().table(distribution)

    class Five:
        def predict(self, call):
            return Distribution([5.0])

    simulate_engine(
        jobs, Last(), estimator=lambda application, progress: Distribution([3.0]), predictor=Five()
    )
    assert said == [1.0, 5.0, 3.0, 5.0]


def test_the_length_of_a_prompt_brings_an_engine_near_the_oracle():
    """What is generated follows from the prompt: told of it, most of the way to the oracle."""
    rng = np.random.default_rng(3)

    def drawn(n):
        prompts = rng.integers(10, 1000, n)
        return [[Execution(THINK, int(p), max(int(p * rng.uniform(0.8, 1.2)), 1))] for p in prompts]

    graph = PDGraph.fit(drawn(300))
    held_out = drawn(150)
    arrivals = np.cumsum(rng.exponential(12.0, 150))
    jobs = Workload(
        arrivals, [1.0] * 150, ["a"] * 150, {"a": graph.remaining()}, runs=held_out,
        graphs={"a": graph},
    )  # fmt: skip
    estimator = DemandEstimator({"a": graph}, PromptRegression())
    engine = Engine(2)
    fcfs, told, oracle = (
        simulate_engine(jobs, policy, engine, predictor=each).mean
        for policy, each in ((ClassMean(), None), (SERPT(), estimator), (Oracle(), None))
    )
    assert fcfs - told > 0.8 * (fcfs - oracle) > 0.0


def test_what_it_is_told_is_a_pending_call():
    seen = []

    class Notes:
        def predict(self, call):
            seen.append(call)
            return Distribution([5.0])

    run = [Execution(TEST, seconds=1.0), Execution(THINK, 4, 3, 2), Execution(THINK, 5, 3)]
    jobs = Workload([0.0], [1.0], "a", {"a": Distribution([1.0])}, runs=[run])
    simulate_engine(jobs, SERPT(), predictor=Notes())
    assert seen == [PendingCall.of_run("a", run, finished) for finished in (1, 2)]
