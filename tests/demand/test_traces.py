"""The schema, the conversion to runs, and the reader: streaming, counting, refusing."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demand import CostModel, DemandError, Execution, PDGraph, Unit
from demand.traces import (
    MalformedRecordError,
    Request,
    Session,
    Span,
    read_agent_sessions,
    read_azure,
    read_mooncake,
    read_vidur,
)

LLM, TOOL, THINK = Unit("llm", "llm"), Unit("shell", "tool"), Unit("think", "human")
SESSION = Session(
    "s",
    "agent",
    (
        Span("llm", "llm", 0.0, 3.0, 1.0, 1000, 50, 0),
        Span("shell", "tool", 4.0, 2.0, parents=(0,), parallelism=3),
        Span("think", "human", 6.0, 60.0, parents=(1,)),
        Span("llm", "llm", 66.0, 4.0, input_tokens=1200, output_tokens=70, cached_tokens=1050),
    ),
)


def test_a_run_keeps_every_span_unless_told_otherwise():
    first, last = Execution(LLM, 1000, 50), Execution(LLM, 1200, 70)
    tool, think = Execution(TOOL, parallelism=3, seconds=2.0), Execution(THINK, seconds=60.0)
    assert SESSION.run() == [first, tool, think, last]
    assert SESSION.run(leave_out=("human", "tool")) == [first, last]
    model = Unit("llm", "model")
    assert SESSION.run(leave_out=("human", "tool"), llm="measured") == [
        Execution(model, 1000, 50, seconds=3.0),
        Execution(model, 1200, 70, seconds=4.0),
    ]
    fresh = SESSION.run(leave_out=("human", "tool"), prompt="fresh")
    assert [execution.input_tokens for execution in fresh] == [1000, 150]


def test_a_run_keeps_what_waits_for_what_if_asked():
    tool = {"seconds": 1.0}
    session = Session("s", "a", (
        Span("plan", "llm", input_tokens=4.0), Span("search", "search", parents=(0,), **tool),
        Span("user", "human", parents=(0,), **tool), Span("math", "tool", parents=(2,), **tool),
        Span("join", "llm", input_tokens=8.0, parents=(1, 3)),
    ))  # fmt: skip
    sides = "side_by_side"
    assert [e.after for e in session.run()] == [None] * 5
    assert [e.after for e in session.run(units=sides)] == [(), (0,), (0,), (2,), (1, 3)]
    # Who waited for what is left out waits for what that waited for.
    left = session.run(units=sides, leave_out=("human",))
    assert [e.after for e in left] == [(), (0,), (0,), (1, 2)]
    assert [e.after for e in session.run(units=sides, leave_out=("human", "tool", "llm"))] == [None]
    chain = Session("s", "a", session.spans[:2])
    assert chain.run(units=sides) == chain.run()  # a sequence says nothing


def test_the_demand_of_a_run_is_what_was_kept():
    assert CostModel().run_seconds(SESSION.run(leave_out=("human",))) == pytest.approx(
        2200 * 1e-4 + 120 * 0.06 + 3 * 2.0
    )
    assert PDGraph.fit([SESSION.run()]).branches("llm") == {"shell": 0.5, "end": 0.5}


def test_a_request_is_a_run_of_one_call():
    assert Request(0.0, 100, 7).run() == [Execution(LLM, 100, 7)]
    with pytest.raises(DemandError, match="an llm without tokens"):
        Request(0.0, 0, 0).run()


def test_times_of_a_span():
    assert (SESSION.spans[0].start_seconds, SESSION.spans[0].end_seconds) == (1.0, 4.0)
    assert Span("llm", "llm", 2.0).end_seconds is None
    assert Span("llm", "llm", seconds=2.0).end_seconds is None


def test_unknown_durations_are_assumed_aloud():
    session = Session("s", "agent", (Span("search", "search"), Span("shell", "tool")))
    with pytest.raises(DemandError, match=r"how long 'search' of kind 'search' took; .* give"):
        session.run()
    run = session.run(assumed_seconds={"search": 2.0, "tool": 1.0})
    assert [execution.seconds for execution in run] == [2.0, 1.0]
    by_unit_first = session.run(assumed_seconds={"search": 2.0, "tool": 1.0, "shell": 9.0})
    assert by_unit_first[1].seconds == 9.0
    measured = Session("s", "agent", (Span("llm", "llm", output_tokens=5),))
    assert measured.run(llm="measured", assumed_seconds={"llm": 3.0})[0].seconds == 3.0


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Span("llm", "llm", input_tokens=-1), "input_tokens of span 'llm' is -1"),
        (lambda: Span("llm", "llm", seconds=float("nan")), "seconds of span 'llm' is nan"),
        (lambda: Span("llm", "llm", input_tokens=1, cached_tokens=2), "2 cached of 1 prompt"),
        (lambda: Span("llm", "llm", parallelism=0), "parallelism of span 'llm' is 0"),
        (lambda: Session("s", "a", ()), "session 's' has no spans"),
        (lambda: Session("s", "a", (Span("x", "tool", parents=(0,)),)), "before its own"),
        (lambda: SESSION.run(leave_out=("humans",)), r"leave_out has \['humans'\]"),
        (lambda: SESSION.run(llm="clock"), "llm is 'clock'; expected one of tokens, measured"),
        (lambda: SESSION.run(prompt="new"), "prompt is 'new'"),
        (lambda: SESSION.run(units="apart"), "units is 'apart'"),
        (lambda: SESSION.run(leave_out=("llm", "tool", "human")), "nothing of session 's' is left"),
        (lambda: Session("s", "a", (Span("l", "llm"),)).run(prompt="fresh"), "prompt of 'l' was"),
    ],
)
def test_bad_spans_and_sessions_are_refused(make, says):
    with pytest.raises(DemandError, match=says):
        make()


def lines(path, *records):
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
    return path


def mooncake(timestamp, input_length=10, output_length=2, hash_ids=(1,)):
    return {
        "timestamp": timestamp,
        "input_length": input_length,
        "output_length": output_length,
        "hash_ids": list(hash_ids),
    }


GOOD, BAD = mooncake(0), mooncake(1000, output_length=-2)


def test_a_malformed_line_names_file_line_and_field(tmp_path):
    path = lines(tmp_path / "t.jsonl", GOOD, "\n", BAD)
    trace = read_mooncake(path)
    with pytest.raises(MalformedRecordError) as caught:
        list(trace)
    assert str(path) in str(caught.value)
    assert "line 3, field 'output_length': expected at least 0" in str(caught.value)
    assert caught.value.field == "output_length"
    assert trace.read == 1  # the good line before it was already handed out


def test_skipped_lines_are_counted_by_reason(tmp_path):
    path = lines(tmp_path / "t.jsonl", GOOD, BAD, "{half\n", BAD, "[1]\n", mooncake(2000))
    trace = read_mooncake(path, on_error="skip")
    assert [request.arrival_seconds for request in trace] == [0.0, 2.0]
    assert trace.read == 2
    assert trace.skipped == {
        "output_length: expected at least 0 and finite": 2,
        "record: not JSON": 1,
        "record: expected a JSON object": 1,
    }
    assert repr(trace).endswith("read 2, skipped 4)")


def test_each_iteration_reads_anew(tmp_path):
    path = lines(tmp_path / "t.jsonl", mooncake(5000), BAD)
    trace = read_mooncake(path, on_error="skip")
    assert list(trace) == list(trace)
    assert (trace.read, trace.skipped.total()) == (1, 1)


def test_a_trace_is_a_stream(tmp_path):
    """The first request is there before the broken tenth line is looked at."""
    path = lines(tmp_path / "t.jsonl", *map(mooncake, range(9)), "{half\n")
    trace = read_mooncake(path)
    assert next(iter(trace)).arrival_seconds == 0.0
    assert trace.read == 1


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"timestamp": 1}, "field 'input_length': missing .fields seen: timestamp"),
        (mooncake("soon"), "field 'timestamp': expected a number .seen: 'soon'"),
        (mooncake(True), "field 'timestamp': expected a number .seen: True"),
        (mooncake(float("nan")), "field 'timestamp': expected at least 0 and finite"),
        (mooncake(float("inf")), "field 'timestamp': expected at least 0 and finite"),
        (mooncake(1, input_length=1.5), "field 'input_length': expected whole tokens"),
        (mooncake(1, hash_ids=["a"]), "field 'hash_ids': expected a list of whole numbers"),
        ("{half\n", "not JSON"),
        ("7\n", "expected a JSON object .seen: int"),
    ],
)
def test_malformed_json_lines(tmp_path, wrong, says):
    path = lines(tmp_path / "t.jsonl", GOOD, wrong)
    with pytest.raises(MalformedRecordError, match=f"t.jsonl, line 2.*{says}"):
        list(read_mooncake(path))


def test_time_may_not_go_backwards(tmp_path):
    path = lines(tmp_path / "t.jsonl", mooncake(5000), mooncake(4000), mooncake(6000))
    with pytest.raises(MalformedRecordError, match="line 2, field 'timestamp': time goes back"):
        list(read_mooncake(path))
    skipping = read_mooncake(path, on_error="skip")
    assert [request.arrival_seconds for request in skipping] == [0.0, 1.0]
    inside = {"session": "s", "calls": [call(t=5.0), call(t=4.0)]}
    path = lines(tmp_path / "s.jsonl", inside)
    with pytest.raises(MalformedRecordError, match=r"field 'calls\[1\]\.t': time goes backwards"):
        list(read_agent_sessions(path))


def call(t=0.0, **other):
    return {"t": t, "in": 10, "out": 1, "api_s": 1.0, "think_s": 0.0} | other


def test_places_inside_of_a_record_are_counted_together(tmp_path):
    broken = [{"session": "s", "calls": [call(), call(**{"in": -n})]} for n in (1, 2)]
    deeper = {"session": "s", "calls": [call(), call(), call(**{"in": -3})]}
    path = lines(tmp_path / "s.jsonl", {"session": "s", "calls": [call()]}, *broken, deeper)
    trace = read_agent_sessions(path, on_error="skip")
    assert len(list(trace)) == 1
    assert trace.skipped == {"calls[].in: expected at least 0 and finite": 3}


def test_what_a_schema_refuses_is_placed_too(tmp_path):
    path = lines(tmp_path / "s.jsonl", {"session": "empty", "calls": []})
    with pytest.raises(
        MalformedRecordError, match=r"s.jsonl, line 1: session 'empty' has no spans"
    ):
        list(read_agent_sessions(path))


def test_wrong_formats_are_refused_even_when_skipping(tmp_path):
    path = lines(tmp_path / "t.csv", "a,b\n1,2\n")
    with pytest.raises(DemandError, match=r"t.csv, line 1: columns are a, b; expected TIMESTAMP"):
        list(read_azure(path, on_error="skip"))
    path = lines(tmp_path / "t.jsonl", {"a": 1}, {"a": 2})
    with pytest.raises(DemandError, match=r"no record that can be read; 2 lines were skipped: {'t"):
        list(read_mooncake(path, on_error="skip"))


def test_empty_files_and_folders_are_refused(tmp_path):
    for name, read in (("t.jsonl", read_mooncake), ("t.jsonl", read_agent_sessions)):
        with pytest.raises(DemandError, match="no record that can be read; the file is empty"):
            list(read(lines(tmp_path / name)))
    with pytest.raises(DemandError, match="columns are missing"):
        list(read_azure(lines(tmp_path / "t.csv")))
    (tmp_path / "folder").mkdir()
    with pytest.raises(DemandError, match=r"has no \.jsonl or \.jsonl\.gz file"):
        list(read_mooncake(tmp_path / "folder"))
    with pytest.raises(FileNotFoundError):
        list(read_mooncake(tmp_path / "none.jsonl"))
    with pytest.raises(DemandError, match="on_error is 'ignore'"):
        read_mooncake(tmp_path / "none.jsonl", on_error="ignore")


def test_gzip_and_folders(tmp_path):
    text = "".join(json.dumps(mooncake(at)) + "\n" for at in (3000, 4000))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(text)
    lines(tmp_path / "b.jsonl", mooncake(5000))
    (tmp_path / "README.md").write_text("not a trace")
    assert [r.arrival_seconds for r in read_mooncake(tmp_path)] == [0.0, 1.0, 2.0]


def test_broken_bytes_are_refused_with_their_place(tmp_path):
    good = json.dumps(GOOD).encode() + b"\n"
    whole = gzip.compress(good * 2000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "latin.jsonl").write_bytes(good + b'"\xff"\n')
    (tmp_path / "plain.jsonl.gz").write_bytes(good)
    for name in ("cut.jsonl.gz", "latin.jsonl", "plain.jsonl.gz"):
        with pytest.raises(DemandError, match=f"{name}, line .*cannot be read.*fetch the file"):
            list(read_mooncake(tmp_path / name, on_error="skip"))


def test_rows_of_the_wrong_length(tmp_path):
    header = "arrived_at,num_prefill_tokens,num_decode_tokens\n"
    path = lines(tmp_path / "t.csv", header, "0.5,10,2\n", "1.0,10\n", "2.0,10,3,4\n")
    with pytest.raises(
        MalformedRecordError, match=r"line 3: wrong number of columns .2 for a head"
    ):
        list(read_vidur(path))
    trace = read_vidur(path, on_error="skip")
    assert list(trace) == [Request(0.0, 10, 2)]
    assert trace.skipped == {"record: wrong number of columns": 2}


@given(
    st.lists(
        st.tuples(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**5)), min_size=1
    ),
    st.sets(st.integers(0, 50)),
)
def test_what_was_written_is_read_and_every_line_is_accounted_for(tmp_path_factory, rows, broken):
    at, table, expected = 0, ["arrived_at,num_prefill_tokens,num_decode_tokens"], []
    for number, (gap_milliseconds, prompt, output) in enumerate(rows):
        at += gap_milliseconds
        table.append(f"{at / 1000},{prompt},{output}")
        expected.append((at / 1000, prompt, output))
        if number in broken:
            table.append(f"{at / 1000},{prompt},-1")
    path = tmp_path_factory.mktemp("trace") / "t.csv"
    path.write_text("\n".join(table))
    trace = read_vidur(path, on_error="skip")
    read = [(r.arrival_seconds, r.input_tokens, r.output_tokens) for r in trace]
    assert read == [(pytest.approx(at - expected[0][0], abs=1e-6), *rest) for at, *rest in expected]
    assert trace.read + trace.skipped.total() == len(table) - 1
