"""Order and displacement, without vLLM: priorities, annotations, the ranking, and its mixin."""

import enum
import heapq
import math
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from demand import (
    FCFS,
    SERPT,
    CostModel,
    DemandError,
    DemandEstimator,
    Distribution,
    Execution,
    Gittins,
    Job,
    Oracle,
    PDGraph,
    PendingCall,
    Policy,
    Unit,
)
from demand.integrations.job_ledger import JobLedger, TokenMeter
from demand.integrations.vllm import annotation, make_scheduler, millisecond_priority
from demand.integrations.vllm.annotation import UNANNOTATED, Annotation
from demand.integrations.vllm.displacement import Key, displaced
from demand.integrations.vllm.ranking import Ranking
from demand.integrations.vllm.scheduler import RankedScheduling

COST = CostModel(prefill_seconds_per_token=0.1, decode_seconds_per_token=1.0)
WRITE = Unit("write", "llm")
KNOWN = {"short": Distribution([5.0]), "long": Distribution([50.0])}

floats = st.floats(-1e6, 1e6) | st.sampled_from([math.inf, -math.inf])
classes = st.integers(-512, 511)


@given(st.lists(floats | st.none(), min_size=2, max_size=2), st.lists(classes, min_size=4))
def test_priorities_sort_as_ranks_do_to_the_millisecond(
    ranks: list[float | None], entries: list[int]
) -> None:
    a, b = (0.0 if rank is None else rank for rank in ranks)
    low, high = sorted([a, b])
    assert millisecond_priority(low) <= millisecond_priority(high)
    if high - low > 0.002 and -2e6 < low < 2e6:
        assert millisecond_priority(low) < millisecond_priority(high)
    pairs = sorted([(*entries[:2], a), (*entries[2:4], b)])
    if pairs[0][:2] != pairs[1][:2]:
        assert millisecond_priority(pairs[0]) < millisecond_priority(pairs[1])
    assert all(abs(millisecond_priority(pair)) < 2**53 for pair in pairs)


def test_priorities_by_hand() -> None:
    assert [millisecond_priority(r) for r in (0.0, 1.5, -0.0005, 0.0004)] == [0, 1500, -1, 0]
    assert millisecond_priority((1, 0.25)) == 2**32 + 250
    assert millisecond_priority((-1, 0.25)) == -(2**32) + 250
    assert millisecond_priority((2, -3, 0.0)) == (2 * 1024 - 3) * 2**32
    for rank in (math.nan, (1.5, 0.0), (512, 0.0), (1, 2, 3, 0.0), (math.inf, 0.0), (math.nan, 1)):
        with pytest.raises(DemandError, match="expected a number, or at most two classes"):
            millisecond_priority(rank)
    for nothing in (None, "1", (), (0, None)):
        with pytest.raises(DemandError, match="expected a number, or at most two classes"):
            millisecond_priority(nothing)  # type: ignore[arg-type]


def one_by_one(running: list[Key], waiting: list[Key], slots: int) -> list[int]:
    """The slow twin: the best that waits takes a free place or that of the worst, if better."""
    served: list[tuple[Key, int]] = [(key, i) for i, key in enumerate(running)]
    victims = []
    for admitted, key in enumerate(sorted(waiting)):
        if len(served) + admitted >= slots:
            if not served or not key[0] < max(served)[0][0]:
                break
            victims.append(max(served)[1])
            served.remove(max(served))
    return victims


keys = st.lists(st.tuples(st.integers(0, 4).map(float), st.integers(0, 3)), max_size=7)


@given(keys, keys, st.integers(0, 7))
def test_displaced_is_its_twin_and_leaves_the_best_ranks(
    running: list[Key], waiting: list[Key], slots: int
) -> None:
    victims = displaced(running, waiting, slots)
    assert victims == one_by_one(running, waiting, slots)
    if len(running) <= slots:
        kept = [key for i, key in enumerate(running) if i not in victims]
        free = slots - len(kept)
        admitted, left = sorted(waiting)[:free], sorted(waiting)[free:]
        served_ranks = sorted(rank for rank, _ in kept + admitted)
        assert served_ranks == sorted(rank for rank, _ in running + waiting)[:slots]
        gone = [running[i] for i in victims]
        assert displaced(kept + admitted, left + gone, slots) == []


