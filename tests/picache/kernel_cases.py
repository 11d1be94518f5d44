"""Kernels against their twins, on a CUDA device or on the CPU through Triton's interpreter."""

from itertools import product

import pytest
import torch

from picache.kernels.attention_mass import attention_mass_reference, last_rows
from picache.kernels.attention_mass_triton import Plan as MassPlan
from picache.kernels.attention_mass_triton import launch_attention_mass
from picache.kernels.place import place_reference
from picache.kernels.place_triton import Plan as PlacePlan
from picache.kernels.place_triton import launch_place
from picache.kernels.scattered_attention import scattered_attention_reference
from picache.kernels.scattered_attention_triton import Plan, launch_scattered_attention
from picache.kernels.tables import Piece, Turn, addresses, table_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = list(TOLERANCE)


@pytest.fixture(autouse=True)
def poison():
    """Memory that is not initialised holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def to(tensor):
    return None if tensor is None else tensor.to(DEVICE)


def close(got, expected, dtype):
    torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


# --- attention and its mass ---

SHAPES = [
    # batch, kv_heads, groups, rows, capacity, dim, value_dim
    (1, 1, 1, 1, 1, 16, 16),
    (2, 2, 3, 7, 75, 80, 96),
    (1, 2, 4, 21, 311, 64, 64),
    (3, 1, 8, 9, 170, 20, 24),
    (2, 1, 1, 1, 130, 128, 128),
    (1, 1, 2, 70, 70, 192, 128),
]
PLANS = [None, (16, 16, 1, 4, 1), (32, 64, 3, 4, 1), (64, 16, 5, 4, 1)]
RULES = [
    # window, softcap, sinks
    (None, None, False),
    (None, 1.5, True),
    (40, None, True),
    (1, None, False),
    (23, 2.0, False),
]


def drawn(case, dtype, seed=0):
    """Queries, arena with NaN behind the last position of each row, and positions with padding."""
    batch, kv_heads, groups, rows, capacity, dim, value_dim = case
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    # Laid out as after a projection, rows before heads, so that the strides are odd.
    query = draw(batch, rows, kv_heads * groups, dim).transpose(1, 2)
    keys, values = draw(batch, kv_heads, capacity, dim), draw(batch, kv_heads, capacity, value_dim)
    positions = torch.full((batch, rows), -1)
    for b in range(batch):
        # The first row of the batch is full, others have padding, and their prompts are shorter.
        real = rows if b == 0 else max(1, rows // 2)
        length = capacity if b == 0 else max(real, capacity // 3)
        positions[b, :real] = torch.randperm(length, generator=g)[:real].sort().values
        last = int(positions[b].max())
        keys[b, :, last + 1 :] = torch.nan
        values[b, :, last + 1 :] = torch.nan
        query[b, :, real:] = torch.nan
    sinks = torch.randn(kv_heads * groups, generator=g)
    return query, keys, values, positions, sinks


def attend_both(case, dtype, plan, rule, seed=0):
    window, softcap, with_sinks = rule
    query, keys, values, positions, sinks = map(to, drawn(case, dtype, seed))
    rules = (2 * case[-2] ** -0.5, window, softcap, sinks.to(dtype) if with_sinks else None)
    given = (query, keys, values, positions, *rules)
    got = launch_scattered_attention(*given, plan if plan is None else Plan(*plan))
    return got, scattered_attention_reference(*given), positions


@pytest.mark.parametrize(
    ("case", "plan", "rule", "dtype"),
    [
        (case, plan, RULES[(i * 3 + i // 5) % 5], DTYPES[i % 3])
        for i, (case, plan) in enumerate(product(SHAPES, PLANS))
    ],
    ids=str,
)
def test_attention(case, plan, rule, dtype):
    (out, lse), (expected, expected_lse), positions = attend_both(case, dtype, plan, rule)
    assert out.dtype == dtype
    close(out, expected, dtype)
    close(lse, expected_lse, torch.float32)
    padding = (positions < 0)[:, None].expand_as(lse)
    assert torch.all(out[padding] == 0)
    assert torch.all(lse[padding].isneginf())
    assert lse[~padding].isfinite().all()


@pytest.mark.parametrize("case", enumerate([*RULES, (250, None, True)]), ids=str)
def test_attention_in_float32_is_exact_to_rounding(case):
    at, rule = case
    plan = PLANS[at % len(PLANS)]
    got, expected, _ = attend_both(SHAPES[2], torch.float32, plan, rule, seed=3)
    torch.testing.assert_close(got[0], expected[0], atol=3e-6, rtol=1e-5)
    torch.testing.assert_close(got[1], expected[1], atol=3e-6, rtol=1e-5)


def test_more_rows_than_positions_are_read_at_once():
    query, keys, values, positions, _ = map(to, drawn((1, 1, 1, 1050, 1060, 16, 16), torch.float32))
    given = (query, keys, values, positions, 0.5, None, None, None)
    out, lse = launch_scattered_attention(*given, Plan(128, 64, 3, 4, 1))
    expected, expected_lse = scattered_attention_reference(*given)
    torch.testing.assert_close(out, expected, atol=3e-6, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=3e-6, rtol=1e-5)
    given = (query, keys, last_rows(positions, 40), lse, 0.5, None, None, None)
    mass = launch_attention_mass(*given, MassPlan(16, 128, 4, 1))
    torch.testing.assert_close(mass, attention_mass_reference(*given), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_positions_of_either_kind_and_padding_in_front(kind):
    query, keys, values, positions, _ = map(to, drawn(SHAPES[2], torch.float32))
    positions[:, :5] = -1
    given = (query, keys, values, positions.to(kind), 0.2, None, None, None)
    got = launch_scattered_attention(*given, Plan(32, 16, 3, 4, 1))
    expected = scattered_attention_reference(*given)
    torch.testing.assert_close(got, expected, atol=3e-6, rtol=1e-5)


def test_a_row_that_is_not_a_number_stays_so():
    query, keys, values, positions, _ = map(to, drawn(SHAPES[2], torch.float32))
    query[:, 0, 3] = torch.nan
    for splits in (1, 3):
        plan = Plan(32, 16, splits, 4, 1)
        out, _ = launch_scattered_attention(
            query, keys, values, positions, 0.2, None, None, None, plan
        )
        assert out[:, 0, 3].isnan().all()
        assert out.isnan().sum() == out[:, 0, 3].numel()


@pytest.mark.parametrize(
    ("case", "rule", "dtype", "plan", "weighted"),
    [
        (case, RULES[(2 * i) % 5], DTYPES[i % 3], (None, (16, 16, 4, 1))[i % 2], i in (1, 2, 5))
        for i, case in enumerate(SHAPES)  # either plan with weights and without
    ],
    ids=str,
)
def test_attention_mass(case, rule, dtype, plan, weighted):
    window, softcap, with_sinks = rule
    query, keys, values, positions, sinks = map(to, drawn(case, dtype, seed=1))
    rules = (2 * case[-2] ** -0.5, window, softcap)
    sinks = sinks if with_sinks else None
    _, lse = scattered_attention_reference(query, keys, values, positions, *rules, sinks)
    counts = torch.tensor([1, 4, 2][: case[0]], device=DEVICE)
    weight = values.float().norm(dim=-1) if weighted else None
    for counted in (positions, last_rows(positions, 3), last_rows(positions, counts)):
        given = (query, keys, counted, lse, *rules, weight)
        expected = attention_mass_reference(*given)
        got = launch_attention_mass(*given, plan if plan is None else MassPlan(*plan))
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
        if not weighted and not with_sinks:
            torch.testing.assert_close(got.sum(-1), torch.ones_like(got[:, 0]))


# --- chunks to their places ---

PLACES = [
    # kv_heads, dim, value_dim, dtype, plan
    (1, 16, 16, torch.float32, None),
    (2, 80, 96, torch.bfloat16, (8, 1, 4)),
    (4, 128, 128, torch.bfloat16, (16, 2, 4)),
    (3, 20, 24, torch.float16, (16, 3, 4)),
]
TURNS = [
    # pairing, pairs as a share of the dimensions, offset from the end, part
    None,
    None,
    ("half", 0.5, False, 0),
    ("interleaved", 0.5, False, 0),
    ("half", 0.2, True, 0),
    ("interleaved", 0.25, False, 0),
    ("half", 0.5, False, 1),
    ("interleaved", 0.2, True, 1),
]
TEMPERATURES = [1.0, 0.9, 1.0, 0.9, 0.9, 1.0, 1.1, 1.0]


@pytest.mark.parametrize(
    ("turn", "temperature", "case"),
    [  # each turn in two of the four shapes, each shape with four turns
        (turn, temperature, PLACES[(i + i // 4 + 2 * half) % 4])
        for i, (turn, temperature) in enumerate(zip(TURNS, TEMPERATURES, strict=True))
        for half in (0, 1)
    ],
    ids=str,
)
def test_place(turn, temperature, case):
    kv_heads, dim, value_dim, dtype, plan = case
    g = torch.Generator().manual_seed(dim)
    layers, batch, capacity = 2, 2, 100
    pieces = [
        Piece(7, 0, 0, 0, -1),  # an exact prefix
        Piece(33, 4, 0, 7, 0),
        Piece(0, 0, 0, 0, 0),  # left out
        Piece(1, 0, 0, 36, 29),
        Piece(7, 0, 1, 10, -1),
        Piece(33, 4, 1, 71, 30),  # up to the last place
    ]
    angles = torch.rand(59, max(dim, value_dim), generator=g) * 6
    how = None
    if turn is not None:
        pairing, share, at_end, part = turn
        width = (dim, value_dim)[part]
        pairs = max(1, int(width * share))
        cos, sin = (to(t[:, :pairs].contiguous()) for t in (angles.cos(), angles.sin()))
        how = Turn(cos, sin, pairing, width - 2 * pairs if at_end else 0, part)

    def sources(width):
        def one(piece):
            return to(torch.randn(kv_heads, piece.held, width, generator=g).to(dtype))

        return [[one(piece) for piece in pieces] for _ in range(layers)]

    def arenas(width):
        return [to(torch.full((batch, kv_heads, capacity, width), -3.0, dtype=dtype))
                for _ in range(layers)]  # fmt: skip

    held = sources(dim), sources(value_dim)
    for by_layer in held:  # what is copied bit for bit may be anything
        by_layer[0][0][0, 0, :3] = torch.tensor([-0.0, torch.inf, torch.nan])
    expected, got = [(arenas(dim), arenas(value_dim)) for _ in range(2)]
    place_reference(*held, pieces, *expected, how, temperature)
    tables = [to(torch.stack([addresses(of_layer) for of_layer in part])) for part in held]
    table = to(table_of(pieces, 59, batch, capacity))
    launch_place(
        *tables, *(to(addresses(part)) for part in got), table, got[0][0], got[1][0],
        tokens=80, turn=how, temperature=temperature,
        chosen=plan if plan is None else PlacePlan(*plan),
    )  # fmt: skip
    for part in (0, 1):
        for layer in range(layers):
            one, other = got[part][layer], expected[part][layer]
            ulp = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
            torch.testing.assert_close(one, other, atol=ulp / 8, rtol=ulp, equal_nan=True)
            exact = one[0, :, :7], held[part][layer][0]
            bits = {4: torch.int32, 2: torch.int16}[one.element_size()]
            assert torch.equal(exact[0].contiguous().view(bits), exact[1].view(bits))
