"""The example that measures refinements: on runs whose first unit tells the rest, and its page."""

import json
from pathlib import Path

import numpy as np
import pytest

from demand import Execution, Unit

ROOT = Path(__file__).parents[2]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "experiments"))
    import refinement

    return refinement


def told_at_once(n, seed=0):
    """A second of asking, that tells how long the work will take: about 20 or 200 s."""
    rng = np.random.default_rng(seed)
    ask, work = Unit("ask", "llm"), Unit("work", "tool")
    return [
        [[Execution(ask, seconds=0.9 + 0.2 * long), Execution(work, seconds=spread * length)]]
        for long, spread in zip(rng.random(n) < 0.5, rng.uniform(0.5, 1.5, n), strict=True)
        for length in [200.0 if long else 20.0]
    ]


def test_what_the_first_unit_tells_closes_the_gap(example):
    data = example.DataSet("made up", told_at_once(400))
    result = example.experiment(data, seeds=2, jobs=60)
    closed = result["gap_closed"]["SERPT"]
    assert closed["none (artifact)"]["share"] == 0.0
    assert closed["nearest runs"]["share"] > 0.3
    assert closed["Pearson filter"]["share"] > 0.3
    assert closed["current unit"]["share"] == pytest.approx(0.0, abs=0.02)
    assert all(s["low"] <= s["share"] <= s["high"] for s in closed.values())
    nearest = result["calibration"]["nearest runs"]
    assert nearest["crps_ratio_to_none"] < 0.8
    low, high = nearest["crps_ratio_interval"]
    assert low < nearest["crps_ratio_to_none"] < high
    at_random = result["calibration_on_random_halves"]["nearest runs"]
    assert at_random["crps_ratio_to_none"] < 0.8
    lines = example.markdown({"made up": result}).splitlines()
    assert len(lines) == 3 + len(example.ARMS) + 1 + 2 + len(example.CHEAP)


def test_halves_share_no_task(example):
    tasks = told_at_once(11)
    data = example.DataSet("made up", tasks)
    assert data.by_time() == (tasks[:5], tasks[5:])
    first, second = data.at_random(seed=3)
    assert (len(first), len(second)) == (5, 6)
    assert not {id(task) for task in first} & {id(task) for task in second}
    assert first != tasks[:5]


def test_scores_are_those_of_all_questions_together(example):
    """However the tasks group the runs: sums and counts of each task add up to the report."""
    training, held_out = example.DataSet("made up", told_at_once(60)).by_time()
    estimator = example.estimators(training)["whole runs"]
    scores = example.Scores.of(estimator, held_out)
    runs = [run for task in held_out for run in task]
    report = example.calibrate(lambda p: estimator("agent", p), runs, example.AFTER_UNITS)
    means = scores.means(np.arange(len(held_out)))
    assert means == pytest.approx([report.overall.crps, *report.overall.coverage])
    assert scores.pits.size == report.overall.runs


def test_a_run_of_some_data_sets_keeps_the_results_of_the_others(example, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    sets = {name: example.DataSet(name, told_at_once(8, at)) for at, name in enumerate("ab")}
    monkeypatch.setattr(example, "data_sets", lambda folder: sets.items())
    command = f"x --out {tmp_path} --seeds 1 --jobs 5".split()
    path = tmp_path / "refinement.json"

    def run(*more):
        monkeypatch.setattr("sys.argv", [*command, *more])
        example.main()
        return json.loads(path.read_text())

    whole = run()
    assert list(whole["results"]) == list(whole["data"]) == ["a", "b"]
    path.write_text(json.dumps(whole | {"results": {"a": {"kept": 1}, "b": {"old": 1}}}))
    monkeypatch.setattr(example, "picture", lambda results, path: None)
    again = run("--only", "b")
    assert again["results"] == {"a": {"kept": 1}, "b": whole["results"]["b"]}
    path.write_text(json.dumps(whole | {"configuration": {}}))
    with pytest.raises(SystemExit, match="is of another configuration"):
        run("--only", "b")


def test_the_page_has_the_table_of_the_result_file(example):
    record = json.loads((ROOT / "docs" / "results" / "refinement.json").read_text())
    assert {"configuration", "environment", "data"} <= set(record)
    page = (ROOT / "docs" / "demand_graphs.md").read_text()
    assert example.markdown(record["results"]) in page


def test_the_code_of_the_page_runs(capsys, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    page = (ROOT / "docs" / "demand_graphs.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "demand_graphs.md", "exec"), {})
    assert "{'end': 0.5, 'plan': 0.5}" in capsys.readouterr().out
    assert (tmp_path / "graph.png").exists()
