"""Kernels against their twins, on a CUDA device or on the CPU through Triton's interpreter."""

from itertools import product

import pytest
import torch

from sparsity.kernels.append import append_reference
from sparsity.kernels.append_triton import append_op
from sparsity.kernels.decode_attention import decode_attention_reference
from sparsity.kernels.decode_attention_triton import decode_attention_op
from sparsity.kernels.page_scores import page_bounds_reference, page_logits_reference
from sparsity.kernels.page_scores_triton import page_bounds_op, page_logits_op
from sparsity.kernels.top_pages import top_pages_reference
from sparsity.kernels.top_pages_triton import top_pages_op
from tests.sparsity.kernel_pools import random_pool

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


def to(given, device=DEVICE):
    if isinstance(given, dict):
        return {name: to(value, device) for name, value in given.items()}
    return given.to(device) if isinstance(given, torch.Tensor) else given


def close(got, expected, dtype):
    torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


# --- append ---

APPENDS = [
    # batch, heads, places, size, dim, value_dim, dtype, used, worth, bounds
    (3, 2, 7, 3, 80, 64, torch.float32, 7, True, True),
    (4, 1, 5, 2, 64, 80, torch.bfloat16, 5, True, True),
    (2, 2, 6, 16, 128, 128, torch.float16, 4, True, True),
    (3, 2, 9, 4, 64, 64, torch.float32, 6, False, True),
    (2, 1, 2050, 1, 64, 64, torch.float16, 2050, True, False),
    (1, 1, 1, 5, 20, 24, torch.float32, 1, True, True),
]


@pytest.mark.parametrize("case", APPENDS, ids=str)
def test_append(case):
    batch, heads, places, size, dim, value_dim, dtype, used, with_worth, bounds = case
    pool, now = random_pool(batch, heads, places, size, dim, value_dim, dtype, used)
    if not bounds:
        pool |= {"kmin": None, "kmax": None, "sums": pool["sums"][..., :0].contiguous()}
    g = torch.Generator().manual_seed(1)
    here, there = to(pool), {k: None if v is None else v.clone() for k, v in pool.items()}
    there, rank, before = to(there), now + 1, to(pool["start"].clone())
    opened = 0
    for step in range(2 * size + 2):
        worth = None
        if with_worth:  # few values, so that there are ties, and pages that must stay
            worth = torch.randint(0, 3, (batch, heads, places), generator=g).float()
            worth[worth == 2] = torch.inf
            worth.masked_fill_(there["start"].cpu() < 0, -torch.inf)
        elif step == 2 * size:
            break  # no unused place is left
        # Laid out as after a projection, tokens before heads, so that the strides are odd.
        key = torch.randn(batch, heads, 2, dim, generator=g).to(dtype)[:, :, 1]
        value = torch.randn(batch, 3, heads, value_dim, generator=g).to(dtype)[:, 1]
        valid = torch.rand(batch, generator=g) < 0.8
        column = torch.tensor(100 + step)
        new = [to(t) for t in (key, value, worth, rank, column, valid)]
        append_op(*here.values(), *new, size)
        append_reference(*there.values(), *new, size)
        opened += int((valid & (rank % size == 0)).sum())
        for name, tensor in there.items():
            assert tensor is None or torch.equal(here[name], tensor), (name, step)
        rank = rank + valid
    assert opened
    assert not torch.equal(here["start"], before)


# --- scores of pages ---

SCORES = [
    # batch, heads, groups, places, size, dim
    (2, 3, 1, 5, 3, 64),
    (1, 2, 3, 37, 1, 80),
    (2, 1, 4, 18, 16, 128),
    (1, 2, 8, 3, 64, 20),
]


@pytest.mark.parametrize(
    ("case", "dtype", "group"),
    [(c, DTYPES[i % 3], ("max", "mean")[i % 2]) for i, c in enumerate(SCORES + SCORES[1:])],
    ids=str,
)
def test_scores_of_pages(case, dtype, group):
    batch, heads, groups, places, size, dim = case
    pool, _ = random_pool(batch, heads, places, size, dim, dim, dtype, used=places - 1)
    pool = to(pool)
    query = to(torch.randn(batch, heads * groups, 2, dim).to(dtype))[:, :, 1]
    bounds = query, pool["kmin"], pool["kmax"], group
    expected = page_bounds_reference(*bounds)
    torch.testing.assert_close(page_bounds_op(*bounds), expected, atol=1e-4, rtol=1e-4)
    logits = query, pool["keys"], pool["slots"] >= 0, size, group
    expected = page_logits_reference(*logits)
    assert expected.isinf().any()
    torch.testing.assert_close(page_logits_op(*logits), expected, atol=1e-4, rtol=1e-4)


# --- the pages with the highest scores ---


