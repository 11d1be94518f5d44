"""Each format on a small file of its columns; those with published samples are read from them in
test_traces_real.py too."""

import json

import numpy as np
import pytest

from demand import CostModel, PDGraph
from demand.traces import (
    MalformedRecordError,
    Request,
    Span,
    read_agent_sessions,
    read_azure,
    read_bailian,
    read_burstgpt,
    read_fireact,
    read_hermes_artifact,
    read_kv_cache_tester,
    read_mooncake,
    read_opentelemetry,
    read_tau_bench,
    read_tracelab,
    read_vidur,
)


def jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_azure(tmp_path):
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n"
        "2023-11-16 18:17:04.0319600,3180,8\n"
        "2023-11-17 18:17:04.0319600+00:00,10,1\n"  # the files of 2024 name the zone
    )
    assert list(read_azure(path)) == [
        Request(0.0, 4808, 10),
        Request(0.052, 3180, 8),
        Request(86400.052, 10, 1),
    ]
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,1,1\n")
    with pytest.raises(MalformedRecordError, match="'TIMESTAMP': expected an ISO 8601 time"):
        list(read_azure(path))


def test_vidur(tmp_path):
    path = tmp_path / "vidur.csv"
    path.write_text(
        "arrived_at,num_prefill_tokens,num_decode_tokens,pd_ratio\n0.25,374,44,8.5\n4.5,396,109,3.6"
    )
    assert list(read_vidur(path)) == [Request(0.0, 374, 44), Request(4.25, 396, 109)]


def test_burstgpt(tmp_path):
    path = tmp_path / "burst.csv"
    header = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    path.write_text(header + "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,1087,0,1087,API log")
    assert list(read_burstgpt(path)) == [
        Request(0.0, 472, 18, category="ChatGPT"),
        Request(40.0, 1087, 0, category="GPT-4"),
    ]
    path.write_text("Session ID," + header + "7,5,ChatGPT,472,18,490,x\n,6,ChatGPT,1,1,2,x")
    assert [request.session for request in read_burstgpt(path)] == ["7", None]


def test_mooncake(tmp_path):
    path = jsonl(
        tmp_path / "m.jsonl",
        {"timestamp": 1500, "input_length": 600, "output_length": 5, "hash_ids": [4, 9]},
    )
    assert list(read_mooncake(path)) == [Request(0.0, 600, 5, block_ids=(4, 9), block_tokens=512)]


def test_bailian(tmp_path):
    def chat(chat_id, parent, at):
        return {
            "chat_id": chat_id, "parent_chat_id": parent, "timestamp": at, "input_length": 40,
            "output_length": 2, "type": "text", "turn": 1, "hash_ids": [1, 2],
        }  # fmt: skip

    path = jsonl(tmp_path / "q.jsonl", chat(5, -1, 61.1), chat(6, 5, 62.1), chat(7, 6, 63.1),
                 chat(9, 2, 64.1))  # fmt: skip
    requests = list(read_bailian(path))
    assert [(r.id, r.parent, r.session) for r in requests] == [
        ("5", None, "5"), ("6", "5", "5"), ("7", "6", "5"), ("9", "2", "2"),
    ]  # fmt: skip
    assert requests[1] == Request(1.0, 40, 2, "6", "5", "5", "text", (1, 2), 16)


def test_agent_sessions(tmp_path):
    def call(t, think, **other):
        return {"t": t, "in": 100, "out": 7, "api_s": 2.0, "think_s": think, "blocks": 1} | other

    inner = [call(0.0, 0.0), call(5.0, 3.0)]
    path = jsonl(
        tmp_path / "a.jsonl",
        {
            "session": "one",
            "calls": [
                call(0.0, 0.0),
                {"t": 4.0, "subagent": inner},
                call(20.0, 18.0, api_s=None),
                call(30.0, None),
            ],
        },
    )
    (session,) = read_agent_sessions(path)

    def llm(unit, at, seconds, *parents):
        return Span(unit, "llm", at, seconds, 0.0, 100, 7, parents=parents)

    assert session.id == "one"
    assert session.spans == (
        llm("llm", 0.0, 2.0),
        llm("subagent_llm", 4.0, 2.0, 0),
        Span("subagent_think", "human", 6.0, 3.0, parents=(1,)),
        llm("subagent_llm", 9.0, 2.0, 2),
        Span("think", "human", 2.0, 18.0, parents=(0,)),
        llm("llm", 20.0, None, 4),
        Span("think", "human", parents=(5,)),
        llm("llm", 30.0, 2.0, 6),
    )


