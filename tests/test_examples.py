"""The four starts run as a newcomer runs them, and print what their text says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script: str, folder: Path) -> str:
    """What a script prints, run from somewhere else."""
    command = [sys.executable, str(EXAMPLES / script)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    return tmp_path


def test_link_documents(elsewhere):
    out = run("link_documents.py", elsewhere)
    assert out.count("Corvale paints bells") == 6  # three methods, two orders
    assert out.count("3 hits, 0 misses") == 6  # nothing is compiled a second time
    assert "9 reused" in out  # full: the prefix alone
    assert "34 reused" in out  # naive: all but the query


def test_decode_in_bounded_memory(elsewhere):
    out = run("decode_in_bounded_memory.py", elsewhere)
    assert out.count("Answer : 3 .") >= 2  # dense, and Quest, which keeps all
    peaks = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) at the peak", out)]
    dense, quest, raas, streaming = peaks
    assert quest > dense > raas > streaming


def test_schedule_by_demand(elsewhere):
    out = run("schedule_by_demand.py", elsewhere)
    fcfs, mean, gittins, oracle = (float(m) for m in re.findall(r"server, mean ([\d.]+) s", out))
    assert oracle < gittins < mean < fcfs


def test_all_three(elsewhere):
    out = run("all_three.py", elsewhere)
    report, lookup = (float(m) for m in re.findall(r"rank ([\d.]+) s", out))
    assert lookup < report  # 4 tokens against 96
    assert re.findall(r"^(\w+) +mean completion", out, re.MULTILINE) == ["FCFS", "Gittins"]


@pytest.mark.parametrize("folder", ["experiments", "benchmarks"])
def test_every_script_finds_what_it_imports(folder, elsewhere):
    """Names of the packages that moved show here, not at the end of a long measurement."""
    code = (
        "import runpy, sys; sys.path.insert(0, sys.argv[1])\n"
        "for script in sys.argv[2:]: runpy.run_path(script, run_name='imported')\n"
    )
    scripts = sorted(str(s) for s in (EXAMPLES / folder).glob("*.py"))
    assert len(scripts) > 5
    command = [sys.executable, "-c", code, str(EXAMPLES / folder), *scripts]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