def test_equal_ranks_never_take_turns() -> None:
    def of(*ranks: float) -> list[Key]:
        return [(rank, i) for i, rank in enumerate(ranks)]

    assert displaced([(3.0, 8), (3.0, 9)], [(3.0, 1)], 2) == []
    assert displaced(of(3.0, 5.0, 4.0), of(4.0, 2.0), 3) == [1]
    assert displaced(of(5.0, 5.0), [(1.0, 7), (1.0, 8)], 2) == [1, 0]  # the later one first
    assert displaced(of(5.0), of(1.0, 2.0), 3) == []


def test_annotations_are_read_as_they_were_written() -> None:
    fields = annotation("report", "17", last=True, tenant="t", deadline_seconds=3.5)
    assert set(map(type, fields.values())) <= {str, int, float}
    found = Annotation.of({"kv_transfer_params": {}, **fields})
    assert found == Annotation("report", "17", True, {"tenant": "t", "deadline_seconds": 3.5})
    assert Annotation.of({}) == Annotation(UNANNOTATED, "", False, {})
    for wrong in ({"weight": "2"}, {"tenant": 3}, {"color": 1}, {"priority": math.nan}):
        with pytest.raises(DemandError, match="expected what `annotation` makes"):
            annotation("report", **wrong)
    with pytest.raises(DemandError, match="demand_application is ''"):
        annotation("")


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=20))
def test_a_meter_counts_every_token_once(readings: list[tuple[int, int]]) -> None:
    meter = TokenMeter(COST)
    gained = [meter.gained(*reading) for reading in readings]
    furthest = max((0.1 * i + 1.0 * o for i, o in readings), default=0.0)
    assert all(g >= 0.0 for g in gained)
    assert sum(gained) == pytest.approx(furthest)


def ranking_of(policy: Policy, idle_runs: int = 2) -> Ranking:
    return Ranking(JobLedger(policy, KNOWN), COST, idle_runs)


def test_requests_of_one_run_share_the_service_it_attained() -> None:
    ranking = ranking_of(SERPT())
    first = ranking.add("a", annotation("long", "1"), 0.0)
    assert first == (50.0, 0)
    assert ranking.add("b", annotation("long", "1"), 1.0) == first
    assert ranking.add("c", annotation("long", "2"), 1.0) == (50.0, 1)
    changed = ranking.serve([("a", 10, 4)], 2.0)
    assert changed == {"a", "b"}
    assert ranking.key("b", 2.0) == (45.0, 0)
    assert ranking.serve([], 3.0) == {"a", "b"}  # it runs no longer
    assert ranking.serve([("a", 0, 4)], 4.0) == {"a", "b"}  # recomputed: nothing attained
    assert ranking.key("b", 4.0) == (45.0, 0)
    ranking.finish("a", 10, 9, 5.0)
    assert ranking.key("b", 5.0) == (40.0, 0)
    ranking.finish("b", 0, 0, 6.0)
    assert ranking.add("d", annotation("long", "1"), 7.0) == (40.0, 0)  # remembered while idle


@dataclass(frozen=True)
class Watched(Policy):
    told: list[tuple[str, int]] = field(default_factory=list)

    def rank(self, job: Job, now: float) -> float:
        return job.requested

    def arrived(self, job: Job, now: float) -> None:
        self.told.append(("arrived", job.index))

    def departed(self, job: Job, now: float) -> None:
        self.told.append(("departed", job.index))