def test_kv_cache_tester(tmp_path):
    def call(t, think, blocks, inputs=("text",), **other):
        return {
            "t": t, "type": "s", "model": "m", "in": 200, "out": 7, "hash_ids": blocks,
            "input_types": list(inputs), "stop": "", "api_time": 2.0, "think_time": think,
        } | other  # fmt: skip

    def subagent(t, first):
        return {"t": t, "type": "subagent", "agent_id": "a", "requests": [call(first, 0.0, [8])]}

    document = {
        "id": "trace_0001",
        "block_size": 64,
        "requests": [
            call(0.0, 0.0, [1, 2, 3]),
            call(8.0, 6.0, [1, 2, 4, 3], ("tool_result",)),
            subagent(12.0, 0.5),  # on a clock of its own
            subagent(40.0, 41.0),  # on that of the session
            call(90.0, 50.0, [1, 2, 4, 3], **{"in": 240}),
        ],
    }
    (tmp_path / "trace_0001.json").write_text(json.dumps(document, indent=1))
    (tmp_path / "trace_0002.json").write_text(json.dumps(document | {"id": "trace_0002"}))
    first, second = read_kv_cache_tester(tmp_path)
    assert (first.id, second.id) == ("trace_0001", "trace_0002")
    assert [(span.unit, span.kind, span.submit_seconds) for span in first.spans] == [
        ("llm", "llm", 0.0),
        ("tool", "tool", 2.0),
        ("llm", "llm", 8.0),
        ("subagent_llm", "llm", 12.5),
        ("subagent_llm", "llm", 41.0),
        ("think", "human", 40.0),
        ("llm", "llm", 90.0),
    ]
    cached = [span.cached_tokens for span in first.spans if span.unit == "llm"]
    assert cached == [0, 2 * 64, 4 * 64 - 16]  # at most the prompt
    del document["requests"][1]["out"]
    (tmp_path / "trace_0001.json").write_text(json.dumps(document))
    with pytest.raises(MalformedRecordError, match=r"trace_0001.*'requests\[1\]\.out': missing"):
        list(read_kv_cache_tester(tmp_path))
    (tmp_path / "trace_0001.json").write_text('{"id": "x",\n "block_size": }')
    with pytest.raises(MalformedRecordError, match=r"trace_0001.json, line 2: not JSON"):
        list(read_kv_cache_tester(tmp_path))


HERMES = {
    "hugginggpt": {
        "start": {"next_stages": ["plan", "plan"]},
        "plan": {
            "type": "llm",
            "input_len": [1800, 1900],
            "output_len": [100],
            "parallelism": [1],
            "next_stages": ["task"],
        },
        "task": {"type": "dnn", "exec_time": [25.0], "next_stages": ["respond"]},
        "respond": {
            "input_len": [500],
            "output_len": [400, 500],
            "parallelism": [2, 4],
            "next_stages": ["end", "end", "end", "respond"],
        },
    }
}


def test_hermes_artifact(tmp_path):
    path = tmp_path / "pdgraphs.json"
    path.write_text(json.dumps(HERMES))
    (profile,) = read_hermes_artifact(path)
    assert profile.application == "hugginggpt"
    assert {name: stage.kind for name, stage in profile.stages.items()} == {
        "plan": "llm", "task": "model", "respond": "llm",
    }  # fmt: skip
    rng = np.random.default_rng(0)
    graph = PDGraph.fit([profile.session(rng).run() for _ in range(300)])
    assert graph.branches("plan") == {"task": 1.0}
    assert graph.branches("respond")["respond"] == pytest.approx(0.25, abs=0.08)
    cost = CostModel()
    drawn = np.array([cost.run_seconds(profile.session(rng).run()) for _ in range(2000)])
    respond = 3 * (500 * 1e-4 + 450 * 0.06) / 0.75
    assert drawn.mean() == pytest.approx(1850e-4 + 6.0 + 25.0 + respond, rel=0.03)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"next_stages": ["nowhere"]}, "hugginggpt.task.next_stages': expected names of stages"),
        ({"next_stages": []}, "hugginggpt.task.next_stages': expected names of stages"),
        ({"type": "gpu"}, r"hugginggpt.task.type': expected one of llm, docker, dnn"),
        ({"exec_time": [-1.0]}, r"hugginggpt.task.exec_time\[0\]': expected at least 0"),
        ({"exec_time": []}, "hugginggpt.task.exec_time': has no samples"),
        ({"exec_time": None}, "hugginggpt.task.exec_time': missing"),
    ],
)
def test_broken_hermes_profiles(tmp_path, change, says):
    document = json.loads(json.dumps(HERMES))
    document["hugginggpt"]["task"] |= change
    path = tmp_path / "pdgraphs.json"
    path.write_text(json.dumps(document))
    with pytest.raises(MalformedRecordError, match=says):
        list(read_hermes_artifact(path))


