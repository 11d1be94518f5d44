"""Loaders on published traces, which are not part of the repository.

`PICACHE_DATA` names the folder that holds them, by default `../shared/data` beside the checkout.
Numbers are those of the files as published, cut as their SOURCE.md says.
"""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from demand import (
    FCFS,
    SERPT,
    ClassMean,
    CostModel,
    DemandError,
    Gittins,
    Oracle,
    PDGraph,
    hermes_applications,
    poisson_workload,
    simulate,
)
from demand.traces import (
    read_agent_sessions,
    read_azure,
    read_fireact,
    read_hermes_artifact,
    read_mooncake,
    read_tau_bench,
)
from demand.workloads import profiled_applications, recorded_applications, with_arrivals

BESIDE = Path(__file__).parents[2].parent / "shared" / "data"
DATA = Path(os.environ.get("PICACHE_DATA", BESIDE))


def published(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no {name}: set PICACHE_DATA to the folder that has it (looked in {DATA})")
    return path


def test_agent_sessions():
    trace = read_agent_sessions(published("agent_sessions"))
    units = Counter()
    measured = []
    for session in trace:
        units.update(span.unit for span in session.spans)
        measured += [span.seconds for span in session.spans if span.unit == "llm"]
    assert trace.read == 443
    assert units["llm"] == 30_146
    assert units["subagent_llm"] == 453
    assert sum(seconds is None for seconds in measured) == 2_692
    assert 5.0 < np.median([seconds for seconds in measured if seconds is not None]) < 10.0


def test_a_graph_of_agent_sessions_loops_on_its_calls():
    runs = [s.run(leave_out=("human",)) for s in read_agent_sessions(published("agent_sessions"))]
    graph = PDGraph.fit(runs, name="coding_agent")
    assert graph.branches("llm")["llm"] > 0.95
    cost = CostModel()
    assert graph.remaining().mean() > np.median([cost.run_seconds(run) for run in runs])


def test_tau_bench():
    sessions = list(read_tau_bench(published("tau_bench")))
    assert len(sessions) == 120
    assert Counter(s.attributes["task"] for s in sessions).most_common()[-1][1] == 4
    units = Counter(span.unit for session in sessions for span in session.spans)
    tools = Counter(
        span.kind for session in sessions for span in session.spans if span.kind == "tool"
    )
    assert units["assistant"] == 737 + 661
    assert units["user"] == 737
    assert tools["tool"] == 661
    assert all(0 <= s.attributes["reward"] <= 1 for s in sessions)


@pytest.mark.parametrize(
    ("name", "sessions", "searches"),
    [("hotpotqa_react_gpt35.jsonl", 272, 454), ("hotpotqa_react_llama2_7b.jsonl", 298, 775)],
)
def test_fireact(name, sessions, searches):
    trace = list(read_fireact(published(f"fireact_react/{name}")))
    units = Counter(span.unit for session in trace for span in session.spans)
    assert len(trace) == sessions
    assert units["search"] == searches
    assert units["thought"] == searches + sessions + units["click"] + units["reflect"]


def test_request_traces():
    requests = list(read_mooncake(published("mooncake")))
    assert len(requests) == 6_848
    assert requests[-1].arrival_seconds == 2_121.0
    assert (requests[0].input_tokens, requests[0].output_tokens) == (6_758, 500)
    assert all(len(r.block_ids) == -(-r.input_tokens // 512) for r in requests)
    for name, count, last in (("code", 5_291, 1_698.902328), ("conv", 11_619, 1_993.675765)):
        requests = list(read_azure(published(f"azure_llm_2023/{name}.first60pct.csv")))
        assert len(requests) == count
        assert requests[-1].arrival_seconds == pytest.approx(last, abs=1e-5)
    with pytest.raises(DemandError, match=r"conv.* begins before .*code.* ends"):
        list(read_azure(published("azure_llm_2023"), on_error="skip"))


def test_recorded_sessions_are_served():
    """One class: its mean says nothing, what a session has had says a little, the truth a lot."""
    runs = [s.run(leave_out=("human",)) for s in read_agent_sessions(published("agent_sessions"))]
    applications = recorded_applications({"coding_agent": runs})
    workloads = [poisson_workload(applications, 0.9, 1000, seed) for seed in range(3)]
    mean = {
        type(p): np.mean([simulate(w, p).mean for w in workloads])
        for p in (FCFS(), ClassMean(), SERPT(), Oracle())
    }
    assert mean[ClassMean] == mean[FCFS]
    assert mean[Oracle] < 0.5 * mean[SERPT] < 0.5 * mean[FCFS]


def test_recorded_requests_arrive_in_bursts():
    requests = list(read_mooncake(published("mooncake")))
    chats = recorded_applications({"chat": [request.run() for request in requests]})
    smooth = poisson_workload(chats, 0.7, 2000)
    bursty = with_arrivals(smooth, [request.arrival_seconds for request in requests])
    assert bursty.arrivals[-1] == pytest.approx(smooth.arrivals[-1])
    assert simulate(bursty, FCFS()).mean > simulate(smooth, FCFS()).mean


def test_profiles_of_the_hermes_artifact():
    trace = read_hermes_artifact(published("hermes_artifact") / "pdgraphs.json.gz")
    profiles = {profile.application: profile for profile in trace}
    assert len(profiles) == trace.read == 9
    assert trace.skipped == {}
    agent = profiles["react_fever"]
    assert agent.entries == ("thought",) * 10
    assert agent.stages["thought"].successors.count("search") == 5
    assert agent.stages["search"].kind == "search"
    assert profiles["hugginggpt"].stages["dnn_execution"].kind == "model"
    for profile in profiles.values():
        runs = [profile.session(np.random.default_rng(seed)).run() for seed in range(20)]
        assert PDGraph.fit(runs).remaining().mean() > 0.0


def test_task_models_of_the_hermes_artifact():
    """Both files hold the nine applications of the paper; this one has a tenth."""
    trace = read_hermes_artifact(published("hermes_artifact") / "task_models_skewnorm.json.gz")
    profiles = {profile.application: profile for profile in trace}
    assert set(profiles) == {a.name for a in hermes_applications(1)} | {"multiturn_conversations"}
    assert trace.skipped == {}
    feedback = profiles["code_feedback"].stages["code_generation"]
    assert np.mean(feedback.gap_seconds) == pytest.approx(12.3, rel=0.01)  # of the container
    rounds = np.array(feedback.rounds)
    assert (rounds.size, rounds.sum()) == (164, 223)
    assert (feedback.successors, feedback.chances) == (("end",), (1.0,))
    merge = profiles["got_docmerge"]
    rng = np.random.default_rng(0)
    units = [span.unit for span in merge.session(rng).spans if not span.unit.startswith("before")]
    assert units == [
        *("generate1", "score1", "score1", "aggregate"),
        *("score2", "score2", "generate2", "score3"),
    ]
    reduce = profiles["langchain_mapreduce"]
    drawn = [[span.unit for span in reduce.session(rng).spans] for _ in range(400)]
    skipped = np.mean(["collapse_summaries" not in units for units in drawn])
    assert skipped == pytest.approx(0.137, abs=0.06)
    gap = next(s for s in profiles["hugginggpt"].session(rng).spans if s.unit.startswith("before"))
    assert (gap.unit, gap.kind) == ("before response_results", "tool")
    assert 2.0 < gap.seconds < 60.0


@pytest.mark.parametrize("name", ["pdgraphs", "task_models_skewnorm"])
def test_a_mix_of_the_samples_of_the_hermes_artifact(name):
    """At the weights of the paper; its table and the small file agree on the means."""
    profiles = list(read_hermes_artifact(published("hermes_artifact") / f"{name}.json.gz"))
    table = {a.name: a for a in hermes_applications(1)}
    weights = {name: a.weight for name, a in table.items()}
    mix = profiled_applications(profiles, weights=weights, training_runs=200)
    assert {a.name: a.weight for a in mix} == weights
    if name == "pdgraphs":
        for each in mix:
            assert each.true_mean_seconds == pytest.approx(table[each.name].mean_seconds, rel=0.2)
    work = poisson_workload(mix, 0.9, 300)
    assert simulate(work, Gittins()).mean < simulate(work, FCFS()).mean
