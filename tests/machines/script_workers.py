"""The experiments that load a model by its name, as scripts, with several workers."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "experiments"
sys.path.insert(0, str(SCRIPTS))
import link_evidence  # noqa: E402 - the examples are scripts, not a package
from growing_record import read  # noqa: E402

SENTENCE = "The river rose to the old bridge, and nobody in the village slept that night. "


@pytest.fixture
def data(tmp_path):
    """Data sets' files of made-up texts."""
    folder = tmp_path / "data"
    (folder / "text").mkdir(parents=True)
    (folder / "math500").mkdir()
    (folder / "text" / "war_and_peace_a.txt").write_text(f"{SENTENCE}\n\n" * 80)
    problems = [{"problem": f"{i} + {i}?", "solution": f"{SENTENCE}{2 * i}"} for i in range(8)]
    lines = "\n".join(map(json.dumps, problems))
    (folder / "math500" / "test.jsonl").write_text(lines)
    return folder


def run(script, *arguments):
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_retention_evidence_is_measured_by_two_workers(data, tmp_path):
    given = "--model reference --texts 2 --tokens 60 --prompt 20 --budgets 32 --answer 0".split()
    given += ["--arms", "RaaS, 4 sinks", "--together", "1", "--data", data]
    found = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        run("retention_evidence.py", *given, "--out", out, "--workers", workers)
        packed = (out / "retention_evidence_texts.json.gz").read_bytes()
        rows = json.loads(gzip.decompress(packed))["rows"]
        found.append([{k: v for k, v in row.items() if k != "seconds"} for row in rows])
    assert len(found[0]) == 2  # RaaS and ShareRaaS, a turn each
    assert found[0] == found[1]


def passages(count):
    return [f"Passage {i}. {SENTENCE}" for i in range(count)]


@pytest.fixture
def questions(tmp_path):
    """Files of the data sets of questions, made up of short paragraphs."""
    answered = {"question": "Where did the river rise to?", "answer": "bridge"}
    asked = {"question": answered["question"], "answers": [{"text": "bridge"}]}
    articles = [
        {"title": f"River_{i}", "paragraphs": [{"context": text, "qas": [asked]}]}
        for i, text in enumerate(passages(11))
    ]
    oracle = [
        {"question": "where is it", "text": text, "answers": ["bridge"]} for text in passages(11)
    ]
    titled = [[f"River {i}", [text]] for i, text in enumerate(passages(3))]
    paragraphs = [{"title": title, "paragraph_text": text} for title, (text,) in titled]
    hops = [answered | {"context": titled[::-1]}, answered | {"context": titled}]
    muses = [answered | {"paragraphs": paragraphs, "answer_aliases": []}] * 2
    files = {
        "xquad_en/xquad.en.json": json.dumps({"data": articles}),
        "nq_open_oracle/nq_open_oracle.jsonl.gz": "\n".join(map(json.dumps, oracle)),
        "hotpotqa/hotpotqa_train_100.jsonl.gz": "\n".join(map(json.dumps, hops)),
        "musique/musique_train_100.json.gz": json.dumps(muses),
    }
    for name, text in files.items():
        file = tmp_path / "questions" / name
        file.parent.mkdir(parents=True)
        file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return tmp_path / "questions"


def test_link_evidence_is_measured_by_two_workers(questions, tmp_path, monkeypatch):
    """Five questions in two turns, which share one of them."""
    given = "--model reference --questions 1 --together 3 --small --data".split()
    given = [*given, str(questions), "--out"]
    monkeypatch.setattr(sys, "argv", ["link_evidence.py", *given, str(tmp_path / "1")])
    link_evidence.main()  # in this process, which has imported what it takes
    run("link_evidence.py", *given, tmp_path / "2", "--workers", 2)
    alone, shared = (
        read(tmp_path / name / link_evidence.QUESTIONS)["questions"] for name in ("1", "2")
    )
    assert len(alone) == 5
    assert shared == alone


def test_nothing_that_is_sent_with_a_script_is_kept_by_a_cache_of_its_own():
    """`functools.cache` in a script is sent by name, and a worker does not import the script."""
    for script in SCRIPTS.glob("*.py"):
        text = script.read_text()
        if "from parallel import spread" in text:
            assert "@cache" not in text, script
