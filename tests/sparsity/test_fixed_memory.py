"""Memory of fixed size goes from a cache that is gone to the next one, and with it the graph."""

import copy
import gc
import weakref
from dataclasses import dataclass, field

import pytest
import torch
from transformers import DynamicCache

from sparsity import H2O, Quest, RaaS, SparseCache, SparsityError, detach
from tests.helpers import tiny_model
from tests.sparsity.fixed import POLICY, compiles, fixed, generate
from tests.sparsity.helpers import padded_inputs


@pytest.fixture(params=["llama", pytest.param("mistral", marks=pytest.mark.compiled)])
def either(request):
    """Without sliding windows, and with."""
    return tiny_model(request.param, torch.float32, num_hidden_layers=2)


@pytest.fixture
def model():
    return tiny_model("llama", torch.float32, num_hidden_layers=2)


def addresses(cache):
    """Of all tensors that a step reads or writes and that outlive it."""
    clock = cache._state.clock
    pools = [t for x in cache.retentions.values() for t in x.pool.tensors().values()]
    tensors = (clock.rank, clock.column, clock.valid, *pools)
    return [t.data_ptr() for t in tensors if t.numel()]


def test_the_next_cache_has_the_memory_and_nothing_of_what_was_in_it(either):
    model = either
    cache = fixed(model, POLICY)
    generate(model, cache, compile_config=compiles(), prompt=30, rows=(3, 1))
    before = addresses(cache)
    expected = generate(model, SparseCache(model, POLICY, static=False))
    for _ in range(2):  # the old cache is gone only once the new one is made
        cache = fixed(model, POLICY)
        assert torch.equal(generate(model, cache, compile_config=compiles()), expected)
        assert addresses(cache) == before


@pytest.mark.compiled
def test_a_cache_that_lives_keeps_its_memory(model):
    caches = [fixed(model, POLICY) for _ in range(2)]
    texts = [generate(model, cache, compile_config=compiles()) for cache in caches]
    assert not set(addresses(caches[0])) & set(addresses(caches[1]))
    assert torch.equal(*texts)


@pytest.mark.compiled
def test_memory_that_does_not_fit_is_not_taken(model):
    """That of another batch, of other policies, and of one that keeps all."""
    cache = fixed(model, POLICY)
    generate(model, cache, compile_config=compiles())
    for other in (POLICY, H2O(16, page_size=4), Quest(8, page_size=4)):
        given = {"rows": (2, 0, 1)} if other is POLICY else {}
        expected = generate(model, SparseCache(model, other, static=False), **given)
        del cache
        cache = fixed(model, other)
        assert torch.equal(generate(model, cache, compile_config=compiles(), **given), expected)


@pytest.mark.compiled
def test_a_cache_that_goes_on_from_another_takes_it_too(model):
    ids = padded_inputs(20, 3, 0)
    before, texts = [], []
    for _ in range(3):
        past = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=ids["input_ids"][:, :15], attention_mask=ids["attention_mask"][:, :15],
                  past_key_values=past)  # fmt: skip
        cache = fixed(model, POLICY, past=past)
        texts.append(generate(model, cache, prompt=20, rows=(3, 0), compile_config=compiles()))
        before.append(addresses(cache))
    assert before[1] == before[2] == before[0]
    assert torch.equal(texts[0], texts[2])


def test_a_cache_that_is_reset_keeps_its_own(model):
    first, second = (fixed(model, POLICY) for _ in range(2))
    for cache in (first, second):
        generate(model, cache, compile_config=compiles())
    own = addresses(first)
    del cache, second
    first.reset()
    generate(model, first, compile_config=compiles())
    assert addresses(first) == own


@pytest.mark.compiled
def test_what_comes_between_does_not_lose_it(model):
    """A single token, a second turn, a reset, and a prompt that fails."""
    cache = fixed(model, POLICY)
    generate(model, cache, compile_config=compiles())
    own = addresses(cache)

    def one_token(cache):
        generate(model, cache, tokens=1, compile_config=compiles())

    def resets(cache):
        one_token(cache)
        cache.reset()

    def fails(cache):
        layer = model.get_decoder().layers[1]
        hook = layer.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            one_token(cache)
        hook.remove()

    for between in (one_token, resets, fails):
        cache = fixed(model, POLICY)
        between(cache)
        cache = fixed(model, POLICY)
        generate(model, cache, compile_config=compiles())
        assert addresses(cache) == own


def test_what_does_not_fit_is_freed_before_the_prompt(model):
    cache = fixed(model, POLICY)
    generate(model, cache, compile_config=compiles())
    pool, seen = weakref.ref(cache.retentions[0].pool), []
    cache = fixed(model, POLICY)
    hook = (
        model.get_decoder().layers[0].register_forward_pre_hook(lambda *_: seen.append(alive(pool)))
    )
    generate(model, cache, tokens=2, rows=(2, 0, 1), disable_compile=True)
    hook.remove()
    assert not any(seen)


def test_a_policy_that_cannot_be_compared_is_no_error(model):
    @dataclass(frozen=True)
    class Odd(RaaS):
        weights: torch.Tensor = field(default_factory=lambda: torch.ones(2))

    for _ in range(2):
        cache = fixed(model, Odd(16, page_size=4, pin_prompt=False))
        generate(model, cache, compile_config=compiles())


def test_a_shallow_copy_is_refused(model):
    with pytest.raises(SparsityError, match="deepcopy"):
        copy.copy(fixed(model, POLICY))


def alive(pool):
    """In a function of its own: an assert keeps what it has seen."""
    return pool() is not None


@pytest.mark.compiled
def test_nothing_is_kept_without_a_graph_nor_past_detach(model):
    for how in ({"disable_compile": True}, {"compile_config": compiles()}):
        cache = fixed(model, POLICY)
        generate(model, cache, **how)
        pool = weakref.ref(cache.retentions[0].pool)
        del cache
        assert alive(pool) == ("compile_config" in how)
    detach(model)
    assert not alive(pool)

    cache = fixed(model, POLICY)
    generate(model, cache, compile_config=compiles())
    pool = weakref.ref(cache.retentions[0].pool)
    detach(model)
    del cache
    assert not alive(pool)


@pytest.mark.compiled
def test_what_is_kept_goes_with_its_model():
    model = tiny_model("llama", torch.float32)
    cache = fixed(model, POLICY)
    generate(model, cache, compile_config=compiles())
    pool = weakref.ref(cache.retentions[0].pool)
    del cache, model
    torch._dynamo.reset()  # holds what it has compiled
    gc.collect()
    assert not alive(pool)
