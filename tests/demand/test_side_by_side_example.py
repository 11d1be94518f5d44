"""The experiment on units side by side on a few jobs, and the code of its page."""

import asyncio
import json
import re
from pathlib import Path

import pytest

from demand import CostModel
from demand.units import check_waits, is_sequence
from tests.demand.openai_server import FakeServer

ROOT = Path(__file__).parents[2]
CODE = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs" / "side_by_side.md").read_text(), re.DOTALL
)


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "experiments"))
    import side_by_side

    return side_by_side


def test_the_record_has_what_its_tables_say(example, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", f"x --out {tmp_path} --jobs 40 --seeds 2 --held-out 3".split())
    monkeypatch.setattr(example, "LOADS", (0.5,))
    example.main()
    record = json.loads((tmp_path / "side_by_side.json").read_text())
    assert {"configuration", "environment"} <= set(record)
    printed = capsys.readouterr().out
    tables = example.gains_table, example.orders_table
    for table in (*tables, example.foreseen_table, example.deadlines_table):
        assert table(record) in printed
    of_loop = [row for row in record["gains"] if row["application"] == "loop"]
    for row, line in zip(of_loop, example.orders_table(record).split("\n")[2:], strict=False):
        assert row["policy"] in line
        assert f"{row['over_in_turn'][0]:.2f}" in line.split("|")[5]
    for row in record["gains"]:
        assert row["over_critical_path"][0] >= 1.0 - 1e-9
    assert len(record["gains"]) == 5 * 6
    for row in record["foreseen"]:
        assert row["critical path, stages"][0] >= 1.0 - 1e-9
        assert 0.0 <= row["stages, covered"][0] <= 1.0


def test_applications_are_what_the_page_says(example):
    cost = CostModel()
    for name in example.APPLICATIONS:
        runs = example.drawn(name, 20, seed=0)
        assert all(is_sequence(run) for run in runs) == (name == "loop")
        for run in runs:
            check_waits(name, run)
            ordered = example.by_stage(run)
            path = cost.run_seconds(run, "critical_path")
            assert cost.run_seconds(ordered, "critical_path") == pytest.approx(path)


def test_the_code_of_the_page_runs(capsys):
    names: dict = {}
    answers = []
    for block in CODE:
        exec(compile(block, "side_by_side.md", "exec"), names)
        answers.append(names.get("answer"))
    _, by_hand, planned = answers
    out = capsys.readouterr().out
    assert "['plan', 'search', 'join']" in out
    assert names["cost"].run_seconds(names["run"]) == pytest.approx(13.16)
    assert names["cost"].run_seconds(names["run"], "critical_path") == pytest.approx(10.16)

    async def served(answer):
        names["answer"] = answer
        async with FakeServer() as server:
            await names["serve"](server.url)

    asyncio.run(served(by_hand))
    asyncio.run(served(planned))
    assert "on a Monday" in capsys.readouterr().out
    graph = names["estimator"].graphs["planned answers"]
    assert graph.branches("plan") == {"calendar + search where + search who": 1.0}
    learnt = names["estimator"].graphs["answers"].runs[-1]
    assert [execution.after for execution in learnt] == [None, None, (0,), (0,), (1, 2, 3)]
    assert learnt[-1].unit.name == "join"
