"""The README's code runs as pasted, and its test command is the one CI runs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from tests.helpers import tiny_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize(
    ("blocks", "prints"),
    [
        ([0], ["bells", "recomputed"]),
        ([1, 2], ["Answer : 1", "tokens seen", "bytes held", "attention kept"]),
        ([3], ["PDGraph", "rank", "SimulationResult(Gittins("]),
    ],
    ids=["picache", "sparsity", "demand"],
)
def test_blocks_run_and_print_what_the_text_says(blocks, prints, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    names: dict = {}
    for block in blocks:  # one goes on from the one before
        exec(compile(BLOCKS[block], f"README block {block}", "exec"), names)
    out = capsys.readouterr().out
    for text in prints:
        assert text in out, out


def test_every_block_is_run():
    assert len(BLOCKS) == 4


def test_ci_runs_the_command_of_the_readme():
    commands = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    assert [c.rsplit("python ", 1)[1] for c in commands] == [
        "examples/experiments/quickstart.py",
        "-m pytest -n auto",
    ]
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


@pytest.fixture
def render_tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "experiments"))
    import render_tables

    return render_tables


def test_the_tables_are_those_of_the_result_files(render_tables):
    for page, results in render_tables.PAGES.items():
        assert (ROOT / page).read_text() == render_tables.rendered(page), page
        for result, tables in results.items():
            record = render_tables.record_of(result)
            assert {"configuration", "environment"} <= set(record), result
            for table in tables:
                assert table(record).count("\n| ") > 2, result  # two rows at least


def test_every_block_of_every_page_is_rendered(render_tables):
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        found = re.findall(r"<!-- tables of docs/results/(\w+)\.json -->", page.read_text())
        wanted = render_tables.PAGES.get(str(page.relative_to(ROOT)), {})
        assert set(found) == set(wanted), page


def test_a_page_gets_all_of_its_blocks_or_none(render_tables):
    begin, end = "<!-- tables of docs/results/x.json -->", render_tables.END
    page = f"a\n{begin}\nold\n{end}\nb\n{begin}\n{end}\nc\n"
    filled = render_tables.fill(page, "x", ["one", "two"])
    assert filled == f"a\n{begin}\none\n{end}\nb\n{begin}\ntwo\n{end}\nc\n"
    assert render_tables.fill(filled, "x", ["one", "two"]) == filled
    with pytest.raises(ValueError, match=r"2 blocks of x\.json on a page, 1 texts"):
        render_tables.fill(page, "x", ["one"])


def test_the_quickstart_links_own_files_on_any_model(tmp_path):
    """As a user would: a model folder, two files, a question; answers, report and JSON."""
    model = tiny_model("llama")
    words = {f"w{i}": i for i in range(128)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text(" ".join(f"w{i}" for i in range(5, 40)))
    (tmp_path / "b.txt").write_text(" ".join(f"w{i}" for i in range(60, 90)))
    command = [
        sys.executable,
        str(ROOT / "examples" / "experiments" / "quickstart.py"),
        "--out",
        str(tmp_path),
    ]
    command += ["--model", str(tmp_path / "model"), "--question", "w7 w8", "--new-tokens", "4"]
    files = ["--documents", str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command + files, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert "LegoLink-4, 4 dummies" in run.stdout
    record = json.loads((tmp_path / "own_documents.json").read_text())
    rows = record["linking"]
    assert [row["arm"] for row in rows][:2] == ["full", "naive"]
    assert rows[0]["kl"] < 1e-9 < rows[1]["kl"]
    assert rows[1]["recomputed"] == pytest.approx(2 / 67)
    assert all(answers[0] in run.stdout for answers in record["decoded"].values())


def test_the_quickstart_refuses_a_file_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "experiments"))
    import quickstart

    absent = str(tmp_path / "absent.txt")
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--question", "w7", "--documents", absent])
    with pytest.raises(SystemExit) as ended:
        quickstart.main()
    assert ended.value.code == 2
    assert "absent.txt is no file with text in it" in capsys.readouterr().err
