"""The scheduler inside transformers: the same tokens, the right order, pauses, evictions."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demand import FCFS, SERPT, ClassMean, Distribution, Gittins, Job, Oracle, Policy, RandomOrder
from demand.policies import EDF, LAS, VTC, PriorityClasses, RequestFCFS
from tests.demand.continuous import Stepped, config, generated, prompt
from tests.helpers import tiny_model

POLICIES = [
    FCFS(),
    RequestFCFS(),
    ClassMean(),
    SERPT(),
    Gittins(),
    LAS(),
    VTC(),
    EDF(),
    RandomOrder(),
]
names = pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)


@dataclass(frozen=True)
class Flip(Policy):
    """Earliest first, and latest first from second `at` on."""

    at: float

    def rank(self, job: Job, now: float) -> float:
        return job.index if now < self.at else -job.index


@names
def test_outputs_equal_generate_under_preemption(model, policy):
    run = Stepped(model, policy, config(width=2))
    wanted = {}
    for number in range(7):
        ids, new = prompt(5 + 4 * number, number), (20, 6, 33)[number % 3]
        name = "long" if new > 10 else "short"
        wanted[str(number)] = generated(model, ids, new)
        run.submit(name, str(number), ids, new, deadline_seconds=100.0 - number)
        run.step(2)
    run.finish()
    assert run.outputs == wanted
    assert len(run.table) == 0


@pytest.mark.parametrize("family", ["mistral_sliding", "gemma3", "qwen3"])
def test_outputs_equal_generate_with_sliding_windows(family):
    model = tiny_model(family)
    run = Stepped(model, Flip(12.0), config(width=1, blocks=32))
    wanted = {}
    for number in range(3):
        ids = prompt(9 + 13 * number, number)
        wanted[str(number)] = generated(model, ids, 24)
        run.submit("long", str(number), ids, 24)
    run.finish()
    assert run.outputs == wanted
    assert run.scheduler.pauses > 0


def test_eager_attention():
    model = tiny_model("llama", num_hidden_layers=2, _attn_implementation="eager")
    ids = prompt(20)
    wanted = generated(model, ids, 12)
    run = Stepped(model, FCFS(), config())
    run.submit("short", "one", ids, 12)
    run.finish()
    assert run.outputs == {"one": wanted}
    run.manager.start()
    run.manager.stop()
    assert model.config._attn_implementation == "eager"


def test_a_pause_computes_nothing_again(model):
    """6 requests of 64 tokens at width 2 take 192 steps, whatever is paused on the way."""
    run = Stepped(model, Flip(40.0), config(width=2))
    for number in range(6):
        run.submit("long", str(number), prompt(8, number), 64)
    run.finish()
    assert run.steps == 192
    assert run.scheduler.pauses == 2
    assert run.scheduler.evictions == 0
    assert run.ended_at == {"5": 104, "4": 104, "3": 168, "2": 168, "1": 192, "0": 192}


@names
def test_the_width_is_never_exceeded(model, policy):
    run = Stepped(model, policy, config(width=3))
    for number in range(8):
        run.submit("short", str(number), prompt(6, number), 5)
    widths = []
    while len(run.outputs) < 8:
        run.step()
        widths.append(len(run.batch))
    assert max(widths) == 3


def test_long_prompts_are_prefilled_in_chunks(model):
    run = Stepped(model, FCFS(), config(max_batch_tokens=16))
    ids = prompt(50)
    job = run.submit("short", "one", ids, 4)
    run.step()
    run.step()
    run.step()
    assert run.outputs == {}
    assert job.attained_service == pytest.approx(32 * 1e-4)  # as of the start of the step
    run.finish()
    assert run.outputs["one"] == generated(model, ids, 4)
    assert run.ended_at["one"] == 4 + 3


# Under KV exhaustion.


@pytest.mark.parametrize(
    ("policy", "blocks"),  # room for little more than one, for two, and now and then for three
    [(Flip(30.0), 6), (Flip(30.0), 10), (Gittins(), 7), (LAS(), 6), (LAS(), 7)],
    ids=lambda p: p if isinstance(p, int) else type(p).__name__,
)
def test_outputs_equal_generate_when_kv_runs_out(model, policy, blocks):
    run = Stepped(model, policy, config(width=3, blocks=blocks))
    wanted = {}
    for number in range(6):
        ids = prompt(10, number)
        wanted[str(number)] = generated(model, ids, 70)
        run.submit("long", str(number), ids, 70)
    run.finish()
    assert run.outputs == wanted
    assert run.scheduler.evictions > 0
    assert len(run.table) == 0


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_outputs_equal_generate_whatever_happens(data):
    """Random sizes, arrivals, widths, blocks, sharing of prefixes, cancellations."""
    model = tiny_model("llama", num_hidden_layers=1, seed=data.draw(st.integers(0, 3)))
    policy = data.draw(st.sampled_from(POLICIES))
    engine = config(
        width=data.draw(st.integers(1, 4)),
        blocks=data.draw(st.integers(5, 20)),
        max_batch_tokens=data.draw(st.sampled_from([8, 32, 128])),
        allow_block_sharing=data.draw(st.booleans()),
    )
    run = Stepped(model, policy, engine)
    wanted, cancelled = {}, set()
    for number in range(data.draw(st.integers(1, 7))):
        length, new = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
        ids = prompt(40)[:length]  # of one beginning, so that prefixes are shared
        wanted[str(number)] = generated(model, ids, new)
        run.submit(data.draw(st.sampled_from(["short", "long"])), str(number), ids, new)
        run.step(data.draw(st.integers(0, 9)))
        if data.draw(st.integers(0, 5)) == 0 and str(number) not in run.outputs:
            run.manager.cancel_request(str(number))
            cancelled.add(str(number))
    run.finish()
    assert run.outputs == {key: value for key, value in wanted.items() if key not in cancelled}
    assert len(run.table) == 0
    cache = run.scheduler.cache
    cache.evict_cached_blocks()
    assert cache.compute_free_capacity() == 1.0


def test_order_is_kept_when_kv_runs_out(model):
    """Long ones hold all blocks; a short one that ranks before them gets its own at once."""
    run = Stepped(model, ClassMean(), config(width=2, blocks=8))
    for number in range(2):
        run.submit("long", f"long{number}", prompt(30, number), 34)  # 4 blocks each at the end
    run.step(20)
    assert run.scheduler.cache.compute_free_capacity() == 0.0
    run.submit("short", "short", prompt(20), 8)
    run.finish()
    assert run.ended_at["short"] == 20 + 8
    assert run.ended_at["short"] < run.ended_at["long0"]


def test_the_worst_is_evicted_first(model):
    run = Stepped(model, FCFS(), config(width=3, blocks=8))
    for number in range(3):
        run.submit("long", str(number), prompt(16, number), 64)  # 5 blocks each at the end
    gone = []
    while run.scheduler.has_pending_requests() or not run.steps:
        before = set(run.scheduler.active_requests)
        run.step()
        gone += sorted(before - set(run.scheduler.active_requests) - set(run.outputs))
    assert gone[0] == "2"  # the last in the order
    assert list(run.ended_at) == ["0", "1", "2"]


def test_nobody_is_evicted_in_vain(model):
    """A prompt that even an eviction would not make room for waits, and computes nothing twice."""
    run = Stepped(model, ClassMean(), config(width=3, blocks=8, max_batch_tokens=256))
    run.submit("short", "first", prompt(60, 1), 20)  # 4 blocks, the better rank by arrival
    run.submit("long", "other", prompt(20, 2), 10)  # 2 blocks
    run.step()
    run.submit("short", "big", prompt(100, 3), 4)  # 7 blocks: 2 free and 2 of "other" do not do
    run.step(5)
    assert run.scheduler.evictions == 0
    run.finish()
    assert run.ended_at["first"] < run.ended_at["big"]


def test_nothing_passes_a_request_that_waits_for_kv(model):
    run = Stepped(model, FCFS(), config(width=3, blocks=8, max_batch_tokens=256))
    run.submit("long", "first", prompt(60, 1), 20)
    run.step()
    run.submit("long", "big", prompt(80, 2), 4)
    run.submit("long", "small", prompt(5, 3), 30)
    run.finish()
    assert run.ended_at["first"] < run.ended_at["big"] < run.ended_at["small"]


def test_cancelling_all_that_is_active_does_not_strand_the_evicted(model):
    run = Stepped(model, FCFS(), config(width=2, blocks=6))
    for number in range(2):
        run.submit("long", str(number), prompt(16, number), 60)
    while not run.scheduler.evictions:
        run.step()
    run.manager.cancel_request("0")
    run.finish()
    assert list(run.outputs) == ["1"]


# Service.


def test_service_is_that_of_all_requests_over_the_life_of_a_job(model):
    run = Stepped(model, LAS(), config())
    job = run.table.open("long")
    run.add(job, "plan", prompt(30), 10)
    run.finish()
    first = 30 * 1e-4 + 10 * 0.06
    assert job.attained_service == pytest.approx(first, abs=1e-12)
    run.table.serve(job, 2.5)  # a tool
    run.add(job, "left", prompt(7), 4)
    run.add(job, "right", prompt(9), 6)
    run.table.close(job)
    run.finish()
    assert job.attained_service == pytest.approx(first + 2.5 + 16 * 1e-4 + 10 * 0.06, abs=1e-12)
    assert len(run.table) == 0


def test_what_is_computed_again_counts_once(model):
    run = Stepped(model, FCFS(), config(width=2, blocks=6))
    jobs = [run.submit("long", str(number), prompt(16, number), 60) for number in range(2)]
    run.finish()
    assert run.scheduler.evictions > 0
    for job in jobs:
        assert job.attained_service == pytest.approx(16 * 1e-4 + 60 * 0.06, abs=1e-12)


def ends_beside_another(run, agent, request_id):
    """The steps in which the last request of `agent` and one of a new job end."""
    run.add(agent, request_id, prompt(10), 10)
    run.table.close(agent)
    run.submit("long", "other", prompt(10, 2), 10)
    run.finish()
    return run.ended_at[request_id], run.ended_at["other"]


def test_an_agent_that_comes_back_is_ranked_by_what_it_had(model):
    """Least attained service: the second request of an old job waits for a new job's first."""
    run = Stepped(model, LAS(), config(width=1))
    agent = run.table.open("long")
    run.add(agent, "plan", prompt(10), 20)
    run.finish()
    act, other = ends_beside_another(run, agent, "act")
    assert other < act


