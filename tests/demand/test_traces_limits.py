"""Inputs without a bottom: what is too long, too deep or grows without end is refused in time."""

import gzip
import json
import tracemalloc

import pytest

from demand import DemandError, PDGraph
from demand.traces import read_agent_sessions, read_hermes_artifact, read_mooncake, read_vidur
from demand.traces.fields import MalformedRecordError

GOOD = {"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": []}
HEADER = "arrived_at,num_prefill_tokens,num_decode_tokens\n"


def good(at):
    return json.dumps(GOOD | {"timestamp": at}) + "\n"


@pytest.fixture
def grown(tmp_path):
    """A small file between two good lines that grows to fifty megabytes in one line."""
    path = tmp_path / "t.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(good(0))
        for _ in range(50):
            file.write("9" * (1 << 20))
        file.write("\n" + good(2000))
    assert path.stat().st_size < 1 << 17
    return path


def test_a_compressed_line_is_read_up_to_the_limit_alone(grown):
    tracemalloc.start()
    with pytest.raises(MalformedRecordError, match=r"line 2: too long a line .more than 100,000"):
        list(read_mooncake(grown, line_limit=100_000))
    trace = read_mooncake(grown, on_error="skip", line_limit=100_000)
    assert [r.arrival_seconds for r in trace] == [0.0, 2.0]
    assert trace.skipped == {"record: too long a line": 1}
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 << 20


def test_the_error_names_the_argument(grown):
    with pytest.raises(MalformedRecordError, match="raise line_limit= if it is meant"):
        list(read_mooncake(grown, line_limit=1e5))
    with pytest.raises(DemandError, match="line_limit is 0; expected a whole number of at least 1"):
        read_mooncake(grown, line_limit=0)


@pytest.mark.parametrize("ending", ["\n", "\r\n", ""])
def test_a_line_of_just_the_limit_is_read(tmp_path, ending):
    path = tmp_path / "t.jsonl"
    line = good(0).strip()
    path.write_bytes((line + ending).encode())
    limit = len(line + ending)
    assert len(list(read_mooncake(path, line_limit=limit))) == 1
    with pytest.raises(MalformedRecordError, match="too long a line"):
        list(read_mooncake(path, line_limit=limit - 1))


def test_rows_headers_and_documents_have_the_limit_too(tmp_path):
    rows = tmp_path / "t.csv"
    rows.write_text(HEADER + "0.0,1,1\n" + "1" * 200 + ",1,1\n" + "2.0,1,1\n")
    trace = read_vidur(rows, on_error="skip", line_limit=100)
    assert [r.arrival_seconds for r in trace] == [0.0, 2.0]
    rows.write_text(HEADER.strip() + "," + "x" * 200 + "\n0.0,1,1,1\n")
    with pytest.raises(MalformedRecordError, match="line 1: too long a line"):
        list(read_vidur(rows, on_error="skip", line_limit=100))
    document = tmp_path / "pdgraphs.json"
    document.write_text(json.dumps({"a": "x" * 200}))
    with pytest.raises(MalformedRecordError, match="too long a line"):
        list(read_hermes_artifact(document, line_limit=100))


@pytest.mark.parametrize("text", ["[" * 200_000, '{"session": ' + "9" * 6000 + "}"])
def test_depth_and_digits_are_refused_by_the_packages_error(tmp_path, text):
    path = tmp_path / "t.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(MalformedRecordError, match="line 1: JSON that cannot be read") as error:
        list(read_agent_sessions(path))
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("text", ["[" * 200_000, '{"window": ' + "9" * 6000 + "}"])
def test_a_graph_too_deep_or_of_too_many_digits_is_refused(tmp_path, text):
    path = tmp_path / "graph.json"
    path.write_text(text)
    with pytest.raises(DemandError, match="is not JSON"):
        PDGraph.load(path)
