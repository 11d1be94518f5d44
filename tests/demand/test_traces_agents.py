"""SWE-agent, LLMCompiler and TaskBench, on small documents of their forms."""

import gzip
import json

import pytest

from demand import CostModel, DemandError, PDGraph
from demand.traces import (
    MalformedRecordError,
    read_agent_sessions,
    read_llmcompiler,
    read_llmcompiler_plans,
    read_mini_swe_agent,
    read_mooncake,
    read_swe_agent,
    read_taskbench,
)


def step(response, action, observation, **more):
    return {"response": response, "action": action, "observation": observation} | more


def trajectory(*steps, history=None, **stats):
    history = history or [
        {"role": "system", "content": "s" * 40},
        {"role": "assistant", "content": "d" * 20, "is_demo": True},
        {"role": "user", "content": [{"type": "text", "text": "u" * 20}, {"type": "image"}]},
        {"role": "assistant", "content": "not heard before the first step"},
    ]
    info = {"exit_status": "submitted", "model_stats": stats} if stats else {}
    return {"trajectory": list(steps), "history": history, "info": info}


def written(path, document):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document))
    return path


def test_swe_agent(tmp_path):
    first = step("look" * 5, "open a.py\n", "o" * 60, execution_time=0.5)
    second = step("```\npython a.py\n```", "python a.py", "p" * 8)
    failed = step("no command", "", "try again")
    written(tmp_path / "one" / "a__a-1.traj", trajectory(first, second, failed))
    (session,) = read_swe_agent(tmp_path)  # in a folder of its own
    assert (session.id, session.application) == ("a__a-1", "swe_agent")
    assert [(s.unit, s.kind, s.seconds) for s in session.spans] == [
        ("agent", "llm", None), ("open", "container", 0.5), ("agent", "llm", None),
        ("python", "container", None), ("agent", "llm", None),
    ]  # fmt: skip
    calls = [s for s in session.spans if s.kind == "llm"]
    assert [s.input_tokens * 4 for s in calls] == [80, 80 + 30 + 60, 80 + 30 + 60 + 19 + 8]
    assert [s.output_tokens * 4 for s in calls] == [20 + 10, 19, 10]  # the tool call was written
    assert [s.cached_tokens * 4 for s in calls] == [0, 110, 80 + 30 + 60 + 19]
    run = session.run(assumed_seconds={"container": 2.0})
    assert [e.seconds for e in run if e.unit.kind == "container"] == [0.5, 2.0]
    assert PDGraph.fit([run]).branches("agent") == {"open": 1 / 3, "python": 1 / 3, "end": 1 / 3}


def test_swe_agent_counts_as_the_model_did(tmp_path):
    steps = step("a" * 10, "ls", "b" * 10), step("c" * 30, "submit", "")
    plain = written(tmp_path / "p" / "x.traj", trajectory(*steps))
    counted = written(
        tmp_path / "c" / "x.traj", trajectory(*steps, tokens_sent=90, tokens_received=7)
    )
    zero = written(tmp_path / "z" / "x.traj", trajectory(*steps, tokens_sent=0, tokens_received=0))
    sessions = [next(iter(read_swe_agent(path))) for path in (plain, counted, zero)]
    sums = [
        [sum(getattr(s, name) for s in session.spans if s.kind == "llm")
         for name in ("input_tokens", "output_tokens")]
        for session in sessions
    ]  # fmt: skip
    assert sums[0] == sums[2]
    assert sums[1] == pytest.approx([90, 7])
    assert sessions[1].attributes == {
        "exit_status": "submitted", "tokens_sent": 90.0, "tokens_received": 7.0,
    }  # fmt: skip
    shares = [s.spans[2].cached_tokens / s.spans[2].input_tokens for s in sessions]
    assert shares[1] == pytest.approx(shares[0])


