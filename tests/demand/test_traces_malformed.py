"""A bad line is named with its place, and costs no more than itself when it is skipped."""

import gzip
import json
import re

import numpy as np
import pytest

from demand import DemandError
from demand.traces import (
    MalformedRecordError,
    Request,
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
from demand.traces.sources import json_lines
from demand.traces.trace import Trace


def jsonl(path, *records):
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
    return path


def table(path, *rows):
    path.write_text("\n".join(rows))
    return path


def mooncake(at, tokens):
    return {"timestamp": at * 1000, "input_length": tokens, "output_length": 1}


def bailian(at, tokens):
    return {
        "chat_id": at, "parent_chat_id": -1, "timestamp": at, "input_length": tokens,
        "output_length": 1, "type": "text", "hash_ids": [],
    }  # fmt: skip


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens"
BURST = "Timestamp,Model,Request tokens,Response tokens"
WRITE = {
    read_mooncake: lambda path, rows: jsonl(path, *(mooncake(*row) for row in rows)),
    read_bailian: lambda path, rows: jsonl(path, *(bailian(*row) for row in rows)),
    read_azure: lambda path, rows: table(
        path, AZURE, *(f"2023-11-16 18:{at // 60:02}:{at % 60:02},{n},1" for at, n in rows)
    ),
    read_vidur: lambda path, rows: table(path, VIDUR, *(f"{at},{n},1" for at, n in rows)),
    read_burstgpt: lambda path, rows: table(path, BURST, *(f"{at},m,{n},1" for at, n in rows)),
}


@pytest.mark.parametrize("read", WRITE, ids=lambda read: read.__name__)
def test_a_skipped_line_does_not_move_the_clock(tmp_path, read):
    rows = [(50, -1), (60, 5), (3000, -1), (61, 5), (40, 5), (63, 5)]
    trace = read(WRITE[read](tmp_path / "t", rows), on_error="skip")
    assert [request.arrival_seconds for request in trace] == [0.0, 1.0, 3.0]
    assert sum(trace.skipped.values()) == 3
    assert sum(n for why, n in trace.skipped.items() if "backwards" in why) == 1


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_files_of_two_clocks_are_no_trace(tmp_path, on_error):
    """As the code and the conversation file of Azure's release: skipping would mix the two."""
    write = WRITE[read_azure]
    write(tmp_path / "a.csv", [(60, 5), (70, 5)])
    write(tmp_path / "b.csv", [(70, 5), (75, -1), (80, 5)][: 1 if on_error == "raise" else 3])
    assert len(list(read_azure(tmp_path, on_error=on_error))) > 2
    write(tmp_path / "c.csv", [(65, 5), (90, 5)])
    trace = read_azure(tmp_path, on_error=on_error)
    with pytest.raises(DemandError, match=r"c\.csv begins before .*b\.csv ends; .* on its own"):
        list(trace)
    assert len(list(read_azure(tmp_path / "c.csv"))) == 2


def round_of(session, number, **other):
    events = [("user_message", 2 * number), ("text", 2 * number + 1)]
    return {
        "session_id": session, "round_index": number, "input_tokens_total": 10,
        "prefix_tokens": 1, "output_tokens": 3, "tools": [],
        "timing_events": [
            {"event_type": kind, "timestamp": f"2025-01-01T00:00:{at:02}Z"} for kind, at in events
        ],
    } | other  # fmt: skip


def test_a_bad_round_costs_itself_alone(tmp_path):
    bad = round_of("a", 1, prefix_tokens=99)
    good = [round_of(name, n) for name in "bcd" for n in (0, 1)]
    path = jsonl(tmp_path / "t.jsonl", round_of("a", 0), bad, round_of("a", 2), *good)
    says = "line 2, field 'prefix_tokens': expected at most input_tokens_total .seen: 99 of 10"
    with pytest.raises(MalformedRecordError, match=says):
        list(read_tracelab(path))
    trace = read_tracelab(path, on_error="skip")
    assert [(s.id, sum(x.unit == "llm" for x in s.spans)) for s in trace] == [
        ("a", 2), ("b", 2), ("c", 2), ("d", 2),
    ]  # fmt: skip
    assert trace.skipped == {"prefix_tokens: expected at most input_tokens_total": 1}
    path = jsonl(tmp_path / "last.jsonl", round_of("z", 0), bad)
    assert [s.id for s in read_tracelab(path, on_error="skip")] == ["z"]


def test_what_fails_at_the_end_of_a_trace_names_the_file(tmp_path):
    class Late:
        def feed(self, record):
            return ()

        def finish(self):
            raise DemandError("too late")

    path = jsonl(tmp_path / "t.jsonl", {})
    with pytest.raises(DemandError, match=r"t\.jsonl, at its end: too late"):
        list(Trace(path, json_lines, Late, "skip"))


def test_integers_too_long_to_read_are_malformed(tmp_path):
    long = '{"timestamp": ' + "1" * 5000 + ', "input_length": 3, "output_length": 2}\n'
    path = jsonl(tmp_path / "t.jsonl", mooncake(0, 1), long, mooncake(5, 1))
    with pytest.raises(MalformedRecordError, match=r"line 2: JSON that cannot be read .*digits"):
        list(read_mooncake(path))
    trace = read_mooncake(path, on_error="skip")
    assert [request.arrival_seconds for request in trace] == [0.0, 5.0]
    assert trace.skipped == {"record: JSON that cannot be read": 1}


@pytest.mark.parametrize("field", ["timestamp", "input_length"])
def test_grouped_digits_are_no_number(tmp_path, field):
    path = jsonl(tmp_path / "t.jsonl", mooncake(0, 1) | {field: "1_000"})
    with pytest.raises(MalformedRecordError, match=f"'{field}': expected a number .seen: '1_000'"):
        list(read_mooncake(path))


@pytest.mark.parametrize("types", [5, "no_tool_result_here", [1]])
def test_input_types_are_a_list_of_strings(tmp_path, types):
    calls = [
        {"t": t, "in": 10, "out": 5, "api_time": 1, "think_time": 1, "hash_ids": [1]}
        for t in (0, 2)
    ]
    document = {"id": "x", "block_size": 64, "requests": calls}
    path = jsonl(tmp_path / "t.json", document)
    (session,) = read_kv_cache_tester(path)
    assert [span.unit for span in session.spans] == ["think", "llm", "think", "llm"]
    calls[1]["input_types"] = types
    with pytest.raises(MalformedRecordError, match=r"requests\[1\]\.input_types': expected a list"):
        list(read_kv_cache_tester(jsonl(path, document)))


def otlp(resource=True, attributes=("input", "output"), **times):
    listed = [{"key": "gen_ai.operation.name", "value": {"stringValue": "chat"}}] + [
        {"key": f"gen_ai.usage.{name}_tokens", "value": {"intValue": "7"}} for name in attributes
    ]
    span = {
        "traceId": "t", "spanId": "1", "startTimeUnixNano": "1", "endTimeUnixNano": "2",
        "attributes": listed,
    } | times  # fmt: skip
    inside = {"scopeSpans": [{"spans": [span]}]}
    return {"resourceSpans": [inside | ({"resource": {}} if resource else {})]}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (otlp(endTimeUnixNano="1" + "0" * 400), "endTimeUnixNano': expected Unix nanoseconds"),
        (otlp(endTimeUnixNano=2**64), "endTimeUnixNano': expected Unix nanoseconds"),
        (otlp(startTimeUnixNano="-5"), "startTimeUnixNano': expected Unix nanoseconds"),
        (otlp(startTimeUnixNano="1_0"), "startTimeUnixNano': expected a whole number"),
        (otlp(attributes=["input"]), "gen_ai.usage.output_tokens': missing"),
        (otlp(attributes=[]), "gen_ai.usage.input_tokens': missing"),
    ],
)
def test_broken_spans_of_opentelemetry(tmp_path, line, says):
    path = jsonl(tmp_path / "t.jsonl", line)
    with pytest.raises(MalformedRecordError, match=says):
        list(read_opentelemetry(path))


