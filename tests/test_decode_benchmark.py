"""The decode benchmark: its sums and sentences by hand, and its grid on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmarks(monkeypatch):
    for folder in ("benchmarks", "experiments"):
        monkeypatch.syspath_prepend(str(ROOT / "examples" / folder))


def row(arm, step_ms, context=1024, policy="", batch=1, **more):
    base = {"arm": arm, "policy": policy, "budget": None, "batch": batch, "context": context}
    name = f"{arm}{policy}{batch}{context}"
    return base | {"name": name, "step_ms": step_ms, "call": 0} | more


def test_the_best_dense_arm_is_the_faster_one_of_the_same_context_and_batch(benchmarks):
    from decode_tables import when_it_pays

    rows = [
        row("dense eager", 30.0),
        row("dense static", 9.0),
        row("dense eager", 10.0, context=4096),
        row("dense static", 18.0, context=4096),
        row("dense static", 1.0, batch=8),
        row("ours compiled", 10.0, policy="RaaS"),
        row("ours compiled", 5.0, policy="RaaS", context=4096),
        row("ours compiled", 20.0, policy="Full"),
        row("ours compiled", 1.0, policy="H2O", batch=2),  # no dense arm to hold it against
    ]
    full, raas = when_it_pays({"rows": rows}).split("\n")
    assert full == "- Full, batch 1: not faster (0.45 at 1,024 times the best dense arm measured)."
    assert raas.startswith("- RaaS, batch 1: faster from 4,096 on (0.90 at 1,024, 2.00 at 4,096 ")


def test_a_policy_that_wins_in_the_middle_alone_is_not_said_to_win_from_there_on(benchmarks):
    from decode_tables import when_it_pays

    steps = {1024: (9.0, 10.0), 2048: (9.0, 8.0), 4096: (9.0, 10.0)}
    rows = [row("dense static", dense, context=n) for n, (dense, _) in steps.items()]
    rows += [row("ours compiled", ours, n, "RaaS") for n, (_, ours) in steps.items()]
    assert "faster at 2,048 (" in when_it_pays({"rows": rows})


def test_a_step_reads_weights_once_and_what_its_policy_attends_to(benchmarks):
    from decode_arms import bytes_a_step
    from decode_grid import Cell
    from shapes import build_model

    model = build_model("llama-tiny", 0)
    weights = sum(p.nbytes for p in model.parameters()) - 512 * 128 * 4
    token = 2 * 2 * 2 * 32 * 4  # keys and values, layers, KV heads, head_dim, fp32
    read = {
        Cell("no attention", "", 0, 4): 0,
        Cell("dense static", "", 1024, 2): 2 * 1024 * token,
        Cell("ours compiled", "H2O", 1024, 2, 256): 2 * 256 * token,
        Cell("ours compiled", "RaaS", 1024, 1, 256): (256 + 16) * token,  # bounds: a token a page
        Cell("ours compiled", "Quest", 1024, 1, 256): 1024 * token,  # both layers are dense
        Cell("ours compiled", "H2O", 128, 1, 256): 128 * token,
    }
    assert {cell: bytes_a_step(model, cell) - weights for cell in read} == read


def test_what_earlier_calls_measured_is_kept_beside(benchmarks):
    from decode import before
    from decode_tables import spread

    record = row("ours compiled", 6.5, policy="RaaS", first_steps_seconds=90.0)
    for call, step in ((1, 7.0), (2, 6.0)):
        new = row("ours compiled", step, policy="RaaS", call=call)
        record = new | {"earlier": before(record)}
    assert [each["call"] for each in record["earlier"]] == [0, 1]
    failed = {"name": record["name"], "error": "out of memory"}
    assert before(failed | {"earlier": before(record)}) == before(record)
    line = "- RaaS, compiled, batch 1, 1,024: 6.00 to 7.00 ms in 3 calls."
    assert spread({"rows": [record, row("dense static", 9.0)]}) == line


def test_the_share_of_the_copy_bandwidth_is_that_of_the_row_s_own_call(benchmarks):
    from decode_tables import share_of_copy

    calls = [{"copy_bytes_a_second": 1e12}, {"copy_bytes_a_second": 4e12}]
    measured = row("dense static", 2.0, bytes_a_step=4e9, call=1)
    assert share_of_copy({"calls": calls}, measured) == pytest.approx(0.5)


def test_the_clock_counts_windows_behind_the_first_steps(benchmarks, monkeypatch):
    import decode_clock

    now = iter(range(1000))
    monkeypatch.setattr(decode_clock.time, "perf_counter", lambda: float(next(now)))
    clock = decode_clock.Clock(torch.device("cpu"), window=4, repeats=3)
    for _ in range(clock.new_tokens):
        clock(torch.ones(1, 1), torch.zeros(1, 2))
    # read at step 0, twice at the end of the first steps, and at the end of each window
    assert clock.windows() == [250.0, 250.0, 250.0]
    assert clock.new_tokens == 1 + decode_clock.WARM + 12


def decode(out, *more):
    command = [sys.executable, str(ROOT / "examples" / "benchmarks" / "decode.py")]
    command += ["--tiny", "--device", "cpu", "--window", "16", "--repeats", "2"]
    command += ["--out", str(out), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_calls_add_to_one_record_and_a_graph_serves_every_context(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    decode(tmp_path, "--part", "1", "--only", "no attention|dense.* 256$|ours compiled RaaS")
    out = decode(tmp_path, "--part", "2", "kernels", "--only", "ours .*Full|Random")
    record = json.loads((tmp_path / "decode.json").read_text())
    rows = {r["name"]: r for r in record["rows"] if "step_ms" in r}
    assert len(record["calls"]) == 2
    assert {r["call"] for r in rows.values()} == {0, 1}
    raas = [r for r in rows.values() if r["policy"] == "RaaS"]
    assert len(raas) == 3
    assert all((r["graphs"], r["graphs_once_warm"], r["graph_breaks"]) == (1, 0, 0) for r in raas)
    assert all(112 < r["tokens_kept"] <= 128 for r in raas)
    assert (tmp_path / "decode.png").stat().st_size > 10_000
    assert "RaaS(128), batch 1: " in out  # of the first call
    assert all(r["difference"] < 1e-5 for r in record["rows"] if "microseconds" in r)