def test_runs_end_when_they_say_so_or_are_forgotten() -> None:
    policy = Watched()
    ranking = ranking_of(policy, idle_runs=2)
    for i, last in enumerate([False, True, False, False]):
        ranking.add(str(i), annotation("short", str(i), last=last), float(i))
    for i in range(4):
        ranking.finish(str(i), 1, 1, 9.0)
    with pytest.warns(UserWarning, match="'unannotated' was never seen"):
        ranking.add("alone", {}, 10.0)  # a run of its own
    ranking.finish("alone", 1, 1, 11.0)
    ended = [index for what, index in policy.told if what == "departed"]
    assert ended == [1, 0, 4]  # the one that said so, the oldest idle one, the unannotated one
    assert ranking.add("again", annotation("short", "2"), 12.0) == (12.0, 2)


def test_an_annotation_gone_wrong_takes_down_nothing(caplog: pytest.LogCaptureFixture) -> None:
    ranking = ranking_of(Gittins())
    with pytest.warns(UserWarning, match="'unannotated' was never seen"):
        key = ranking.add("x", {"demand_application": "short", "demand_weight": -1.0}, 0.0)
    assert key[0] > 0.0
    ranking.add("y", {"demand_application": 7}, 0.0)
    assert [r.message.split(":")[0] for r in caplog.records] == [
        "request x is served as unannotated",
        "request y is served as unannotated",
    ]
    oracle = ranking_of(Oracle())
    assert oracle.add("x", annotation("short", demand_seconds=3.0), 0.0) == (3.0, 0)
    assert oracle.add("y", annotation("short"), 0.0) == (math.inf, 1)


def test_a_predictor_that_fails_takes_down_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Fails:
        def predict(self, call: PendingCall) -> Distribution:
            raise RuntimeError("out of memory")

    learns = DemandEstimator({}, cost=COST)
    ledger = JobLedger(SERPT(), {}, estimator=learns, predictor=Fails())
    ranking = Ranking(ledger, COST, 2)
    key = ranking.add("a", annotation("short", "1", last=True, unit="write"), 0.0, [1, 2])
    assert key == ranking.key("a", 0.0)
    assert [r.message for r in caplog.records] == ["request a is served without a prediction"]
    assert "out of memory" in caplog.text
    ranking.finish("a", 2, 3, 1.0)
    assert not ranking._runs
    executed = Execution.of_calls(WRITE, input_tokens=[2], output_tokens=[3])
    assert learns.graphs["short"].runs == ((executed,),)


def test_a_rank_that_is_no_number_is_refused_by_the_policys_name() -> None:
    @dataclass(frozen=True)
    class Speechless(Policy):
        def rank(self, job: Job, now: float) -> Any:
            return 0.0 if job.attained_service == 0.0 else "later"

    ranking = ranking_of(Speechless())
    ranking.add("a", annotation("long", "1"), 0.0)
    ranking.serve([("a", 10, 4)], 1.0)
    with pytest.raises(
        DemandError, match=r"Speechless\(\) ranked job 0 'later'; expected a number"
    ):
        ranking.key("a", 1.0)


# The mixin on a stand-in for vLLM's scheduler that has what it touches.


class Status(enum.Enum):
    """Some of vLLM's."""

    WAITING = enum.auto()
    WAITING_FOR_REMOTE_KVS = enum.auto()
    FINISHED_STOPPED = enum.auto()
    FINISHED_ABORTED = enum.auto()


@dataclass(eq=False)
class FakeRequest:
    request_id: str
    extra_args: dict[str, Any]
    num_prompt_tokens: int = 0
    num_computed_tokens: int = 0
    num_output_tokens: int = 0
    priority: Any = 0
    arrival_time: float = 0.0
    status: Status = Status.WAITING
    prompt_token_ids: list[int] | None = None
    num_stale_output_tokens: int = 0
    drop_stale_output: bool = False
    lora_request: object = None

    @property
    def sampling_params(self) -> "FakeRequest":
        return self

    def __lt__(self, other: "FakeRequest") -> bool:
        return (self.priority, self.arrival_time) < (other.priority, other.arrival_time)


class FakeQueue:
    def __init__(self) -> None:
        self._heap: list[FakeRequest] = []

    def __bool__(self) -> bool:
        return bool(self._heap)

    def peek_request(self) -> FakeRequest:
        return self._heap[0]