def test_tracelab(tmp_path):
    def stamp(second):
        return f"2026-03-01T10:{second // 60:02}:{second % 60:02}Z"

    def row(session, inputs, outputs, tools=(), **other):
        events = [{"event_type": kind, "timestamp": stamp(at)} for kind, at in [*inputs, *outputs]]
        return {
            "session_id": session, "round_index": 0, "input_tokens_total": 900,
            "prefix_tokens": 800, "newly_append_tokens": 100, "output_tokens": 30,
            "timing_events": events,
            "tools": [
                {"tool_name": name, "emitted_at": stamp(at), "tool_wall_latency_ms": 1000 * took}
                for name, at, took in tools
            ],
        } | other  # fmt: skip

    user, result, text, called = "user_message", "tool_result", "text", "tool_call"
    tools = [("Bash", 6, 10), ("Read", 6, 1)]
    path = jsonl(
        tmp_path / "t.jsonl",
        row("a", [(user, 1)], [(called, 6)], tools),
        row("a", [(user, 80)], [(text, 90)]),
        row("a", [(result, 7), (result, 16)], [(text, 20)]),  # by time, not by line
        row("b", [], [("text", 5)], tools=[]),
    )
    first, second = read_tracelab(path)

    def llm(at, seconds, *parents):
        return Span("llm", "llm", at, seconds, 0.0, 900, 30, 800, parents=parents)

    assert first.spans == (
        llm(0.0, 5.0),
        Span("Bash", "tool", 5.0, 10.0, parents=(0,)),
        Span("Read", "tool", 5.0, 1.0, parents=(0,)),
        llm(15.0, 4.0, 1, 2),
        Span("user", "human", 19.0, 60.0, parents=(3,)),
        llm(79.0, 10.0, 4),
    )
    assert (second.id, second.spans) == ("b", (llm(0.0, 0.0),))
    assert second.arrival_seconds - first.arrival_seconds == 4.0
    undated = row("a", [], [])
    path = jsonl(tmp_path / "t.jsonl", row("a", [(user, 1)], []), undated)
    with pytest.raises(MalformedRecordError, match="line 2, field 'timing_events': no event of"):
        list(read_tracelab(path))
    rows = [row(name, [(user, 1)], []) for name in ("a", "b", "a")]
    with pytest.raises(MalformedRecordError, match="line 3, field 'session_id': the lines of a"):
        list(read_tracelab(jsonl(tmp_path / "t.jsonl", *rows)))


def otel(trace, name, begin, end, parent="root", **attributes):
    def value(of):
        return {"stringValue": of} if isinstance(of, str) else {"intValue": str(of)}

    listed = [{"key": k.replace("__", "."), "value": value(v)} for k, v in attributes.items()]
    return {
        "traceId": trace,
        "spanId": name,
        "name": name,
        "startTimeUnixNano": str(10**18 + begin * 10**9),
        "endTimeUnixNano": str(10**18 + end * 10**9),
        "attributes": listed,
    } | ({"parentSpanId": parent} if parent else {})


def export(*spans):
    service = {"attributes": [{"key": "service.name", "value": {"stringValue": "bot"}}]}
    return {"resourceSpans": [{"resource": service, "scopeSpans": [{"spans": list(spans)}]}]}


def chat(trace, begin, end, **attributes):
    usage = {"gen_ai__usage__input_tokens": 100, "gen_ai__usage__output_tokens": 9}
    return otel(trace, "chat m", begin, end, gen_ai__operation__name="chat", **usage, **attributes)


def tool(trace, name, begin, end):
    called = {"gen_ai__operation__name": "execute_tool", "gen_ai__tool__name": name}
    return otel(trace, f"execute_tool {name}", begin, end, **called)


def test_opentelemetry(tmp_path):
    path = jsonl(
        tmp_path / "o.jsonl",
        export(chat("t1", 1, 4, gen_ai__latency__time_in_queue=1), tool("t1", "shell", 4, 6)),
        export(
            tool("t1", "web", 4, 9),
            chat("t2", 3, 5, gen_ai__usage__cache_read__input_tokens=60),
            otel("t3", "GET /health", 1, 2, parent=None),
        ),
        export(
            chat("t1", 9, 12, gen_ai__conversation__id="c7"),
            otel("t1", "invoke_agent", 0, 13, parent=None, gen_ai__operation__name="invoke_agent"),
        ),
    )
    first, second = sorted(read_opentelemetry(path), key=lambda session: session.id)
    assert (first.application, first.attributes) == ("bot", {"conversation": "c7"})
    assert first.spans == (
        Span("chat", "llm", 1.0, 2.0, 1.0, 100, 9),
        Span("shell", "tool", 4.0, 2.0, parents=(0,)),
        Span("web", "tool", 4.0, 5.0, parents=(0,)),
        Span("chat", "llm", 9.0, 3.0, 0.0, 100, 9, parents=(1, 2)),
    )
    assert second.spans == (Span("chat", "llm", 0.0, 2.0, 0.0, 100, 9, 60),)