def test_learning_between_two_stages_changes_the_order(model):
    run = Stepped(model, SERPT(), config(width=1))
    agent = run.table.open("short")
    run.table.expect(agent, Distribution([50.0]))
    last, other = ends_beside_another(run, agent, "agent")
    assert other < last


def test_forked_sequences_belong_to_their_parent(model):
    run = Stepped(
        model, LAS(), config(width=4), num_return_sequences=3, do_sample=True, temperature=1.5
    )
    job = run.submit("long", "parent", prompt(20), 9)
    run.finish()
    assert set(run.outputs) == {"parent", "parent__child#0", "parent__child#1"}
    assert job.attained_service == pytest.approx(3 * (20 * 1e-4 + 9 * 0.06), abs=1e-12)
    assert len(run.table) == 0


@pytest.mark.parametrize("blocks", [4, 6])
def test_forked_sequences_when_kv_runs_out(model, blocks):
    sampling = dict(num_return_sequences=3, do_sample=True, top_k=1)
    run = Stepped(model, LAS(), config(width=4, blocks=blocks), **sampling)
    run.submit("long", "parent", prompt(20), 30)
    run.finish()
    assert set(run.outputs) == {"parent", "parent__child#0", "parent__child#1"}
    assert set(map(tuple, run.outputs.values())) == {tuple(generated(model, prompt(20), 30))}
    assert len(run.table) == 0


