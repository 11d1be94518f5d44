"""What tests share: recorded sessions, and the transformers adapter, imported where asked for."""

import gzip
import json

import pytest


@pytest.fixture
def record_sessions(tmp_path):
    """Writes so many recorded sessions of four calls, whose contexts grow; gives their folder."""
    calls = [
        {"t": 20.0 * k, "in": 900 + 700 * k, "out": 40, "api_s": 2.0, "think_s": 10.0 * (k > 0)}
        for k in range(4)
    ]

    def record(sessions):
        folder = tmp_path / "agent_sessions"
        folder.mkdir()
        with gzip.open(folder / "sessions.jsonl.gz", "wt") as file:
            for number in range(sessions):
                file.write(json.dumps({"session": str(number), "calls": calls}) + "\n")
        return tmp_path

    return record


@pytest.fixture(scope="module")
def model():
    from tests.helpers import tiny_model

    return tiny_model("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def shared(model):
    """One engine for the tests that leave it as they found it."""
    from tests.demand.continuous import config
    from tests.demand.serving import serve

    with serve(model, config=config(max_queue_size=0)) as batching:
        yield batching
