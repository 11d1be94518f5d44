"""The README's code runs as pasted, and its test command is the one CI runs."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize(
    ("block", "prints"),
    [
        (0, ["bells", "recomputed"]),
        (1, ["Answer : 1", "tokens seen", "bytes held"]),
        (2, ["PDGraph", "rank", "SimulationResult(Gittins()"]),
    ],
    ids=["picache", "sparsity", "demand"],
)
def test_a_block_runs_and_prints_what_the_text_says(block, prints, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile(BLOCKS[block], f"README block {block}", "exec"), {})
    out = capsys.readouterr().out
    for text in prints:
        assert text in out, out


def test_every_block_is_run():
    assert len(BLOCKS) == 3


def test_ci_runs_the_command_of_the_readme():
    commands = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    assert [c.rsplit(" ", 1)[1] for c in commands] == ["examples/quickstart.py", "pytest"]
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_the_tables_are_those_of_the_result_file(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import render_tables

    record = json.loads((ROOT / "docs" / "results" / "quickstart.json").read_text())
    assert {"configuration", "environment"} <= set(record)
    rendered = render_tables.tables(record)
    assert rendered.count("\n| ") > 20
    assert rendered in README