# What policies see.


def test_deadlines_tenants_and_priorities_reach_the_policy(model):
    run = Stepped(model, EDF(), config(width=1))
    run.submit("long", "late", prompt(5), 6, deadline_seconds=90.0)
    run.submit("long", "soon", prompt(5), 6, deadline_seconds=20.0)
    run.finish()
    assert list(run.ended_at) == ["soon", "late"]

    run = Stepped(model, PriorityClasses(FCFS()), config(width=1))
    run.submit("long", "free", prompt(5), 6, priority=1)
    run.submit("long", "paid", prompt(5), 6, priority=0)
    run.finish()
    assert list(run.ended_at) == ["paid", "free"]

    run = Stepped(model, VTC(quantum=0.1), config(width=1))
    for number in range(3):
        run.submit("long", f"a{number}", prompt(5), 6, tenant="a")
    run.submit("long", "b", prompt(5), 6, tenant="b")
    run.finish()
    assert run.ended_at["b"] < run.ended_at["a1"]


def test_an_oracle_reads_the_demand(model):
    run = Stepped(model, Oracle(), config(width=1))
    run.submit("long", "two", prompt(5), 8, demand_seconds=8.0)
    run.submit("long", "one", prompt(5), 4, demand_seconds=4.0)
    run.finish()
    assert list(run.ended_at) == ["one", "two"]


def test_jobs_know_whether_they_run(model):
    run = Stepped(model, Flip(5.0), config(width=1))
    first, second = (run.submit("long", str(n), prompt(5, n), 10) for n in range(2))
    run.step(3)
    assert (first.running, second.running) == (True, False)
    run.step(4)
    assert (first.running, second.running) == (False, True)
    assert second.started_at == 0.0
    run.step(10)
    assert first.running
    assert first.started_at == pytest.approx(5 * 1e-4 + 5 * 0.06)


def test_an_application_never_seen_before_is_ranked_by_attained_service(model):
    run = Stepped(model, Gittins(), config(width=1))
    run.submit("long", "known", prompt(5), 60)
    with pytest.warns(UserWarning, match="'stranger' was never seen before"):
        run.submit("stranger", "new", prompt(5), 12)
    run.submit("stranger", "newer", prompt(5), 12)
    run.finish()
    assert run.ended_at["newer"] < run.ended_at["known"]


def test_a_request_nobody_announced_is_a_job_of_its_own(model):
    run = Stepped(model, Gittins(), config(width=1))
    run.manager.add_request(prompt(5), "surprise", max_new_tokens=4)
    with pytest.warns(UserWarning, match="'unannounced request' was never seen before"):
        run.finish()
    assert run.outputs["surprise"] == generated(model, prompt(5), 4)
    assert len(run.table) == 0


def test_mean_completion_of_a_mix_is_what_ranks_say(model):
    """Width 1, all there at once: the mean of FCFS and of shortest first, by hand."""
    means = {}
    for policy in (FCFS(), ClassMean()):
        run = Stepped(model, policy, config(width=1))
        for number, new in enumerate((30, 30, 4, 4, 4)):
            run.submit("long" if new == 30 else "short", str(number), prompt(5), new)
        run.finish()
        means[type(policy)] = np.mean(list(run.ended_at.values()))
    assert means[FCFS] == np.mean([30, 60, 64, 68, 72])
    assert means[ClassMean] == np.mean([4, 8, 12, 42, 72])
