"""What `generate` does to a cache."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache

from sparsity import RaaS, Random, SparseCache, StreamingLLM
from tests.helpers import FAMILIES, assert_close, random_ids, tiny_model
from tests.sparsity.helpers import padded_inputs
from tests.sparsity.zoo import AMPLE, TIGHT, asks_the_prompt, shallow_model


def inputs(rows=2, length=13, pads=5):
    return padded_inputs(length, pads, *[0] * (rows - 1))


def generate(model, cache, tokens=14, **kwargs):
    kwargs = {"do_sample": False} | inputs() | kwargs
    return model.generate(max_new_tokens=tokens, past_key_values=cache, **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_ample_budget_equals_dense(family):
    """Every policy in every mode on one family; on the others each in one, and every mode."""
    model = tiny_model(family)
    modes = [
        inputs(pads=0),
        inputs(),
        inputs() | {"num_beams": 3},
        inputs() | {"do_sample": True, "num_return_sequences": 3, "top_k": 20},
    ]
    for i, mode in enumerate(modes):
        torch.manual_seed(0)
        dense = generate(model, None, 8, **mode)  # over the end of a page of 16
        for policy in AMPLE if family == "llama" else AMPLE[i :: len(modes)]:
            torch.manual_seed(0)
            out = generate(model, SparseCache(model, policy), 8, **mode)
            assert torch.equal(out, dense), policy


@pytest.mark.parametrize("policy", TIGHT, ids=str)
def test_reset_fork_and_pickle(policy, shallow):
    cache = SparseCache(shallow, policy)
    first = generate(shallow, cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.report().num_bytes == 0
    assert torch.equal(generate(shallow, cache), first)

    def go_on(cache):
        rest = torch.cat([first, first[:, :2]], 1)
        mask = torch.cat([inputs()["attention_mask"], torch.ones(2, rest.shape[1] - 13)], 1).long()
        return generate(shallow, cache, input_ids=rest, attention_mask=mask)

    forks = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    expected = go_on(cache)
    for fork in forks:
        assert torch.equal(go_on(fork), expected)


@pytest.mark.parametrize("policy", TIGHT, ids=str)
def test_rows_taken_and_repeated_go_on_as_those_rows(policy, shallow):
    ids, mask = inputs(3)["input_ids"], inputs(3)["attention_mask"]
    mask[1, :3] = 0
    extra = random_ids(12, 3, seed=5)

    def feed(cache, rows):
        logits = []
        with torch.no_grad():
            full = mask[rows]
            for i in range(12):
                full = torch.cat([full, torch.ones_like(full[:, :1])], 1)
                out = shallow(
                    input_ids=extra[rows, i : i + 1],
                    attention_mask=full,
                    position_ids=full.sum(-1, keepdim=True) - 1,
                    past_key_values=cache,
                )
                logits.append(out.logits[:, -1])
        return torch.stack(logits, 1)

    cache = SparseCache(shallow, policy)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        shallow(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    forks = [copy.deepcopy(cache) for _ in range(3)]
    expected = feed(cache, torch.arange(3))
    order = torch.tensor([2, 0, 0])
    forks[0].reorder_cache(order)
    assert_close("reorder", feed(forks[0], order), expected[order])
    forks[1].batch_select_indices(order[:2])
    assert_close("select", feed(forks[1], order[:2]), expected[order[:2]])
    repeated = torch.arange(3).repeat_interleave(2)
    forks[2].batch_repeat_interleave(2)
    assert_close("repeat", feed(forks[2], repeated), expected[repeated])


def test_several_turns_and_chunked_prefill_with_an_ample_budget(llama):
    dense, turn = DynamicCache(), inputs(pads=0)["input_ids"]
    caches = [SparseCache(llama, policy) for policy in AMPLE]
    for seed in (3, 4):
        expected = llama.generate(turn, max_new_tokens=6, do_sample=False, past_key_values=dense)
        for cache in caches:
            got = llama.generate(turn, max_new_tokens=6, do_sample=False, past_key_values=cache)
            assert torch.equal(got, expected)
        turn = torch.cat([expected, random_ids(7, 2, seed=seed)], 1)
    expected = generate(llama, None)
    for policy in AMPLE:
        got = generate(llama, SparseCache(llama, policy), prefill_chunk_size=4)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("policy", TIGHT, ids=str)
def test_every_mode_under_a_tight_budget(policy, shallow):
    """Beams, samples and chunks end with as many tokens as the policy allows, row by row."""
    cache = SparseCache(shallow, policy)
    modes = [
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 20},
        {"prefill_chunk_size": 4},
        {"num_beams": 3},
    ]
    outs = []
    for mode in modes:
        torch.manual_seed(0)
        outs.append(generate(shallow, cache, **mode))
        report = cache.report()
        assert report.tokens_seen == 26
        if policy.evicts and policy.evict_every is not None and policy.pins_count:
            held = policy.budget + max(policy.evict_every, 1) - 1
            held *= 2 if hasattr(policy, "beta") else 1
            assert max(report.tokens_kept[policy.dense_layers :]) <= held
        cache.reset()
    assert torch.equal(outs[-1], outs[0])  # whatever the cache was used for in between


KNOWS = [policy for policy in TIGHT[1:] if not asks_the_prompt(policy)]
CASES = [("llama", policy) for policy in (*AMPLE, *KNOWS)]
CASES += [("gemma3", policy) for policy in (*AMPLE[::4], *KNOWS[::3])]


@pytest.mark.parametrize(("family", "policy"), CASES, ids=str)
def test_going_on_from_another_cache_equals_the_prompt_at_once(family, policy):
    model = shallow_model(family)
    ids = random_ids(19, 2)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = generate(model, SparseCache(model, policy), input_ids=ids, attention_mask=mask)
    for past in (DynamicCache(), DynamicCache(config=model.config)):
        with torch.no_grad():
            model(
                input_ids=ids[:, :18],
                attention_mask=mask[:, :18],
                position_ids=positions[:, :18],
                past_key_values=past,
            )
        held = [(layer.keys.clone(), layer.values.clone()) for layer in past.layers]
        cache = SparseCache(model, policy, past=past)
        assert cache.get_seq_length() == 18
        got = generate(model, cache, input_ids=ids, attention_mask=mask)
        assert torch.equal(got, expected)
        for layer, (keys, values) in zip(past.layers, held, strict=True):
            assert torch.equal(layer.keys, keys)
            assert torch.equal(layer.values, values)


@pytest.mark.parametrize("policy", [p for p in TIGHT if asks_the_prompt(p)], ids=str)
def test_going_on_without_the_queries_of_the_prompt(policy, llama):
    """What the cached tokens' queries said is unknown: other tokens may stay, as many as before."""
    ids, past = random_ids(19, 2), DynamicCache()
    caches = [SparseCache(llama, policy)]
    with torch.no_grad():
        llama(input_ids=ids[:, :18], past_key_values=past)
        caches.append(SparseCache(llama, policy, past=past))
        logits = [llama(input_ids=ids, past_key_values=caches[0]).logits[:, -1]]
        logits.append(llama(input_ids=ids[:, 18:], past_key_values=caches[1]).logits[:, -1])
    assert_close("before anything is evicted", logits[1], logits[0])
    assert caches[0].report().tokens_kept == caches[1].report().tokens_kept
    assert caches[1].report().evictions == caches[0].report().evictions


def test_one_past_row_serves_many(llama):
    ids = random_ids(12, 1)
    past = DynamicCache()
    with torch.no_grad():
        llama(input_ids=ids[:, :9], past_key_values=past)
    for mode in ({"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}):
        torch.manual_seed(0)
        expected = llama.generate(ids, max_new_tokens=9, **mode)
        torch.manual_seed(0)
        cache = SparseCache(llama, RaaS(64), past=past)
        assert torch.equal(
            llama.generate(ids, max_new_tokens=9, past_key_values=cache, **mode), expected
        )
    prompts = torch.cat([ids.expand(3, -1), random_ids(3, 3)], 1)
    expected = llama.generate(prompts, max_new_tokens=9)
    cache = SparseCache(llama, StreamingLLM(64), past=past)
    assert torch.equal(llama.generate(prompts, max_new_tokens=9, past_key_values=cache), expected)


def test_random_draws_depend_on_the_seed_and_come_again(llama):
    runs = [
        generate(llama, SparseCache(llama, Random(10, pin_prompt=False, recent=2, seed=seed)), 40)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
