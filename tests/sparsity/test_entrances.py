"""The wrong object at an entrance: what was given, what was expected, what to write."""

import re
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, LlamaModel

from sparsity import (
    H2O,
    RaaS,
    SnapKV,
    SparseCache,
    SparsityError,
    Then,
    attach,
    detach,
    milestone_map,
    record,
    replay,
)
from tests.helpers import random_ids
from tests.sparsity.zoo import shallow_model


@pytest.fixture(scope="module")
def model():
    return shallow_model("llama")


@pytest.fixture(scope="module")
def trace(model):
    return record(model, input_ids=random_ids(9, 1), max_new_tokens=4, do_sample=False)


POLICY = "expected a policy such as RaaS(budget=1024)"
MODEL = "expected a transformers model (a PreTrainedModel)"
PAST = "expected a transformers cache, such as a filled DynamicCache"
TRACE = "expected what record(model, input_ids=...) returns"
WRONG = {
    "a policy's class": (
        lambda m, t: SparseCache(m, RaaS),
        f"policy is the class RaaS, and not an object of it: {POLICY}",
    ),
    "a policy's name": (lambda m, t: SparseCache(m, "RaaS"), f"policy is 'RaaS': {POLICY}"),
    "no policy": (lambda m, t: SparseCache(m, None), f"policy is None: {POLICY}"),
    "swapped": (
        lambda m, t: SparseCache(H2O(64), m),
        f": {MODEL}; the model comes first: SparseCache(model, policy)",
    ),
    "a model's name": (
        lambda m, t: SparseCache("org/name", H2O(64)),
        f"model is 'org/name': {MODEL}; load it: AutoModelForCausalLM.from_pretrained('org/name')",
    ),
    "a model's path": (lambda m, t: attach(Path("name")), "from_pretrained('name')"),
    "a model's class": (
        lambda m, t: SparseCache(LlamaForCausalLM, H2O(64)),
        f"and not an object of it: {MODEL}; load one: LlamaForCausalLM.from_pretrained(...)",
    ),
    "a compiled model": (
        lambda m, t: SparseCache(torch.compile(m), H2O(64)),
        f"model is of type OptimizedModule: {MODEL}; for a wrapped model hand in the model inside",
    ),
    "a cache to detach": (lambda m, t: detach(SparseCache(m, H2O(64))), f": {MODEL}"),
    "nothing to record": (
        lambda m, t: record(None, input_ids=random_ids(3, 1)),
        f"model is None: {MODEL}",
    ),
    "record a list": (
        lambda m, t: record(m, input_ids=[[1, 2, 3]]),
        "input_ids is [[1, 2, 3]]: record needs input_ids, a tensor int64 [1, tokens]",
    ),
    "record a text": (lambda m, t: record(m, input_ids="a text"), "input_ids is 'a text': record"),
    "record a row alone": (
        lambda m, t: record(m, input_ids=random_ids(3, 1)[0]),
        "input_ids is [3]: record needs input_ids, a tensor int64 [1, tokens]",
    ),
    "record no layer": (
        lambda m, t: record(m, layers=[], input_ids=random_ids(3, 1)),
        "layers=[]: expected a list of whole numbers",
    ),
    "replay no layer": (
        lambda m, t: replay(t, H2O(64), layers=[]),
        "layers=[]: expected a list of whole numbers",
    ),
    "replay a number": (
        lambda m, t: replay(t, H2O(64), layers=torch.tensor(1)),
        "layers=tensor(1): expected a list of whole numbers",
    ),
    "past of tuples": (
        lambda m, t: SparseCache(m, H2O(64), past=((torch.ones(1), torch.ones(1)),)),
        f": {PAST}; put keys and values into one: DynamicCache().update(keys, values, layer)",
    ),
    "a prompt as past": (
        lambda m, t: SparseCache(m, H2O(64), past={"past_key_values": DynamicCache()}),
        f": {PAST}; hand in what stands in it: past=given['past_key_values']",
    ),
    "past's class": (
        lambda m, t: SparseCache(m, H2O(64), past=DynamicCache),
        f"past is the class DynamicCache, and not an object of it: {PAST}",
    ),
    "replay a class": (
        lambda m, t: replay(t, H2O),
        f"policy is the class H2O, and not an object of it: {POLICY}",
    ),
    "replay a model": (
        lambda m, t: replay(m, H2O(64)),
        f"trace is of type LlamaForCausalLM: {TRACE}",
    ),
    "replay swapped": (lambda m, t: replay(H2O(64), t), f": {TRACE}"),
    "replay by numbers": (
        lambda m, t: replay(t, H2O(64), thresholds=0.05),
        "thresholds is 0.05: expected Thresholds(alpha=0.05)",
    ),
    "a map of nothing": (lambda m, t: milestone_map(None, 1), f"trace is None: {TRACE}"),
    "then a class": (lambda m, t: Then(SnapKV(128), H2O), "to decode with"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_wrong_object_is_named(name, model, trace):
    if "map" in name:
        pytest.importorskip("matplotlib")
    call, said = WRONG[name]
    with pytest.raises(SparsityError, match=re.escape(said)):
        call(model, trace)
    detach(model)


def test_an_empty_past_is_none(model):
    ids = random_ids(9, 1)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    for past in (DynamicCache(), DynamicCache(config=model.config)):
        cache = SparseCache(model, RaaS(64), past=past)
        got = model.generate(ids, max_new_tokens=4, do_sample=False, past_key_values=cache)
        assert torch.equal(got, expected)
    detach(model)


@pytest.mark.parametrize(("heads", "size"), [(3, 16), (2, 8)])
def test_a_past_of_another_model_is_refused(heads, size, model):
    past = DynamicCache()
    for layer in range(2):
        past.update(torch.zeros(1, heads, 5, size), torch.zeros(1, heads, 5, size), layer)
    cache = SparseCache(model, RaaS(64), past=past)
    said = f"holds {heads} KV heads of {size} numbers, and the model has 2 KV heads of 16 numbers"
    for _ in range(2):  # nothing was changed: it is refused for its cause once more
        with pytest.raises(SparsityError, match=said):
            model.generate(random_ids(9, 1), max_new_tokens=4, past_key_values=cache)
    detach(model)


def test_rows_are_named_by_lists_and_arrays_too(model):
    ids = random_ids(9, 3)
    cache = SparseCache(model, RaaS(64))
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        keys = cache.layers[1].keys.clone()
        cache.batch_select_indices([2, 0])
        cache.batch_repeat_interleave(2.0)
        cache.reorder_cache([3, 0])
    assert torch.equal(cache.layers[1].keys, keys[[0, 2]])
    for wrong in (1, [[0, 1]], [0.0, 1.0], [], "01"):  # the first two would change the shapes
        for name, take in (
            ("indices", cache.batch_select_indices),
            ("beam_idx", cache.reorder_cache),
        ):
            said = re.escape(f"{name}={wrong!r}: expected the numbers of the rows to take")
            with pytest.raises(SparsityError, match=said):
                take(wrong)
    assert torch.equal(cache.layers[1].keys, keys[[0, 2]])
    with pytest.raises(SparsityError, match="repeats=0: expected a whole number of at least 1"):
        cache.batch_repeat_interleave(0)
    detach(model)


def test_a_model_without_a_head_is_attached_too(model):
    """It has no `generate`, so that nothing of it but its decoder is watched."""
    decoder = model.get_decoder()
    assert isinstance(decoder, LlamaModel)
    cache = SparseCache(decoder, RaaS(64))
    with torch.no_grad():
        got = decoder(input_ids=random_ids(9, 1), past_key_values=cache).last_hidden_state
        detach(decoder)
        torch.testing.assert_close(got, decoder(input_ids=random_ids(9, 1)).last_hidden_state)
