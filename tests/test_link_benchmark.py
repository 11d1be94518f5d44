"""The benchmark of links: its table by hand, its texts, and some of its grid on a tiny model."""

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


def test_a_link_is_held_against_the_faster_full_prefill_of_its_own_prompts(benchmarks):
    from link_grid import FULL, Cell
    from link_tables import full_of, label

    def row(seconds, *cell, **more):
        return Cell(*cell, **more).asdict() | {"first_token_seconds": seconds}

    link = row(0.02, "LegoLink-16", 4096, 64, "host")
    rows = [
        row(0.12, FULL[0], 4096),
        row(0.10, FULL[1], 4096),
        row(0.05, FULL[0], 1024),
        row(0.01, FULL[0], 4096, batch=8),
        link,
    ]
    assert full_of({"rows": rows}, link)["arm"] == FULL[1]
    assert full_of({"rows": rows}, rows[3])["first_token_seconds"] == 0.01
    assert full_of({"rows": rows}, row(1.0, "naive", 7)) is None
    assert label(link) == "LegoLink-16, 64 chunks, host"


def test_kernels_side_by_side_count_once_as_busy(benchmarks):
    from link_profile import OTHERS, by_kind

    events = [(0.0, 10.0, "nvjet_sm90"), (5.0, 10.0, "Memcpy HtoD"), (30.0, 4.0, "split_kernel")]
    events += [(31.0, 2.0, "join_kernel"), (50.0, 1.0, "silu"), (60.0, 5.0, "place_kernel")]
    found = by_kind(events[::-1], 2)
    assert found["busy_ms"] == pytest.approx((15 + 4 + 1 + 5) / 2e3)
    kinds = {row["kind"]: (row["ms"], row["kernels"]) for row in found["kinds"]}
    assert kinds == {
        "matrix products": (0.005, 0.5),
        "copies": (0.005, 0.5),
        "attention": (0.003, 1.0),
        "placing chunks": (0.0025, 0.5),
        OTHERS: (0.0005, 0.5),
    }


def test_aims_show_every_call(benchmarks):
    from link_grid import COMPILED, FULL, Cell
    from link_tables import aims

    k = 1024

    def row(ms, *cell, earlier=(), **more):
        seconds = [{"call": 0, "first_token_seconds": one / 1e3} for one in earlier]
        found = {"first_token_seconds": ms / 1e3, "earlier": seconds}
        return Cell(*cell, **more).asdict() | found

    rows = [row(1200, FULL[0], 32 * k), row(500, "CacheBlend 15 %", 32 * k, 16, "device")]
    rows.append(row(90, "LegoLink-16", 32 * k, 16, "host"))
    for arm, earlier in (("LegoLink-16", [20.0]), (COMPILED, [])):
        rows.append(row(25, arm, 32 * k, 16, "device", earlier=earlier))
        rows.append(row(10, arm, 4 * k, 16, "device"))
        rows.append(row(40, arm, 4 * k, 16, "device", batch=8))
    table = aims({"rows": rows})
    assert "| LegoLink-16, 32k, on the device | 30 ms | 20.0, 25.0 ms |" in table
    assert "| the same, less than a full prefill | 45 times | 60, 48 |" in table
    assert "| LegoLink-16, 8 prompts of 4k over one | 3 | 4.0 |" in table
    assert "| CacheBlend at 15 % over LegoLink-16, 32k | 8 | 20 |" in table


def test_prompts_of_a_batch_share_the_first_half_of_their_chunks(benchmarks):
    from link_grid import Cell, texts

    chunks, queries = texts(Cell("naive", 128, 8, "device", 3), 16, 512, 0)
    for row, query in zip(chunks, queries, strict=True):
        assert sum(map(len, row)) + len(query) == 128
        assert all(torch.equal(a, b) for a, b in zip(row[:4], chunks[0][:4], strict=True))
    assert not torch.equal(chunks[0][4], chunks[1][4])
    alone, _ = texts(Cell("full prefill, sdpa", 128), 16, 512, 0)
    assert torch.equal(torch.cat(chunks[0]), alone[0][0])


def test_some_of_the_grid_on_a_tiny_model(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "benchmarks" / "link.py")]
    command += ["--tiny", "--device", "cpu", "--repeats", "2", "--out", str(tmp_path)]
    command += ["--only", "(sdpa|prefix|CacheBlend|LegoLink).*, (64|256) tokens"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    record = json.loads((tmp_path / "link.json").read_text())
    names = {(row["arm"], row["tokens"], row["tier"], row["batch"]) for row in record["rows"]}
    expected = {("LegoLink-16", 256, tier, 1) for tier in ("device", "host", "disk")}
    expected |= {("LegoLink-16", 256, "device", 8), ("CacheBlend 15 %", 64, "device", 1)}
    assert expected | {("floor", 64, "", 1), ("floor", 256, "", 1)} <= names
    assert all(row["first_token_seconds"] > 0 for row in record["rows"])
    assert "| LegoLink-16, disk |" in done.stdout