def test_a_resource_of_opentelemetry_may_be_missing(tmp_path):
    (session,) = read_opentelemetry(jsonl(tmp_path / "t.jsonl", otlp(resource=False)))
    assert session.application == "unknown_service"


def test_an_open_quote_spoils_its_own_line(tmp_path):
    rows = ["0,1,2", '"1,1,2', "2,1,2", '3,1,"2', "4,1,2"]
    path = table(tmp_path / "t.csv", VIDUR, *rows)
    with pytest.raises(MalformedRecordError, match=r"t.csv, line 3: not CSV"):
        list(read_vidur(path))
    trace = read_vidur(path, on_error="skip")
    assert list(trace) == [Request(at, 1, 2) for at in (0.0, 2.0, 4.0)]
    assert trace.skipped == {"record: not CSV": 2}


def test_csv_fields_too_long_to_read(tmp_path):
    path = table(tmp_path / "t.csv", VIDUR, "0,1,2", "1" * 200_000 + ",1,2", "2,1,2")
    trace = read_vidur(path, on_error="skip")
    assert [request.arrival_seconds for request in trace] == [0.0, 2.0]
    with pytest.raises(DemandError, match=r"t.csv, line 1: not CSV: field larger than"):
        list(read_vidur(table(path, "x" * 200_000 + "," + VIDUR, "0,0,1,2")))