def test_opentelemetry_lets_go_of_finished_traces(tmp_path):
    root = otel("t1", "invoke_agent", 0, 13, parent=None)
    path = jsonl(tmp_path / "o.jsonl", export(chat("t1", 1, 4), root), export(chat("t2", 5, 6)),
                 export(chat("t1", 9, 12)))  # fmt: skip
    late = read_opentelemetry(path, wait_lines=1)
    assert next(iter(late)).id == "t1"
    with pytest.raises(MalformedRecordError, match=r"line 3, .*traceId': comes after its trace"):
        list(late)
    sizes = {session.id: len(session.spans) for session in read_opentelemetry(path)}
    assert sizes == {"t1": 2, "t2": 1}
    path = jsonl(tmp_path / "o.jsonl", export(chat("t1", 5, 4)))
    with pytest.raises(MalformedRecordError, match="endTimeUnixNano': time goes backwards"):
        list(read_opentelemetry(path))


def test_tau_bench(tmp_path):
    calls = [{"function": {"name": "find", "arguments": "{}"}}]
    written = json.dumps(calls)
    messages = [
        {"role": "system", "content": "s" * 40},
        {"role": "user", "content": "u" * 20},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "name": "find", "content": "t" * 16},
        {"role": "assistant", "content": "a" * 8},
        {"role": "user", "content": "###STOP###"},
    ]
    record = {"task_id": 3, "trial": 1, "reward": 1.0, "traj": messages}
    (session,) = read_tau_bench(jsonl(tmp_path / "t.jsonl", record))
    context = 60 / 4
    call = len(written) / 4
    assert session.spans == (
        Span("assistant", "llm", input_tokens=context, output_tokens=call, cached_tokens=0),
        Span("find", "tool", output_tokens=4, parents=(0,)),
        Span("assistant", "llm", None, None, 0.0, context + call + 4, 2, context + call,
             parents=(1,)),
        Span("user", "human", output_tokens=2.5, parents=(2,)),
    )  # fmt: skip
    assert session.attributes == {"task": "3", "trial": "1", "reward": 1.0}
    messages[1]["role"] = "critic"
    with pytest.raises(MalformedRecordError, match=r"'traj\[1\]\.role': expected system, user"):
        list(read_tau_bench(jsonl(tmp_path / "t.jsonl", record)))


def test_fireact_reads_messages_and_text_alike(tmp_path):
    question = "Who wrote it?\n"
    first = "Thought: look.\nAction: search[it]\n"
    second = "Thought: two at once.\nAction: lookup[x]\nThought: done.\nAction: finish[me]\n"
    third = "Thought: I know.\nAction: finish[me]\n"
    seen = ["Observation: found.\n", "Observation: nothing.\n", "Observation: Episode finished\n"]
    turns = [first, seen[0], second, seen[1], third, seen[2]]
    roles = ["user", *["assistant", "user"] * 3]
    messages = [
        {"role": role, "content": text}
        for role, text in zip(roles, [question, *turns], strict=True)
    ]
    path = jsonl(
        tmp_path / "f.jsonl",
        {"idx": 1, "reward": True, "traj": messages},
        {"idx": 2, "reward": False, "traj": question + "".join(turns)},
    )
    listed, plain = read_fireact(path, characters_per_token=2.0)
    assert listed.spans == plain.spans
    assert [(s.unit, s.kind) for s in plain.spans] == [
        ("thought", "llm"), ("search", "search"), ("thought", "llm"), ("lookup", "tool"),
        ("thought", "llm"),
    ]  # fmt: skip
    assert plain.spans[0].input_tokens == len(question) / 2
    assert plain.spans[2].output_tokens == len(second) / 2
    assert plain.spans[4].input_tokens == len(question + "".join(turns[:4])) / 2
    assert (listed.attributes["reward"], plain.attributes["reward"]) == (True, False)


def test_tokens_per_character_are_checked(tmp_path):
    for read in (read_tau_bench, read_fireact):
        with pytest.raises(ValueError, match=r"characters_per_token is 0.0; expected a positive"):
            read(tmp_path / "t.jsonl", characters_per_token=0.0)
    with pytest.raises(ValueError, match="wait_lines is -1"):
        read_opentelemetry(tmp_path / "t.jsonl", wait_lines=-1)
