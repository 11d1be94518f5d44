"""The kernels of a link: twins against the slow attention, kernels against twins, and refusals.

Where there is a CUDA device the cases of Triton's interpreter run on it as well.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from picache import PICacheError
from picache.hf.attention import attend_reference
from picache.hf.attention import attention_mass as mass_of_one_prompt
from picache.hf.rope import rotate
from picache.kernels import available
from picache.kernels.attention_mass import attention_mass, attention_mass_reference, last_rows
from picache.kernels.available import launch, require, why_not
from picache.kernels.place import place, place_reference
from picache.kernels.scattered_attention import scattered_attention, scattered_attention_reference
from picache.kernels.tables import Piece, Turn, addresses, refuse_tables, refuse_turn, table_of
from tests.triton_kernels import assert_fit, interpreted, needs_triton, on_the_device

CASES = Path(__file__).with_name("kernel_cases.py")


@needs_triton
@pytest.mark.compiled
def test_kernels_equal_their_twins_in_tritons_interpreter():
    interpreted(CASES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_equal_their_twins_on_the_device():
    on_the_device(CASES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_graph_serves_other_rows_and_chunks():
    """A captured launch reads positions, lengths and addresses from the device when replayed."""
    g = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g, device="cuda").bfloat16()

    query, capacity = draw(2, 8, 40, 64), 600
    keys, values = (torch.full((2, 2, capacity, 64), torch.nan).cuda().bfloat16() for _ in range(2))
    chunks = [(draw(2, n, 64), draw(2, n, 64)) for n in (100, 300, 7, 33)]
    angles = 6 * torch.rand(capacity, 32, generator=g, device="cuda")
    turn = Turn(angles.cos(), angles.sin(), "half")
    sources = torch.zeros(2, 1, 4, dtype=torch.int64, device="cuda")
    arenas_at = [addresses([arena]).cuda() for arena in (keys, values)]
    table = torch.zeros(4, 5, dtype=torch.int32, device="cuda")
    positions = torch.full((2, 40), -1, device="cuda")

    def run():
        place(*sources, *arenas_at, table, keys, values, capacity, turn)
        out, lse = scattered_attention(query, keys, values, positions, 0.2)
        return out, lse, attention_mass(query, keys, last_rows(positions, 5), lse, 0.2)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    for used, rows in (([0, 3], 9), ([1, 2, 0], 40)):
        placed, at = [], 0
        for i, c in enumerate(used):
            held = chunks[c][0].shape[1]
            placed.append(Piece(held, i, i % 2, at, at if i else -1))
            at += held - i
        for part in (0, 1):
            listed = addresses([chunks[c][part] for c in used]).cuda()
            sources[part, 0, : len(used)] = listed
        table.zero_()
        table[: len(used)] = table_of(placed, capacity, 2, capacity).cuda()
        arenas = [torch.zeros_like(keys), torch.zeros_like(values)]
        for arena in (keys, values):
            arena.zero_()
        whole = [[[chunks[c][part] for c in used]] for part in (0, 1)]
        place_reference(*whole, placed, *([arena] for arena in arenas), turn)
        drawn_rows = torch.randperm(at, generator=g, device="cuda")[:rows].sort().values
        positions.fill_(-1)
        positions[:, : len(drawn_rows)] = drawn_rows
        graph.replay()
        for mine, expected in zip((keys, values), arenas, strict=True):
            torch.testing.assert_close(mine, expected, atol=1e-2, rtol=1e-2)
        out, lse = scattered_attention_reference(query, keys, values, positions, 0.2)
        torch.testing.assert_close(got[0], out, atol=3e-2, rtol=3e-2)
        torch.testing.assert_close(got[1], lse, atol=1e-3, rtol=1e-3)
        mass = attention_mass_reference(query, keys, last_rows(positions, 5), lse, 0.2)
        torch.testing.assert_close(got[2], mass, atol=1e-4, rtol=1e-3)


@needs_triton
@pytest.mark.compiled
def test_kernels_build_for_a_gpu(monkeypatch):
    """The interpreter takes what the compiler refuses, which needs no device to say so."""
    from tests.picache.kernel_builds import launches

    assert_fit(launches(monkeypatch))


@needs_triton
def test_plans_fill_the_device_and_fit_its_memory():
    from picache.kernels.scattered_attention_triton import Plan, Processors, plan

    h200, small = Processors(132, 227 * 1024), Processors(46, 99 * 1024)
    shape = (128, 128, 2)
    assert plan(8, 1280, 32768, *shape, h200) == Plan(128, 128, 5, 8, 3)
    assert plan(8, 1280, 32768, *shape, small)[:2] == (128, 64)
    assert plan(8, 1280, 32768, *shape, small).stages == 2
    assert plan(8, 384, 4096, *shape, h200) == Plan(64, 64, 4, 4, 3)
    assert plan(64, 352, 4096, *shape, h200).splits == 2
    assert plan(8, 4352, 131072, *shape, h200).splits == 7
    assert plan(8, 4, 32768, *shape, h200).lines == 16
    assert plan(8, 4, 700, *shape, h200).splits == 2  # of 256 keys or more
    assert plan(8, 200_000, 200_000, *shape, h200).splits == 1


def test_the_benchmark_rehearses(tmp_path):
    script, out = CASES.parents[2] / "examples/benchmarks/link_kernels.py", tmp_path / "out.json"
    command = [sys.executable, str(script), "--device", "cpu", "--tiny", "--out", str(out)]
    env = os.environ | {"PYTHONPATH": str(CASES.parents[2])}
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    assert "0 wrong, 0 failed" in done.stdout
    assert all(row["us"] > 0 for row in json.loads(out.read_text())["rows"])


# --- the twins against the attention that linking has used so far ---


def drawn(window):
    """Two prompts of different lengths, garbage behind them, and the mask of a prompt."""
    g = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 9, 8, generator=g)
    keys, values = torch.randn(2, 2, 60, 8, generator=g), torch.randn(2, 2, 60, 6, generator=g)
    positions = torch.full((2, 9), -1)
    positions[0] = torch.randperm(60, generator=g)[:9].sort().values
    positions[1, 2:7] = torch.tensor([0, 3, 17, 18, 30])
    keys[1, :, 31:] = values[1, :, 31:] = torch.nan

    def mask(at, of):
        seen = of <= at[:, None]
        return seen if window is None else seen & (of > at[:, None] - window)

    return query, keys, values, positions, torch.randn(6, generator=g), mask


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("softcap", "with_sinks"), [(None, False), (1.5, True)])
def test_attention_and_its_mass_are_those_of_each_prompt(window, softcap, with_sinks):
    query, keys, values, positions, sinks, mask = drawn(window)
    sinks = sinks if with_sinks else None
    rules = (0.7, window, softcap)
    out, lse = scattered_attention(query, keys, values, positions, *rules, sinks)
    counted = last_rows(positions, 3)
    norms = values.norm(dim=-1)
    for weight in (None, norms):
        mass = attention_mass(query, keys, counted, lse, *rules, weight)
        for b in range(2):
            real = positions[b] >= 0
            at = positions[b, real]
            n = int(at.max()) + 1
            parts = query[b : b + 1, :, real], keys[b : b + 1, :, :n], values[b : b + 1, :, :n]
            allowed = mask(at, torch.arange(n))
            expected = attend_reference(*parts, allowed, 0.7, softcap, sinks)
            torch.testing.assert_close(out[b : b + 1, :, real], expected)
            assert torch.all(out[b, :, ~real] == 0)
            assert torch.all(lse[b, :, ~real].isneginf())
            last = (parts[0][:, :, -3:], parts[1], at[-3:], mask, 0.7, softcap, sinks)
            factor = None if weight is None else weight[b : b + 1, :, :n, None]
            torch.testing.assert_close(mass[b, :n], mass_of_one_prompt(*last, factor))
            assert torch.all(mass[b, n:] == 0)


def test_last_rows():
    positions = torch.tensor([[-1, 2, 5, 6, -1], [0, 1, -1, -1, -1]])
    expected = [[-1, -1, 5, 6, -1], [0, 1, -1, -1, -1]]
    assert last_rows(positions, 2).tolist() == expected
    assert last_rows(positions, torch.tensor([1, 1])).tolist() == [
        [-1, -1, -1, 6, -1],
        [-1, 1, -1, -1, -1],
    ]


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("part", [0, 1])
def test_placing_is_copying_and_rotating(pairing, part):
    g = torch.Generator().manual_seed(1)
    pieces = [Piece(5, 0, 0, 0, -1), Piece(7, 2, 1, 4, 0), Piece(7, 0, 0, 5, 5)]
    sources = [[[torch.randn(2, p.held, 8, generator=g) for p in pieces]] for _ in range(2)]
    arenas = [[torch.zeros(2, 2, 12, 8)] for _ in range(2)]
    angles = torch.rand(12, 3, generator=g)
    turn = Turn(angles.cos(), angles.sin(), pairing, offset=2, part=part)
    place_reference(*sources, pieces, *arenas, turn, temperature=0.5)
    for which, (source, arena) in enumerate(zip(sources, arenas, strict=True)):
        assert torch.equal(arena[0][0, :, :5], source[0][0])
        for i, skip, first, at in ((1, 2, 0, (1, slice(4, 9))), (2, 0, 5, (0, slice(5, 12)))):
            expected = source[0][i][:, skip:] / (0.5 if which == 0 else 1)
            if which == part:
                mine = tuple(t[first : first + expected.shape[1]] for t in (turn.cos, turn.sin))
                expected = rotate(expected, mine, pairing, 2)
            torch.testing.assert_close(arena[0][at[0], :, at[1]], expected)
        assert torch.all(arena[0][1, :, 9:] == 0)


# --- what cannot be served ---


def test_why_not(monkeypatch):
    assert why_not(torch.device("cpu"), torch.float32, 64, 64) == "no CUDA device (cpu)"
    cuda = torch.device("cuda", 0)
    available._is_new_enough.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(available, "TRITON", True)
    assert why_not(cuda, torch.bfloat16, 80, 256) is None
    for args, words in (
        ((torch.float64, 64, 64), "float64"),
        ((torch.float16, 320, 64), "head_dim 320"),
        ((torch.float16, 64, 512), "head_dim 512"),
    ):
        assert words in str(why_not(cuda, *args))
        with pytest.raises(PICacheError, match=f"the kernel place: .*{words}"):
            require("place", args[:1], *args[1:])
    monkeypatch.setattr(available, "TRITON", False)
    assert why_not(cuda, torch.bfloat16, 64, 64) == "Triton is not installed"
    available._is_new_enough.cache_clear()


def test_tensors_of_different_types_are_refused(monkeypatch):
    monkeypatch.setattr(available, "TRITON", True)
    with pytest.raises(PICacheError, match=r"different types: torch\.float16, torch\.float32"):
        require("place", (torch.float16, torch.float32), 64, 64)


def test_a_kernel_that_fails_is_named():
    def broken(*_):
        raise RuntimeError("PassManager::run failed")

    with pytest.raises(PICacheError, match=r"kernel place .* PassManager::run failed"):
        launch("place", torch.zeros(1), broken, 1)


@pytest.mark.parametrize(("scaling", "window"), [(0.0, None), (-1.0, None), (1.0, 0)])
def test_a_scaling_or_window_of_nothing_is_refused(scaling, window):
    query, keys, values, positions, _, _ = drawn(None)
    with pytest.raises(PICacheError, match="scattered_attention"):
        scattered_attention(query, keys, values, positions, scaling, window)
    with pytest.raises(PICacheError, match="attention_mass"):
        attention_mass(query, keys, positions, query[..., 0], scaling, window)


def test_shapes_that_do_not_go_together_are_refused():
    query, keys, values, positions, _, _ = drawn(None)
    for wrong in (
        (query[:1], keys, values, positions),
        (query[:, :5], keys, values, positions),
        (query[..., :4], keys, values, positions),
        (query, keys, values, positions[:1]),
    ):
        with pytest.raises(PICacheError, match="do not go together"):
            scattered_attention(*wrong, 1.0)


def test_tables_of_other_shapes_or_types_are_refused():
    sources, arenas = torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    good = {
        "key_sources": sources,
        "value_sources": sources,
        "key_arenas": arenas,
        "value_arenas": arenas,
        "pieces": torch.zeros(2, 5, dtype=torch.int32),
    }
    refuse_tables(**good)
    for name, wrong in (
        ("key_sources", sources.mT.contiguous().mT),
        ("value_sources", sources[:, :1].contiguous()),
        ("key_arenas", arenas.int()),
        ("pieces", good["pieces"][:, :4]),
    ):
        with pytest.raises(PICacheError, match=f"place: {name} is"):
            refuse_tables(**good | {name: wrong})


def test_pieces_that_do_not_fit_are_refused():
    table = table_of([Piece(9, 2, 1, 3, 4), Piece(3, 0, 0, 0, -1)], 11, 2, 10)
    assert table.tolist() == [[9, 2, 1, 3, 4], [3, 0, 0, 0, -1]]
    assert table.dtype == torch.int32
    for piece in (
        Piece(9, 2, 2, 3, 4),
        Piece(9, 2, 1, 4, 4),
        Piece(9, 2, 1, 3, 5),
        Piece(9, 10, 1, 3, 4),
        Piece(9, 2, 1, -1, 4),
        Piece(9, 2, 1, 3, -2),
    ):
        with pytest.raises(PICacheError, match=r"Piece\(held=9.*does not fit an arena of 2 rows"):
            table_of([piece], 11, 2, 10)


def test_addresses_are_those_of_whole_aligned_tensors():
    tensor = torch.zeros(4, 6, 8)
    assert addresses([tensor, tensor[1]]).tolist() == [
        tensor.data_ptr(),
        tensor.data_ptr() + 6 * 8 * 4,
    ]
    for wrong in (tensor[:, 1:], tensor.view(-1)[1:]):
        with pytest.raises(PICacheError, match="contiguous tensors at multiples of 16 bytes"):
            addresses([wrong])


def test_placing_needs_a_device():
    arena, table = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(PICacheError, match="use place_reference"):
        place(table, table, table[0], table[0], table_of([], 0, 1, 4), arena, arena, 4)


def test_angles_that_do_not_fit_are_refused():
    good = torch.ones(3, 4)
    refuse_turn(Turn(good, good, "half"), 8)
    with pytest.raises(PICacheError, match="do not fit 8 dimensions"):
        refuse_turn(Turn(good, good, "half", offset=1), 8)
    with pytest.raises(PICacheError, match=r"torch\.float64"):
        refuse_turn(Turn(good.double(), good, "half"), 8)


def test_the_package_imports_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import picache\n"
        "import picache.kernels.place, picache.kernels.scattered_attention\n"
        "import picache.kernels.attention_mass\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CASES.parents[2])