def test_swe_agent_prompts_that_were_shortened(tmp_path):
    system, old = {"role": "system", "content": "s" * 8}, {"role": "user", "content": "o" * 40}
    short = {"role": "user", "content": "old"}
    path = written(
        tmp_path / "t" / "x.traj",
        trajectory(
            step("w" * 4, "ls", "x", query=[system, old]),
            step("w" * 4, "ls", "y", query=[system, short, {"role": "tool", "content": "x"}]),
        ),
    )
    calls = [s for s in next(iter(read_swe_agent(path))).spans if s.kind == "llm"]
    assert [s.input_tokens * 4 for s in calls] == [48, 12]
    assert [s.cached_tokens * 4 for s in calls] == [0, 8]


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"history": []}, "'trajectory': missing"),
        (trajectory(), "'trajectory': has no steps"),
        (trajectory(step(1, "ls", "")), r"'trajectory\[0\].response': expected a string"),
        (trajectory(step("a", "ls", "", execution_time=-1)), "expected at least 0 and finite"),
        (trajectory(step("a", "ls", ""), tokens_sent="x"), "'info.model_stats.tokens_sent'"),
    ],
)
def test_swe_agent_malformed(tmp_path, document, said):
    path = written(tmp_path / "t" / "x.traj", document)
    with pytest.raises(MalformedRecordError, match=said):
        list(read_swe_agent(path))


def said(role, content, at=None, **extra):
    stamp = {} if at is None else {"timestamp": at}
    return {"role": role, "content": content, "extra": extra | stamp}


def used(read, wrote, cached, created=1000):
    details = {"cached_tokens": cached}
    usage = {"prompt_tokens": read, "completion_tokens": wrote, "prompt_tokens_details": details}
    return {"created": created, "usage": usage}


MINI = [
    {"role": "system", "content": "s" * 40},
    {"role": "user", "content": "u" * 20},
    said("assistant", None, 1003.5, response=used(150, 11, 32),
         actions=[{"command": "ls -la"}, {"command": "cat a.py"}]),
    said("tool", "a.py", 1004.0),
    said("tool", "x = 1", 1004.25),
    said("assistant", "done", 1010.0, response=used(180, 7, 160), actions=[{"command": "submit"}]),
    said("exit", "diff"),
]  # fmt: skip


def test_mini_swe_agent(tmp_path):
    document = {"info": {"exit_status": "Submitted"}, "messages": MINI, "instance_id": "a__a-1"}
    written(tmp_path / "one" / "x.traj.json", document)
    (session,) = read_mini_swe_agent(tmp_path)
    assert (session.id, session.application) == ("a__a-1", "mini_swe_agent")
    assert session.arrival_seconds == 1000.0
    assert session.attributes == {"exit_status": "Submitted"}
    assert [(s.unit, s.submit_seconds, s.seconds) for s in session.spans] == [
        ("agent", 0.0, 3.5), ("ls", 3.5, 0.5), ("cat", 4.0, 0.25), ("agent", 4.25, 5.75),
    ]  # fmt: skip
    calls = [s for s in session.spans if s.kind == "llm"]
    assert [(s.input_tokens, s.output_tokens, s.cached_tokens) for s in calls] == [
        (150, 11, 32), (180, 7, 160),
    ]  # fmt: skip
    measured = session.run(llm="measured", prompt="fresh")
    assert CostModel().run_seconds(measured) == pytest.approx(10.0)
    assert [e.input_tokens for e in measured if e.unit.name == "agent"] == [118, 20]