class FakeScheduler:
    def __init__(self, policy: str = "priority", slots: int = 2) -> None:
        self.scheduler_config = types.SimpleNamespace(policy=policy)
        self.waiting, self.kv_holding_waiting = FakeQueue(), FakeQueue()
        self.running: list[FakeRequest] = []
        self.requests: dict[str, FakeRequest] = {}
        self.max_num_active_reqs = slots
        self.num_waiting_for_streaming_input = 0
        self.requires_kv_delivery = False
        self.pause_state = types.SimpleNamespace(name="UNPAUSED")
        self.passed: list[Any] = []
        self.is_shut_down = False

    def add_request(self, request: FakeRequest) -> None:
        self.requests[request.request_id] = request
        heapq.heappush(self.waiting._heap, request)

    def schedule(self, throttle_prefills: bool = False) -> list[str]:
        self.passed.append(throttle_prefills)
        for request in sorted(self.waiting._heap):
            blocked = (
                self._is_blocked_waiting_status(request.status) or request.num_stale_output_tokens
            )
            if len(self.running) < self.max_num_active_reqs and not (
                blocked or request.lora_request
            ):
                self.waiting._heap.remove(request)
                self.running.append(request)
        heapq.heapify(self.waiting._heap)
        for request in self.running:
            request.num_output_tokens += 1
        return [request.request_id for request in self.running]

    def _is_blocked_waiting_status(self, status: Status) -> bool:
        return status is Status.WAITING_FOR_REMOTE_KVS

    def _request_blocks_can_be_freed(self, request: FakeRequest) -> bool:
        return True

    def _preempt_request(self, request: FakeRequest, now: float, drop_stale_output: bool) -> None:
        heapq.heappush(self.waiting._heap, request)

    def shutdown(self) -> None:
        self.is_shut_down = True

    def _free_request(self, request: FakeRequest) -> None:
        del self.requests[request.request_id]


class Scheduled(RankedScheduling, FakeScheduler):
    @staticmethod
    def make_ranking() -> Ranking:
        return ranking_of(SERPT())


def test_the_mixin_displaces_the_worst_and_passes_arguments_through() -> None:
    scheduler = Scheduled()
    for name in ("l1", "l2", "l3"):
        scheduler.add_request(FakeRequest(name, annotation("long", name)))
    assert scheduler.schedule() == ["l1", "l2"]
    scheduler.add_request(FakeRequest("s1", annotation("short", "s1")))
    # l1 and l2 have attained as much; of the two, l2 came later.
    assert scheduler.schedule(throttle_prefills=True) == ["l1", "s1"]
    assert (scheduler.passed, scheduler.displacements) == ([False, True], 1)
    assert [r.request_id for r in sorted(scheduler.waiting._heap)] == ["l2", "l3"]
    finished = scheduler.running.pop()
    scheduler._free_request(finished)
    assert scheduler.schedule() == ["l1", "l2"]
    assert scheduler.schedule(False) == ["l1", "l2"]  # nobody takes turns


@pytest.mark.parametrize(
    "hindrance",
    [
        {"status": Status.WAITING_FOR_REMOTE_KVS},
        {"num_stale_output_tokens": 1},
        {"lora_request": object()},
    ],
    ids=lambda h: next(iter(h)),
)
def test_nobody_gives_way_to_one_that_could_not_run(hindrance: dict[str, Any]) -> None:
    scheduler = Scheduled(slots=1)
    scheduler.add_request(FakeRequest("l", annotation("long")))
    scheduler.schedule()
    scheduler.add_request(FakeRequest("s", annotation("short"), **hindrance))
    assert scheduler.schedule() == ["l"]
    scheduler.pause_state.name = "PAUSED_NEW"
    scheduler.add_request(FakeRequest("t", annotation("short")))
    assert scheduler.schedule() == ["l"]
    scheduler.pause_state.name = "UNPAUSED"
    assert scheduler.schedule() == ["t"]
    assert scheduler.displacements == 1