def test_columns_of_one_name_are_refused(tmp_path):
    path = table(tmp_path / "t.csv", VIDUR + ",num_prefill_tokens", "0,1,2,3")
    with pytest.raises(DemandError, match="line 1: columns num_prefill_tokens come twice; rename"):
        list(read_vidur(path, on_error="skip"))


STAGE = {"input_len": [1], "output_len": [1], "next_stages": ["end"]}
TASK = {"input_len": [10], "output_len": [5], "next_stages": {}}


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ({"a": STAGE | {"next_stages": ["a"]}}, r"app\.a\.next_stages': end cannot be reached"),
        (
            {
                "a": STAGE | {"next_stages": ["b", "end"]},
                "b": STAGE | {"next_stages": ["c"]},
                "c": STAGE | {"next_stages": ["b"]},
            },
            r"app\.b\.next_stages': end cannot be reached .from any of: \['b', 'c'\]",
        ),
        ({}, r"app\.start\.next_stages': an application without stages"),
        ({"start": {"next_stages": ["end"]}, "a": STAGE}, r"start.next_stages': expected names"),
        ({"a": STAGE | {"next": ["a"]}}, r"app\.a\.next': end cannot be reached"),
        ({"stage_list": ["b"], "a": TASK}, r"app\.b': missing"),
        ({"stage_list": [], "a": TASK}, r"app\.start\.next_stages': an application without"),
        ({"stage_list": ["a"], "a": STAGE}, r"app\.a\.next_stages': expected an object"),
        ({"stage_list": ["a"], "a": TASK | {"loops": [1.5]}}, r"loops\[0\]': expected a whole num"),
        ({"stage_list": ["a"], "a": TASK | {"stage_gap": [-1]}}, r"stage_gap\[0\]': expected at l"),
        (
            {"stage_list": ["a"], "a": TASK | {"next_stages": {"a": 0.8, "end": 0.4}}},
            r"app\.a\.next_stages': probabilities of more than 1 .seen: 1\.2",
        ),
        (
            {"stage_list": ["a"], "a": TASK | {"next_stages": {"b": 0.5}}},
            r"app\.a\.next_stages': expected names of stages, or end",
        ),
        (
            {"stage_list": ["a"], "a": TASK | {"next_stages": {"a": 1.0}}},
            r"app\.a\.next_stages': end cannot be reached",
        ),
        ({"a": STAGE | {"parallelism": [1, 0]}}, r"parallelism\[1\]': expected a whole number of"),
        ({"a": STAGE | {"parallelism": [1.5]}}, r"parallelism\[0\]': expected a whole number of"),
    ],
)
def test_profiles_whose_runs_would_not_end_or_call_nothing(tmp_path, stages, says):
    with pytest.raises(MalformedRecordError, match=says):
        list(read_hermes_artifact(jsonl(tmp_path / "p.json", {"app": stages})))