def test_mini_swe_agent_without_usage_and_times(tmp_path):
    messages = [
        {"role": "user", "content": "u" * 40},
        {"role": "assistant", "content": "no command"},
        {"role": "user", "content": "say a command"},
        {"role": "assistant", "content": "THOUGHT\n```mswea_bash_command\npython a.py\n```"},
        {"role": "user", "content": "ok"},
    ]
    path = written(tmp_path / "t" / "b__b-2.traj.json", {"messages": messages})
    (session,) = read_mini_swe_agent(path)
    assert session.id == "b__b-2"
    assert [(s.unit, s.seconds) for s in session.spans] == [
        ("agent", None), ("agent", None), ("python", None),
    ]  # fmt: skip
    assert [s.input_tokens * 4 for s in session.spans if s.kind == "llm"] == [40, 63]
    assert session.spans[1].cached_tokens == 12.5


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([{"role": "user", "content": "x"}], "no call of the model"),
        ([{"role": "pilot", "content": "x"}], "expected system, user, assistant, tool or exit"),
        ([MINI[2], said("tool", "late", 1001.0)], "time goes backwards"),
        ([said("assistant", "x", response={"usage": {}})], "usage.prompt_tokens': missing"),
    ],
)
def test_mini_swe_agent_malformed(tmp_path, messages, told):
    path = written(tmp_path / "t" / "x.traj.json", {"messages": messages})
    with pytest.raises(MalformedRecordError, match=told):
        list(read_mini_swe_agent(path))


def node(task, *arguments):
    return {"task": task, "arguments": list(arguments)}


NODES = [
    node("Mix", "<node-1>", "<node-2>"), node("Cut", "a.mp4"), node("Cut", "<node-3>"),
    node("Find", "b"),
]  # fmt: skip


def taskbench(nodes, links=None, **more):
    steps = [f"step {at}" for at, _ in enumerate(nodes)]
    links = [] if links is None else [{"source": a, "target": b} for a, b in links]
    task = {"id": "7", "type": "dag", "user_request": "r" * 40, "task_steps": steps}
    return task | {"task_nodes": nodes, "task_links": links} | more


def read(path, *records, reader=read_taskbench, **options):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return list(reader(path, **options))


def test_taskbench(tmp_path):
    (session,) = read(tmp_path / "data.json", taskbench(NODES))
    assert (session.id, session.application) == ("7", "taskbench")
    assert session.attributes == {"type": "dag"}
    # both cuts before the mix, the second after what it cuts was found
    spans = [(s.unit, s.kind, s.parents) for s in session.spans]
    assert spans[0] == ("plan", "llm", ())
    at = {unit: [n for n, s in enumerate(spans) if s[0] == unit] for unit in ("Mix", "Cut", "Find")}
    assert spans[at["Mix"][0]][2] == tuple(at["Cut"])
    assert {spans[n][2] for n in at["Cut"]} == {(0,), (at["Find"][0],)}
    assert session.spans[0].input_tokens == 10.0
    run = session.run(assumed_seconds={"tool": 3.0})
    assert sum(e.seconds or 0.0 for e in run) == 12.0
    with pytest.raises(DemandError, match="does not say how long 'Cut'"):
        session.run()


def test_taskbench_links_and_its_other_forms(tmp_path):
    nodes = [node("book", {"name": "to", "value": "Rome"}), node("pay"), node("tell")]
    line = taskbench(nodes, [("book", "pay"), ("pay", "tell"), ("book", "tell")])
    names = {"user_request": "instruction", "task_steps": "tool_steps", "task_nodes": "tool_nodes",
             "task_links": "tool_links"}  # fmt: skip
    hub = {
        names.get(name, name): json.dumps(value) if isinstance(value, list) else value
        for name, value in line.items()
    }
    of_model = {
        "id": "7", "user_request": line["user_request"],
        "result": {name: line[name] for name in ("task_steps", "task_nodes", "task_links")},
    }  # fmt: skip
    sessions = read(tmp_path / "data.json", line, hub, of_model)
    for session in sessions:
        assert [s.unit for s in session.spans] == ["plan", "book", "pay", "tell"]
        assert [s.parents for s in session.spans] == [(), (0,), (1,), (1, 2)]
        run = session.run(units="side_by_side", assumed_seconds={"tool": 1.0})
        assert [execution.after for execution in run] == [(), (0,), (1,), (1, 2)]
        assert session.spans[0].input_tokens == 10.0
    # a tool that comes twice is not told apart by its name
    twice = taskbench([node("a"), node("a", "<node-0>"), node("b")], [("a", "b")])
    (session,) = read(tmp_path / "twice.json", twice)
    waits = {(s.unit, s.parents) for s in session.spans[1:]}
    assert ("b", (0,)) in waits