def tied_scores(places):
    """Rows of different kinds: unlike, few values, zeros of both signs, and infinities."""
    g = torch.Generator().manual_seed(places)
    unlike, few = torch.randn(2, places, generator=g), torch.randint(-2, 3, (2, places))
    signed = torch.zeros(places).copysign(torch.randn(places, generator=g))
    infinite = torch.full((3, places), -torch.inf)
    infinite[0, places // 3 : places // 2] = torch.inf
    infinite[1, ::3] = unlike[0, ::3]
    infinite[2, -1] = -3e38
    rows = [1e-40 * unlike[:1], unlike, few, signed[None], infinite]
    return torch.cat(rows).unflatten(0, (3, 3))


@pytest.mark.parametrize("places", [1, 2, 37, 64, 300, 2051, 8195])
def test_top_pages(places):
    laid_out = tied_scores(places).mT.contiguous().mT  # strides are odd
    for scores in (laid_out, -laid_out):
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        counts = {1, min(7, places), places // 2 or 1, max(1, places - 1), places}
        for count in sorted(counts) if places < 1000 else (7, places // 2):
            expected = order[..., :count].sort(-1).values
            twin = top_pages_reference(scores, count)
            assert torch.equal(twin.sort(-1).values, expected), count
            got = top_pages_op(to(scores), count)
            assert torch.equal(got.cpu(), expected), count
            assert torch.equal(top_pages_reference(to(scores), count).sort(-1).values, got)


# --- attention ---

SHAPES = [
    # batch, heads, groups, places, used, size, dim, value_dim
    (2, 2, 1, 50, 50, 3, 64, 64),
    (1, 2, 3, 30, 20, 1, 80, 96),
    (2, 1, 4, 11, 11, 16, 128, 128),
    (1, 1, 8, 2, 1, 64, 64, 80),
    (3, 1, 4, 130, 90, 1, 20, 24),
]
# Tiles of 16 or 32 tokens, so that each of the shapes has more than one, but for the last.
PLANS = [(16, 1, False), (16, 3, False), (32, 4, True), (256, 1, True)]


def attend_both(case, dtype, plan, listed, softcap, sinks, weights, seed=0):
    batch, heads, groups, places, used, size, dim, value_dim = case
    pool, now = random_pool(batch, heads, places, size, dim, value_dim, dtype, used, seed)
    g = torch.Generator().manual_seed(seed)
    if batch > 2:
        now[1] = -1
    query = torch.randn(batch, heads * groups, 3, dim, generator=g).to(dtype)[:, :, 1]
    pages = None
    if listed:
        order = torch.rand(batch, heads, places, generator=g).argsort(-1)
        pages = order[..., : max(1, places * 2 // 3)]
    sink = torch.randn(heads * groups, generator=g).to(dtype) if sinks else None
    names = ("keys", "values", "start")
    state = [to(t) for t in (query, *(pool[n] for n in names), now)]
    args = (*state, size, 2 * dim**-0.5, to(pages), softcap, to(sink), weights)
    expected = decode_attention_reference(*args)
    if plan is None:
        return decode_attention_op(*args), expected, now
    tile, splits, trim = plan
    got = decode_attention_op(*args, tile, splits, 4, 1, trim)
    return got, expected, now


RULES = [
    # listed, softcap, sinks, weights
    (False, None, False, "max"),
    (False, 1.5, True, "mean"),
    (True, None, True, None),
    (False, None, True, None),
    (True, 1.5, False, None),
]


@pytest.mark.parametrize(
    ("case", "plan", "rule", "dtype"),
    [
        (case, plan, RULES[(i * 3 + i // 5) % 5], DTYPES[i % 3])
        for i, (case, plan) in enumerate(product(SHAPES, [*PLANS, None]))
    ],
    ids=str,
)
def test_attention(case, plan, rule, dtype):
    got, expected, now = attend_both(case, dtype, plan, *rule)
    assert got[0].dtype == dtype
    close(got[0], expected[0], dtype)
    assert torch.all(got[0][to(now) < 0] == 0)
    if rule[-1] is None:
        assert not got[1].numel()
    else:
        torch.testing.assert_close(got[1], expected[1], atol=2e-3, rtol=2e-3)
        # Not a comparison of zeros with zeros.
        assert expected[1].sum(-1).max() > 0.2


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_attention_in_float32_is_exact_to_rounding(rule):
    for plan in ((16, 3, False), (32, 2, True), (256, 1, False)):
        got, expected, _ = attend_both(SHAPES[2], torch.float32, plan, *rule, seed=3)
        torch.testing.assert_close(got[0], expected[0], atol=3e-6, rtol=1e-5)
        if rule[-1] is not None:
            torch.testing.assert_close(got[1], expected[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("size", [1, 4])
def test_attention_stops_at_the_last_page(trim, size):
    """Most of the pool is empty; rows hold different numbers of pages, one of them none."""
    pool, now = random_pool(3, 1, 90, size, 32, 32, torch.float32, used=90)
    for b, used in enumerate((7, 0, 40)):
        pool["start"][b, :, used:] = -1
    now = pool["start"].amax((1, 2)).long() + size - 1
    now[1] = -1
    query = torch.randn(3, 2, 32)
    state = [to(t) for t in (query, *(pool[n] for n in ("keys", "values", "start")), now)]
    args = (*state, size, 0.2, None, None, None, "mean")
    got = decode_attention_op(*args, 16, 3, 4, 1, trim)
    expected = decode_attention_reference(*args)
    torch.testing.assert_close(got[0], expected[0], atol=3e-6, rtol=1e-5)
    torch.testing.assert_close(got[1], expected[1], atol=1e-6, rtol=1e-5)
