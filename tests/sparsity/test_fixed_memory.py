"""Memory of fixed size goes from a cache that is gone to the next one, and with it the graph."""

import gc
import weakref

import pytest
import torch

from sparsity import H2O, Quest, SparseCache, detach
from tests.helpers import tiny_model
from tests.sparsity.fixed import POLICY, compiles, fixed, generate

WINDOWS = ("llama", "mistral")


@pytest.fixture(params=WINDOWS)
def model(request):
    return tiny_model(request.param, torch.float32)


def addresses(cache):
    """Of all tensors that a step reads or writes and that outlive it."""
    clock = cache._state.clock
    pools = [t for x in cache.retentions.values() for t in x.pool.tensors().values()]
    tensors = (clock.rank, clock.column, clock.valid, *pools)
    return [t.data_ptr() for t in tensors if t.numel()]


def test_the_next_cache_has_the_memory_and_nothing_of_what_was_in_it(model):
    cache = fixed(model, POLICY)
    generate(model, cache, compile_config=compiles(), prompt=30, rows=(3, 1))
    before = addresses(cache)
    expected = generate(model, SparseCache(model, POLICY, static=False))
    for _ in range(2):  # the old cache is gone only once the new one is made
        cache = fixed(model, POLICY)
        assert torch.equal(generate(model, cache, compile_config=compiles()), expected)
        assert addresses(cache) == before


def test_a_cache_that_lives_keeps_its_memory(model):
    caches = [fixed(model, POLICY) for _ in range(2)]
    texts = [generate(model, cache, compile_config=compiles()) for cache in caches]
    assert not set(addresses(caches[0])) & set(addresses(caches[1]))
    assert torch.equal(*texts)


@pytest.mark.parametrize(
    "other", [H2O(16, page_size=4), Quest(8, page_size=4), POLICY], ids=["H2O", "Quest", "batch"]
)
def test_memory_that_does_not_fit_is_not_taken(model, other):
    cache = fixed(model, POLICY)
    generate(model, cache, compile_config=compiles())
    given = {"rows": (2, 0, 1)} if other is POLICY else {}
    expected = generate(model, SparseCache(model, other, static=False), **given)
    del cache
    cache = fixed(model, other)
    assert torch.equal(generate(model, cache, compile_config=compiles(), **given), expected)


def alive(pool):
    """In a function of its own: an assert keeps what it has seen."""
    return pool() is not None


def test_nothing_is_kept_without_a_graph_nor_past_detach(model):
    for how in ({"disable_compile": True}, {"compile_config": compiles()}):
        cache = fixed(model, POLICY)
        generate(model, cache, **how)
        pool = weakref.ref(cache.retentions[0].pool)
        del cache
        assert alive(pool) == ("compile_config" in how)
    detach(model)
    assert not alive(pool)


def test_what_is_kept_goes_with_its_model():
    model = tiny_model("llama", torch.float32)
    cache = fixed(model, POLICY)
    generate(model, cache, compile_config=compiles())
    pool = weakref.ref(cache.retentions[0].pool)
    del cache, model
    torch._dynamo.reset()  # holds what it has compiled
    gc.collect()
    assert not alive(pool)