def test_taskbench_counted_from_one(tmp_path):
    """As in published data: where references cannot be meant, the links alone are believed."""
    chain = [node("draw", "a.txt"), node("colour", "<node-1>"), node("show", "<node-1>")]
    alone = taskbench([{"task": "simplify", "arguments": "<node-0>"}])
    linked = taskbench(chain, [("draw", "colour"), ("colour", "show")])
    first, second = read(tmp_path / "data.json", linked, alone)
    assert [s.parents for s in first.spans] == [(), (0,), (1,), (2,)]
    assert [s.parents for s in second.spans] == [(), (0,)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (taskbench([]), "'task_nodes': has no nodes"),
        (taskbench([node("a", "<node-1>"), node("b", "<node-0>")]), "tools wait for each other"),
        (taskbench([node("a", "<node-0>"), node("b")]), r"waits for node 0, which is itself or"),
        (taskbench([node("a"), node("b", "<node-5>")]), r"'task_nodes\[1\].arguments'"),
        (
            taskbench([node("a", "<node-0>"), node("a"), node("b")], [("a", "b")]),
            r"'task_nodes\[0\].arguments'",  # links do not tell which of the two
        ),
        (
            {"id": "1", "user_request": "x", "result": {"task_nodes": [node("a", "<node-0>")]}},
            "waits for node 0, which is itself or none",
        ),
        (taskbench([node("a")], [("a", "z")]), r"target': expected a tool of the plan"),
        ({"id": "1", "instruction": "x", "tool_nodes": "[{]"}, "expected a list, or one as JSON"),
        ({"id": "1", "instruction": "x", "tool_nodes": "{}"}, "expected a list, or one as JSON"),
    ],
)
def test_taskbench_malformed(tmp_path, line, said):
    with pytest.raises(MalformedRecordError, match=said):
        read(tmp_path / "data.json", line)


def stats(calls, tokens, times):
    return {"calls": calls, "input_tokens": tokens[0], "output_tokens": tokens[1],
            "all_times": times}  # fmt: skip


def stored(seconds, found):
    return {"question": "q", "label": "yes", "answer": "yes", "time": seconds, "stats": found}


def test_llmcompiler(tmp_path):
    planner, executor = stats(2, (900, 60), [1.0, 2.0]), stats(2, (400, 20), [0.5, 0.5])
    react, none = stats(3, (300, 30), [1.0, 1.0, 1.0]), stats(0, (0, 0), [])
    path = written(
        tmp_path / "s" / "store.json",
        {
            "a": stored(10.0, {"planner": planner | {"num_tasks": 3}, "executor": executor}),
            "b": stored(5.0, {"total": react}),
            "c": stored(2.0, {"planner": stats(1, (450, 30), []), "executor": none}),
        },
    )
    compiled, reacted, failed = read_llmcompiler(path)
    assert [s.unit for s in compiled.spans] == ["plan", "tools", "join"] * 2
    assert [s.seconds for s in compiled.spans] == [1.0, 3.0, 0.5, 2.0, 3.0, 0.5]
    assert compiled.spans[3].input_tokens == 450.0
    run = compiled.run(llm="measured")
    assert CostModel().run_seconds(run) == pytest.approx(10.0)
    assert compiled.attributes == {"label": "yes", "answer": "yes"}
    assert reacted.application == "react"
    assert [s.unit for s in reacted.spans] == ["thought", "action"] * 2 + ["thought"]
    assert [s.seconds for s in reacted.spans] == [1.0] * 5
    assert [(s.unit, s.seconds) for s in failed.spans] == [("plan", None), ("tools", 2.0)]
    streamed = written(tmp_path / "s" / "x.json",
                       {"a": stored(1.0, {"planner": planner, "executor": executor})})  # fmt: skip
    assert next(iter(read_llmcompiler(streamed))).spans[1].seconds == 0.0


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "'a.stats': missing: store results with --do_benchmark"),
        ({"planner": stats(0, (1, 1), []), "executor": stats(0, (0, 0), [])}, "at least one call"),
        ({"total": stats(1, (1, 1), [1, 2])}, "expected at most 1 times"),
        ({"planner": stats(1, (1, 1), [1]), "executor": stats(2, (1, 1), [1, 1])}, "more than 1"),
    ],
)
def test_llmcompiler_malformed(tmp_path, found, said):
    path = written(tmp_path / "s" / "store.json", {"a": stored(1.0, found)})
    with pytest.raises(MalformedRecordError, match=said):
        list(read_llmcompiler(path))


