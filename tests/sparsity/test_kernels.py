"""The kernels of a decoding step: twins against words, kernels against twins, and what is refused.

Where there is a CUDA device the cases of Triton's interpreter run on it as well.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsity import SparsityError
from sparsity.kernels import available
from sparsity.kernels.append import append
from sparsity.kernels.available import launch, serves, why_not
from sparsity.kernels.decode_attention import decode_attention
from sparsity.kernels.operator import launcher, operator
from sparsity.kernels.page_scores import page_bounds, page_logits
from sparsity.kernels.top_pages import top_pages
from sparsity.retention.attention import attend_reference
from tests.sparsity.kernel_pools import random_pool
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


@needs_triton
def test_kernels_build_for_a_gpu(monkeypatch):
    """The interpreter takes what the compiler refuses, which needs no device to say so."""
    from tests.sparsity.kernel_builds import launches

    assert_fit(launches(monkeypatch))


# --- the twins, in words ---


def naive_append(pool, key, value, worth, rank, column, valid, size):
    """A row and a head at a time."""
    batch, heads, places = pool["start"].shape
    for b in range(batch):
        if not valid[b]:
            continue
        at, inside = int(rank[b]), int(rank[b]) % size
        for h in range(heads):
            starts = pool["start"][b, h].tolist()
            if inside == 0:
                if worth is None:
                    page = starts.index(-1)
                else:
                    of = worth[b, h].tolist()
                    page = min(range(places), key=lambda p: (of[p], starts[p], p))
                pool["slots"][b, h, page * size : (page + 1) * size] = -1
                pool["start"][b, h, page] = pool["stamp"][b, h, page] = at
                pool["sums"][b, h, page] = 0
                pool["pinned"][b, h, page] = False
                pool["current"][b, h] = page
                pool["kmin"][b, h, page] = pool["kmax"][b, h, page] = key[b, h]
            page = int(pool["current"][b, h])
            for name, choose in (("kmin", torch.minimum), ("kmax", torch.maximum)):
                pool[name][b, h, page] = choose(pool[name][b, h, page], key[b, h])
            pool["keys"][b, h, page * size + inside] = key[b, h]
            pool["values"][b, h, page * size + inside] = value[b, h]
            pool["slots"][b, h, page * size + inside] = column


@pytest.mark.parametrize(("size", "with_worth"), [(1, True), (3, True), (3, False)])
def test_append_is_what_it_says(size, with_worth):
    pool, now = random_pool(3, 2, 6, size, 8, 4, torch.float32, used=6 if with_worth else 3)
    expected, rank = {name: t.clone() for name, t in pool.items()}, now + 1
    for step in range(3 * size if with_worth else 2 * size):
        worth = torch.randint(0, 2, pool["start"].shape).float() if with_worth else None
        key, value, valid = torch.randn(3, 2, 8), torch.randn(3, 2, 4), torch.rand(3) < 0.8
        new = (key, value, worth, rank, torch.tensor(50 + step), valid, size)
        append(*pool.values(), *new)
        naive_append(expected, *new)
        for name, tensor in expected.items():
            assert torch.equal(pool[name], tensor), name
        rank = rank + valid


@pytest.mark.parametrize("weights", ["max", "mean", None])
def test_attention_is_that_to_the_tokens_held(weights):
    size, heads, groups = 3, 2, 3
    pool, now = random_pool(3, heads, 8, size, 16, 12, torch.float32, used=6)
    now[1], sinks = -1, torch.randn(heads * groups)
    query = torch.randn(3, heads * groups, 16)
    state = [pool[name] for name in ("keys", "values", "start")]
    rules = {"softcap": 2.0, "sinks": sinks, "weights": weights}
    out, shares = decode_attention(query, *state, now, size, 0.3, **rules)
    for b in (0, 2):
        for h in range(heads):
            held = pool["slots"][b, h] >= 0
            mine = slice(h * groups, (h + 1) * groups)
            kept = [t[b : b + 1, h : h + 1, held] for t in state[:2]]
            one = attend_reference(
                query[b : b + 1, mine, None], *kept, scaling=0.3, softcap=2.0, sinks=sinks[mine]
            )
            torch.testing.assert_close(out[b, mine], one[0, 0])
            if shares is not None:
                assert torch.equal(shares[b, h] > 0, held)
    assert torch.all(out[1] == 0)
    if weights is None:
        assert shares is None
    else:
        assert torch.all(shares[1] == 0)
    listed = pool["start"].argsort(-1, descending=True)[..., :4]
    out, _ = decode_attention(query, *state, now, size, 0.3, pages=listed)
    gone = torch.full_like(pool["start"], -1)
    only = gone.scatter(-1, listed, pool["start"].gather(-1, listed))
    expected, _ = decode_attention(query, *state[:2], only, now, size, 0.3)
    torch.testing.assert_close(out, expected)


def test_of_equal_pages_the_lower_places_are_the_top():
    scores = torch.tensor([2.0, -torch.inf, -0.0, 2.0, 0.0, -1.0, torch.inf, 0.0])
    scores = torch.stack([scores, -scores])[None]
    for count, places in (
        (1, [[6], [1]]),
        (2, [[0, 6], [1, 5]]),
        (4, [[0, 2, 3, 6], [1, 2, 4, 5]]),
        (5, [[0, 2, 3, 4, 6], [1, 2, 4, 5, 7]]),
        (7, [[0, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 7]]),
    ):
        assert top_pages(scores, count).sort(-1).values.tolist() == [places]


@pytest.mark.parametrize(("dtype", "count"), [(torch.bfloat16, 1), (torch.float32, 4)])
def test_top_pages_that_are_not_there_are_refused(dtype, count):
    with pytest.raises(SparsityError, match=rf"top_pages: .* 3 places and count is {count}"):
        top_pages(torch.zeros(1, 1, 3, dtype=dtype), count)


def test_twins_compile_as_one_graph():
    """Without a graph break, and what is changed in place is changed."""
    size = 4

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(pool, query, new, now):
        append(*pool.values(), *new, size)
        state = [pool[name] for name in ("keys", "values", "start")]
        bounds = page_bounds(query, pool["kmin"], pool["kmax"], "max")
        logits = page_logits(query, pool["keys"], pool["slots"] >= 0, size, "mean")
        out, weights = decode_attention(query, *state, now, size, 0.3, weights="mean")
        pages = top_pages(bounds, 2)
        return out, weights, logits, decode_attention(query, *state, now, size, 0.3, pages)[0]

    results = []
    for run in (step, step._torchdynamo_orig_callable):
        pool, now = random_pool(2, 2, 5, size, 16, 16, torch.float32)
        g = torch.Generator().manual_seed(5)
        key, value = torch.randn(2, 2, 2, 16, generator=g)
        query, worth = torch.randn(2, 4, 16, generator=g), torch.rand(2, 2, 5, generator=g)
        rank, valid = now + 1, torch.tensor([True, False])
        new = (key, value, worth, rank, torch.tensor(70), valid)
        results.append([*run(pool, query, new, now + valid), *pool.values()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


# --- what cannot be served ---


def test_why_not(monkeypatch):
    cpu = torch.device("cpu")
    assert why_not(cpu, torch.float32, 64, 64, 16) == "no CUDA device (cpu)"
    assert not serves(torch.zeros(1, 64))
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(available, "TRITON", True)
    assert why_not(cuda, torch.bfloat16, 80, 256, 64) is None
    for args, words in (
        ((torch.float64, 64, 64, 16), "float64"),
        ((torch.float16, 320, 64, 16), "head_dim 320"),
        ((torch.float16, 64, 512, 16), "head_dim 512"),
        ((torch.float16, 64, 64, 128), "page_size 128"),
    ):
        assert words in str(why_not(cuda, *args))
    monkeypatch.setattr(available, "TRITON", False)
    assert why_not(cuda, torch.bfloat16, 64, 64, 16) == "Triton is not installed"


def test_a_kernel_that_fails_is_named():
    def broken(*_):
        raise RuntimeError("PassManager::run failed")

    with pytest.raises(SparsityError, match=r"kernel append .* PassManager::run failed"):
        launch("append", broken, 1)


def test_weights_of_listed_pages_are_refused():
    pool, now = random_pool(1, 1, 2, 4, 8, 8, torch.float32)
    state = [pool[name] for name in ("keys", "values", "start")]
    pages = torch.zeros(1, 1, 1, dtype=torch.int64)
    with pytest.raises(SparsityError, match="without a list of pages"):
        decode_attention(torch.randn(1, 1, 8), *state, now, 4, 1.0, pages, weights="max")


def test_the_package_imports_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import sparsity\n"
        "import sparsity.kernels.append, sparsity.kernels.decode_attention\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CASES.parents[2])
    code = "import sys, sparsity; assert not [m for m in sys.modules if m == 'triton']"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CASES.parents[2])


def test_an_operator_is_traced_without_its_launches():
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda x, out: (launched.append(grid), out.copy_(2 * x))

    def double(x: torch.Tensor, least: int) -> torch.Tensor:
        if x.shape[0] < least:
            raise ValueError(f"{x.shape[0]} rows")
        out = torch.empty_like(x)
        launcher(Kernel())[x.shape](x, out)
        return out

    op = operator("sparsity_tests::double")(double)
    x = torch.randn(3, 2)
    step = torch.compile(lambda x, least: op(x, least) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(step(x, 1), 2 * x + 1)
    assert len(launched) == 1  # and none while it was traced
    with pytest.raises(Exception, match="3 rows"):
        step(x, 5)
    assert torch.equal(op(x, 1), 2 * x)
    assert len(launched) == 2