def test_a_profile_with_a_way_out_of_its_loop_is_drawn_from(tmp_path):
    loop = {"a": STAGE | {"next_stages": ["b"]}, "b": STAGE | {"next_stages": ["a", "end"]}}
    (profile,) = read_hermes_artifact(jsonl(tmp_path / "p.json", {"app": loop}))
    spans = profile.session(np.random.default_rng(0)).spans
    assert [span.unit for span in spans] == ["a", "b"] * (len(spans) // 2)


def test_a_bad_application_costs_itself_alone(tmp_path):
    bad = {"a": STAGE | {"next_stages": ["nowhere"]}}
    negative = {"a": STAGE | {"input_len": [1, -1]}}
    document = {"one": {"a": STAGE}, "bad": bad, "two": {"b": STAGE}, "none": None, "neg": negative}
    path = jsonl(tmp_path / "p.json", document | {"three": {"c": STAGE}})
    says = r"p\.json, line 1, field 'bad\.a\.next_stages': expected names of stages, or end .seen: "
    with pytest.raises(MalformedRecordError, match=says + r"\['nowhere'\]"):
        list(read_hermes_artifact(path))
    trace = read_hermes_artifact(path, on_error="skip")
    assert [profile.application for profile in trace] == ["one", "two", "three"]
    assert trace.read == 3
    assert trace.skipped == {
        "bad.a.next_stages: expected names of stages, or end": 1,
        "none: missing": 1,
        "neg.a.input_len[]: expected at least 0 and finite": 1,
    }
    (tmp_path / "q.json").write_text("[1]")
    trace = read_hermes_artifact(tmp_path, on_error="skip")
    assert len(list(trace)) == 3
    assert trace.skipped["record: expected a JSON object"] == 1
    with pytest.raises(DemandError, match="no record that can be read; 1 lines were skipped"):
        list(read_hermes_artifact(tmp_path / "q.json", on_error="skip"))


DOCUMENTS = {
    "indented list": (json.dumps([{"a": 1}, {"b": 2}], indent=1), r"a list of 2 .* jq -c '\.\[\]'"),
    "a member a line": ('[\n{"a": 1},\n{"b": 2}\n]\n', r"a list of 2 over 4 lines"),
    "one line": ('[{"a": 1}, {"b": 2}]', r"a list of 2 over 1 line"),
    "by key": (json.dumps({"x": {"a": 1}}, indent=1), r"an object of 1 .* jq -c '\.\[\]'"),
    "one record": (json.dumps({"a": 1, "b": [2]}, indent=1), r"an object of 2 .* jq -c '\.'"),
}


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_json_document_is_no_json_lines(tmp_path, name, zipped, on_error):
    """Skipping its lines would count thousands, or read the few that look like records."""
    text, says = DOCUMENTS[name]
    path = tmp_path / ("runs.json.gz" if zipped else "runs.json")
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    command = r"gunzip -c runs\.json\.gz" if zipped else r"cat runs\.json"
    says = rf"is one JSON document, {says}"
    for read in (read_tau_bench, read_fireact, read_agent_sessions, read_mooncake, read_tracelab):
        with pytest.raises(DemandError, match=says) as error:
            list(read(path, on_error=on_error))
        assert re.search(rf"{command} \| jq -c '\S+' > runs\.jsonl", str(error.value))


def test_a_line_that_is_cut_off_makes_no_document_of_a_file(tmp_path):
    path = tmp_path / "t.jsonl"
    good = json.dumps({"timestamp": 1, "input_length": 2, "output_length": 3, "hash_ids": [1]})
    path.write_text(f'{{"timestamp": 1,\n{good}\n[\n{good}\n')
    trace = read_mooncake(path, on_error="skip")
    assert len(list(trace)) == 2
    assert trace.skipped == {"record: not JSON": 2}


DIGITS = "9" * 5000


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (f"{DIGITS},1,1", "field 'arrived_at': expected at least 0 and finite"),
        (f"0,{DIGITS},1", "field 'num_prefill_tokens': expected at least 0 and finite"),
        (f"0,-{DIGITS},1", "field 'num_prefill_tokens': expected at least 0 and finite"),
        (f"0,{DIGITS}x,1", "field 'num_prefill_tokens': expected a number"),
        (f"0,5.{'0' * 9}{DIGITS},1", "field 'num_prefill_tokens': expected whole tokens"),
    ],
)
def test_a_field_of_thousands_of_digits_is_quoted_short(tmp_path, row, says):
    path = table(tmp_path / "t.csv", VIDUR, row)
    with pytest.raises(MalformedRecordError, match=says) as caught:
        list(read_vidur(path))
    assert len(str(caught.value)) < len(str(path)) + 250


def test_a_header_of_megabytes_is_quoted_short(tmp_path):
    path = table(tmp_path / "t.csv", "x" * 100_000, "1")
    with pytest.raises(DemandError, match=r"columns are xxx.*; expected arrived_at") as caught:
        list(read_vidur(path))
    assert len(str(caught.value)) < len(str(path)) + 500