def test_waiting_requests_of_a_served_run_move_up() -> None:
    scheduler = Scheduled(slots=1)
    scheduler.add_request(FakeRequest("a1", annotation("long", "a")))
    scheduler.add_request(FakeRequest("b", annotation("long", "b")))
    scheduler.add_request(FakeRequest("a2", annotation("long", "a")))
    scheduler.schedule()
    scheduler.schedule()
    assert scheduler.waiting.peek_request().request_id == "a2"


def test_only_priority_scheduling_is_taken() -> None:
    with pytest.raises(DemandError, match="--scheduling-policy priority"):
        Scheduled(policy="fcfs")


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    path = "vllm.v1.core.sched.async_scheduler"
    names = [".".join(path.split(".")[: i + 1]) for i in range(5)]
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[path].AsyncScheduler = FakeScheduler  # type: ignore[attr-defined]
    sys.modules["vllm"].__version__ = "0.32.0+cpu"  # type: ignore[attr-defined]
    return sys.modules["vllm"]


def test_make_scheduler_makes_a_class_that_carries_its_policy(fake_vllm: Any) -> None:
    made = make_scheduler(FCFS(), KNOWN)
    assert issubclass(made, FakeScheduler)
    assert "FCFS()" in (made.__doc__ or "")
    assert made().schedule() == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"policy": Gittins}, "policy is the class Gittins; expected a policy"),
        ({"distributions": {"a": 1.0}}, r"distribution of 'a' is 1\.0; expected a distribution"),
        ({"cost": 0.1}, r"cost is 0\.1; expected a CostModel"),
        ({"idle_runs": -1}, "idle_runs is -1; expected a whole number of at least 0"),
        ({"seed": 0.5}, r"seed is 0\.5; expected a whole number"),
        (
            {"distributions": {}, "estimator": DemandEstimator({}), "save_to": "missing/a.json"},
            "save_to is 'missing/a.json', and there is no folder 'missing'; make it first",
        ),
    ],
)
def test_wrong_objects_are_refused_before_an_engine_starts(
    fake_vllm: Any, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(DemandError, match=said):
        make_scheduler(**(dict(policy=FCFS(), distributions=KNOWN) | given))
    made = make_scheduler(FCFS(), KNOWN, idle_runs=np.int64(2), seed=1.0)  # type: ignore[arg-type]
    assert made().schedule() == []


def test_vllm_shuts_down_even_if_nothing_can_be_saved(fake_vllm: Any, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    learns = DemandEstimator({})
    scheduler = make_scheduler(FCFS(), estimator=learns, save_to=folder / "learned.json")()
    folder.rmdir()
    with pytest.raises(DemandError, match="there is no folder"):
        scheduler.shutdown()
    assert scheduler.is_shut_down


@pytest.mark.parametrize("version", ["0.33.0", "0.31.0", "0.32.1", "1.0"])
def test_unknown_versions_are_refused(fake_vllm: Any, version: str) -> None:
    fake_vllm.__version__ = version
    with pytest.raises(DemandError, match=rf"vLLM is {version}.*verified on 0\.32\.0"):
        make_scheduler(FCFS(), KNOWN)


def test_without_vllm_the_error_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(DemandError, match=r"needs vllm==0\.32\.0"):
        make_scheduler(FCFS(), KNOWN)


def test_a_clock_that_goes_backwards_stands_still() -> None:
    @dataclass(frozen=True)
    class Clock(Policy):
        def rank(self, job: Job, now: float) -> float:
            return now

    ledger = JobLedger(Clock(), KNOWN)
    job = ledger.open("short", 5.0)
    assert [ledger.rank(job, now) for now in (6.0, 2.0, 7.0)] == [6.0, 6.0, 7.0]


# An estimator that learns, and a predictor.


def learning(**settings: Any) -> tuple[Ranking, DemandEstimator]:
    runs = [[Execution.of_calls(WRITE, input_tokens=[2], output_tokens=[n])] for n in (5, 50)]
    estimator = DemandEstimator({"agent": PDGraph.fit(runs, cost=COST)}, cost=COST, lag=0.0)
    return Ranking(JobLedger(SERPT(), {}, estimator=estimator, **settings), COST, 9), estimator


def test_requests_of_a_run_are_learned_from_once_it_is_over() -> None:
    ranking, estimator = learning()
    graph = estimator.graphs["agent"]
    ranking.add("1", annotation("agent", "r", unit="write"), 0.0)
    ranking.serve([("1", 2, 3)], 1.0)
    ranking.finish("1", 2, 3, 2.0)
    assert len(graph.runs) == 2
    ranking.add("2", annotation("agent", "r", unit="check", last=True), 3.0)
    ranking.finish("2", 1, 4, 4.0)
    write, check = graph.runs[-1]
    assert (write.unit, write.input_tokens, write.output_tokens) == (WRITE, 2.0, 3.0)
    assert (check.unit.name, check.output_tokens) == ("check", 4.0)
    ranking.add("3", annotation("agent"), 5.0)  # a run of its own, which is aborted
    ranking.finish("3", 1, 4, 6.0, whole=False)
    assert len(graph.runs) == 3
    ranking.add("4", annotation("agent"), 5.0)
    ranking.finish("4", 1, 4, 6.0)
    assert len(graph.runs) == 4


def test_runs_forgotten_while_idle_are_not_learned_from() -> None:
    ranking, estimator = learning()
    for number in range(12):
        ranking.add(str(number), annotation("agent", str(number)), 0.0)
        ranking.finish(str(number), 1, 1, 1.0)
    assert estimator.graphs["agent"].observed == 2


def test_the_end_of_a_request_ranks_those_of_its_run_anew() -> None:
    ranking, _ = learning()
    ranking.add("1", annotation("agent", "r", unit="write"), 0.0)
    ranking.add("2", annotation("agent", "r", unit="write"), 0.0)
    ranking.serve([("1", 2, 20)], 1.0)
    assert ranking.serve([], 1.0) == {"1", "2"}
    assert ranking.serve([], 1.0) == set()
    ranking.finish("1", 2, 20, 2.0, whole=False)  # aborted while it waits
    assert ranking.serve([], 3.0) == {"2"}
    assert ranking.serve([], 3.0) == set()


def test_a_predictor_reads_the_ids_of_the_prompt() -> None:
    class Length:
        def predict(self, call: PendingCall) -> Distribution:
            assert call.input_tokens == len(call.prompt or ())
            return Distribution([float(len(call.prompt or ()))])

    ledger = JobLedger(SERPT(), KNOWN, predictor=Length())
    ranking = Ranking(ledger, COST, 9)
    assert ranking.add("1", annotation("long"), 0.0, [3, 4, 5])[0] == 3.0
    assert ranking.add("2", annotation("long"), 0.0, [3])[0] == 1.0


def test_a_unit_of_another_kind_is_served_as_unannotated(caplog: pytest.LogCaptureFixture) -> None:
    look = [[Execution(Unit("look", "tool"), seconds=1.0)]]
    estimator = DemandEstimator({"agent": PDGraph.fit(look, cost=COST)}, cost=COST)
    ranking = Ranking(JobLedger(SERPT(), {}, estimator=estimator), COST, 9)
    ranking.add("1", annotation("agent", unit="look"), 0.0)
    assert "served as unannotated" in caplog.text
    ranking.finish("1", 1, 1, 1.0)
    assert estimator.graphs["agent"].observed == 1


def test_the_mixin_tells_what_finished_from_what_was_aborted() -> None:
    ranking, estimator = learning()

    class Learned(RankedScheduling, FakeScheduler):
        make_ranking = staticmethod(lambda: ranking)

    scheduler = Learned()
    for name, status in (("1", Status.FINISHED_STOPPED), ("2", Status.FINISHED_ABORTED)):
        request = FakeRequest(name, annotation("agent", unit="write"), prompt_token_ids=[1, 2])
        scheduler.add_request(request)
        scheduler.schedule()
        request.status = status
        scheduler.running.remove(request)
        scheduler._free_request(request)
    assert estimator.graphs["agent"].observed == 3