PLANS = """Here are some examples.
Question: Which of both is deeper?
1. search("one")
2. search('two')
3. math("deeper?", ["$1", "${2}"]
Thought: I can answer now.
4. join()<END_OF_PLAN>
###

Question: What is it?
1. join()
"""


def test_llmcompiler_plans(tmp_path):
    path = tmp_path / "plans.txt"
    path.write_text(PLANS)
    plans = list(read_llmcompiler_plans(tmp_path))
    assert [plan.id for plan in plans] == ["line 3", "line 11"]
    assert [(s.unit, s.kind, s.parents) for s in plans[0].spans] == [
        ("plan", "llm", ()), ("search", "search", (0,)), ("search", "search", (0,)),
        ("math", "tool", (1, 2)), ("join", "llm", (1, 2, 3)),
    ]  # fmt: skip
    assert plans[0].attributes == {"task": "Which of both is deeper?"}
    run = plans[0].run(units="side_by_side", assumed_seconds={"search": 2.0, "tool": 1.0})
    assert [execution.after for execution in run] == [(), (0,), (0,), (1, 2), (1, 2, 3)]
    assert plans[0].spans[0].input_tokens == len("Which of both is deeper?") / 4
    assert [(s.unit, s.parents) for s in plans[1].spans] == [("plan", ()), ("join", (0,))]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1. search(a)\n", "line 1, field 'plan': ends before join"),
        (
            "1. search($2)\n2. search(a)\n3. join()\n",
            "task 1 waits for task 2, which is",
        ),
        ("1. a()\n1. b()\n2. join()\n", "task 1 comes twice"),
    ],
)
def test_llmcompiler_plans_malformed(tmp_path, text, said):
    path = tmp_path / "plans.txt"
    path.write_text(text)
    with pytest.raises(MalformedRecordError, match=said):
        list(read_llmcompiler_plans(path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps({"a": 1, "b": [2]}, indent=1), "one JSON document, an object of 2 over 6"),
        (json.dumps([{"a": 1}] * 3), r"a list of 3 over 1 line; .* jq -c '\.\[\]' > x.jsonl"),
        (json.dumps({"q1": {"a": 1}, "q2": {"a": 2}}), r"of 2 over 1 line; .* jq -c '\.\[\]'"),
        (
            "\n".join(json.dumps({"a": at, "b": 1}, indent=2) for at in range(3)),
            r"several JSON documents, the first an object of 2 over 4 lines; .* jq -c '\.' >",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("skip", ["raise", "skip"])
def test_a_document_in_place_of_json_lines_is_named(tmp_path, text, said, skip):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DemandError, match=said):
        list(read_mooncake(path, on_error=skip))
    packed = tmp_path / "x.jsonl.gz"
    with gzip.open(packed, "wt") as file:
        file.write(text)
    with pytest.raises(DemandError, match=r"gunzip -c x.jsonl.gz \| jq"):
        list(read_agent_sessions(packed, on_error=skip))


def test_a_first_line_that_is_malformed_alone_is_one_malformed_line(tmp_path):
    path = tmp_path / "x.jsonl"
    good = json.dumps({"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": []})
    for bad in ("[1, 2]", '{"a": {}}', "7", "{"):
        path.write_text(f"{bad}\n{good}\n")
        assert len(list(read_mooncake(path, on_error="skip"))) == 1
