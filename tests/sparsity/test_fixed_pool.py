"""Decoding in memory of fixed size: the tokens of memory that grows, in one graph."""

import copy
import pickle

import pytest
import torch
import transformers
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache

from sparsity import (
    H2O,
    Full,
    Quest,
    QuestRaaS,
    RaaS,
    SnapKV,
    SparseCache,
    SparsityError,
    StreamingLLM,
    Then,
    detach,
)
from sparsity.hf import compiled_step
from sparsity.hf.decoding_path import COMPILED
from tests.helpers import SHAPE, random_ids, tiny_model
from tests.sparsity.helpers import padded_inputs
from tests.sparsity.zoo import SCORES, SMALL, TIGHT

POLICY = RaaS(16, page_size=4, pin_prompt=False, alpha=0.15)
PROMPT = {"rows": (5, 0), "prompt": 13}
GREEDY = {"do_sample": False, "eos_token_id": None}


@pytest.fixture
def fresh():
    """Nothing compiled before, nor left for the next test; a recompilation too many is an error."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def compiles(backend="eager"):
    """What makes `generate` compile on a CPU, into one graph or not at all."""
    config = compiled_step.compile_config()
    config = CompileConfig(**vars(config) | {"backend": backend})
    if backend == "eager":
        config.options = {"guard_filter_fn": compiled_step.guards_kept}
    else:
        config.options = dict(config.options) | {"triton.cudagraphs": False}
    config._compile_all_devices = True
    return config


def generate(model, cache, tokens=40, rows=(7, 0), prompt=21, **kwargs):
    given = padded_inputs(prompt, *rows) | GREEDY | kwargs
    return model.generate(past_key_values=cache, max_new_tokens=tokens, **given)


def fixed(model, policy, **kwargs):
    return SparseCache(model, policy, static=True, **{"max_tokens": 400} | kwargs)


@pytest.mark.parametrize("policy", TIGHT, ids=str)
def test_the_compiled_path_makes_the_tokens_of_the_eager_one(policy, shallow, fresh):
    """200 steps, padding; one graph, no break, no second compilation."""
    expected = generate(shallow, SparseCache(shallow, policy, static=False), 200, **PROMPT)
    cache = fixed(shallow, policy)
    got = generate(shallow, cache, 200, compile_config=compiles(), **PROMPT)
    assert torch.equal(got, expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert cache.report().decoding == COMPILED


@pytest.mark.parametrize("policy", SMALL, ids=str)
def test_a_fixed_pool_holds_what_one_that_grows_holds(policy, shallow):
    """Columns, stamps, sums and pins, step by step, with a row whose column is padding at times."""
    caches = [SparseCache(shallow, policy, static=False), fixed(shallow, policy)]
    ids, rows = random_ids(40, 3), 3
    mask = torch.ones(rows, 40, dtype=torch.long)
    mask[0, :5], mask[1, 14:16], mask[2, 20:23] = 0, 0, 0
    for first, stop in ((0, 12), *((i, i + 1) for i in range(12, 30)), (30, 33), (33, 34)):
        outputs = []
        for cache in caches:
            logits = shallow(
                ids[:, first:stop], attention_mask=mask[:, :stop], past_key_values=cache
            ).logits
            outputs.append(logits[mask[:, first:stop].bool()])
            pools = [layer.pool for layer in cache.retentions.values()]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
        for layer in caches[0].retentions:
            assert _held(caches[0], layer) == _held(caches[1], layer), (stop, layer)
        assert caches[0].get_seq_length() == caches[1].get_seq_length() == stop
    assert len(pools) == 2


def _held(cache, layer):
    """Of each row and head: the columns held, by page, with what the policy notes."""
    pool = cache.retentions[layer].pool
    found = []
    for b in range(pool.start.shape[0]):
        for h in range(pool.start.shape[1]):
            slots = pool.slots[b, h].unflatten(0, (-1, pool.size)).tolist()
            stamps, pins = pool.stamp[b, h].tolist(), pool.pinned[b, h].tolist()
            sums = [[round(x, 3) for x in page] for page in pool.sums[b, h].tolist()]
            pages = zip(pool.start[b, h].tolist(), slots, stamps, pins, sums, strict=True)
            found.append(sorted(page for page in pages if page[0] >= 0))
    return found


def test_another_text_is_no_other_graph_and_another_policy_is(shallow, fresh):
    def graphs(policy=POLICY, rows=(7, 0), prompt=21):
        expected = generate(shallow, SparseCache(shallow, policy), 10, rows, prompt)
        config = compiles()
        got = generate(shallow, fixed(shallow, policy), 10, rows, prompt, compile_config=config)
        assert torch.equal(got, expected)
        return counters["stats"]["unique_graphs"]

    assert graphs() == 1
    assert graphs(prompt=30) == 1
    assert graphs(RaaS(20, page_size=4, pin_prompt=False, alpha=0.15)) == 2
    assert graphs(rows=(0,)) == 3
    assert graphs() == 3
    shallow.model.layers[0].self_attn.scaling *= 0.5  # a model that was changed
    assert graphs() == 4
    shallow.model.layers[1].mlp.register_forward_hook(lambda module, given, out: 2 * out)
    assert graphs() == 5
    shallow.model.layers[0].mlp.down_proj.weight.data *= 2  # the graph reads its weights
    assert graphs() == 5


@pytest.mark.slow
@pytest.mark.parametrize("policy", [POLICY, H2O(10), StreamingLLM(8)], ids=str)
def test_inductor_makes_the_same_tokens(policy, shallow, fresh):
    expected = generate(shallow, SparseCache(shallow, policy))
    got = generate(shallow, fixed(shallow, policy), compile_config=compiles("inductor"))
    assert torch.equal(got, expected)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("policy", [POLICY, TIGHT[3], TIGHT[12]], ids=str)
def test_several_turns_reset_and_forks(policy, shallow, fresh):
    """Buffers stay where they are over turns and resets, so that nothing is captured anew."""

    def talk(cache, **kwargs):
        given = padded_inputs(21, 7, 0)
        first = generate(shallow, cache, 30, **kwargs)
        more = torch.cat([first, random_ids(9, 2)], 1)
        mask = torch.cat([given["attention_mask"], torch.ones(2, 39, dtype=torch.long)], 1)
        given = {"input_ids": more, "attention_mask": mask} | GREEDY | kwargs
        return shallow.generate(past_key_values=cache, max_new_tokens=30, **given)

    expected = talk(SparseCache(shallow, policy))
    cache = fixed(shallow, policy)
    assert torch.equal(talk(cache, compile_config=compiles()), expected)
    where = [t.data_ptr() for r in cache.retentions.values() for t in r.pool.tensors().values()]
    forks = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(talk(cache, compile_config=compiles()), expected)
    now = [t.data_ptr() for r in cache.retentions.values() for t in r.pool.tensors().values()]
    assert now == where
    for fork in forks:
        assert fork.get_seq_length() == cache.get_seq_length()
        rest = torch.cat([expected, random_ids(3, 2)], 1)
        mask = torch.ones_like(rest)
        mask[0, :7] = 0
        given = {"input_ids": rest, "attention_mask": mask, "max_new_tokens": 8} | GREEDY
        one = shallow.generate(past_key_values=fork, **given, compile_config=compiles())
        assert torch.equal(one, shallow.generate(past_key_values=copy.deepcopy(cache), **given))


def test_a_cache_handed_over_by_past(shallow, fresh):
    ids = random_ids(25, 1)

    def go_on(**kwargs):
        past = DynamicCache(config=shallow.config)
        shallow(ids[:, :24], past_key_values=past)
        cache = SparseCache(shallow, POLICY, past=past, static="compile_config" in kwargs)
        return shallow.generate(
            ids, past_key_values=cache, max_new_tokens=30, **GREEDY | kwargs
        ), cache

    expected, _ = go_on()
    got, cache = go_on(compile_config=compiles())
    assert torch.equal(got, expected)
    assert cache.report().decoding == COMPILED


def test_rows_that_end_early(shallow, fresh):
    """A row that has ended is fed padding; the other goes on as without it."""
    plain = generate(shallow, SparseCache(shallow, POLICY), 60)
    ends = {"eos_token_id": int(plain[0, 30]), "pad_token_id": 0}
    expected = generate(shallow, SparseCache(shallow, POLICY), 60, **ends)
    got = generate(shallow, fixed(shallow, POLICY), 60, **ends, compile_config=compiles())
    assert torch.equal(got, expected)


def test_what_is_not_compiled_says_why(shallow):
    def why(policy=POLICY, make=fixed, **kwargs):
        cache = make(shallow, policy)
        expected = generate(shallow, SparseCache(shallow, policy), 12, **kwargs)
        got = generate(shallow, cache, 12, **kwargs, compile_config=compiles())
        assert torch.equal(got, expected)
        return cache.report().decoding

    assert "beam_search" in why(num_beams=3)
    assert "prefill_chunk_size" in why(prefill_chunk_size=6)
    assert "disable_compile" in why(disable_compile=True)
    assert "static=False" in why(make=lambda m, p: SparseCache(m, p, static=False))
    assert "not on a CUDA device" in why(make=SparseCache)
    assert "max_tokens=N" in why(Full(), make=SparseCache)
    assert "max_tokens=N" in str(SparseCache(shallow, Quest(8, page_size=4)).report())


@pytest.mark.parametrize("policy", [Quest(8, page_size=4), Full(), SnapKV(8, window=3)], ids=str)
def test_memory_without_a_bound_cannot_be_fixed(policy, shallow):
    with pytest.raises(SparsityError, match="max_tokens=N"):
        SparseCache(shallow, policy, static=True)


def test_a_model_that_cannot_be_compiled(shallow):
    shallow.model._can_compile_fullgraph = False
    with pytest.raises(SparsityError, match="does not compile a LlamaModel"):
        fixed(shallow, POLICY)
    assert "does not compile" in SparseCache(shallow, POLICY).report().decoding


def test_too_few_tokens_are_refused_before_anything_is_computed(shallow):
    calls = []
    shallow.register_forward_pre_hook(lambda *given: calls.append(1))
    cache = fixed(shallow, Full(), max_tokens=30)
    with pytest.raises(SparsityError, match=r"max_tokens=30.*text of 61 .*max_tokens=60"):
        generate(shallow, cache, 40)
    assert not calls
    out = generate(shallow, cache, 10)  # 21 + 10, of which the last needs no place
    assert out.shape[1] == 31
    with pytest.raises(SparsityError, match=r"makes 31 tokens .*max_tokens=31 or more"):
        shallow(out[:, -1:], past_key_values=cache)
    with pytest.raises(SparsityError, match="whole number"):
        SparseCache(shallow, Full(), max_tokens=1.5)
    with pytest.raises(SparsityError, match="static='yes'"):
        SparseCache(shallow, Full(), static="yes")


def test_a_prompt_that_fills_the_budget_it_is_pinned_in(shallow):
    """Where no page is left to evict the step is refused, as in memory that grows."""
    policy = RaaS(24, page_size=4)
    for cache in (SparseCache(shallow, policy), fixed(shallow, policy)):
        with pytest.raises(SparsityError, match="pinned pages fill the whole budget"):
            generate(shallow, cache, 20, rows=(0, 0))


def test_a_step_that_fails_leaves_the_cache_refused(shallow):
    cache = fixed(shallow, POLICY)

    def fail(module, given):
        if cache.armed:
            raise KeyboardInterrupt

    hook = shallow.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        generate(shallow, cache)
    hook.remove()
    with pytest.raises(SparsityError, match="did not finish"):
        shallow(random_ids(1, 2), past_key_values=cache)
    cache.reset()
    expected = generate(shallow, SparseCache(shallow, POLICY))
    assert torch.equal(generate(shallow, cache), expected)


def test_memory_is_that_of_the_budget_whatever_the_length(shallow):
    sizes = set()
    for tokens in (2, 50, 150):
        cache = SparseCache(shallow, POLICY, static=True)
        generate(shallow, cache, tokens)
        sizes.add(cache.report().num_bytes)
    assert len(sizes) == 1


@pytest.mark.parametrize(
    "policy",
    [
        QuestRaaS(8, page_size=4, prompt_budget=4),
        Then(SnapKV(12, window=3, page_size=4), Quest(8, page_size=4, dense_layers=0)),
    ],
    ids=str,
)
def test_prompts_that_are_kept_need_max_tokens(policy, shallow):
    with pytest.raises(SparsityError, match="max_tokens=N"):
        SparseCache(shallow, policy, static=True)
    fixed(shallow, policy)


def test_detached_the_model_is_as_before(shallow):
    before = {name for name in vars(shallow) if not name.startswith("_")}
    fixed(shallow, POLICY)
    detach(shallow)
    assert {name for name in vars(shallow) if not name.startswith("_")} == before
    assert "_prepare_cache_for_generation" not in vars(shallow)


def test_a_mask_beyond_padding_is_refused_for_a_single_token(shallow):
    cache = fixed(shallow, POLICY)
    ids = random_ids(9, 1)
    shallow(ids, past_key_values=cache)
    with pytest.raises(SparsityError, match="padding mask"):
        shallow(ids[:, :1], past_key_values=cache, attention_mask=torch.zeros(1, 1, 1, 10))


def test_a_second_model_of_the_same_shape(fresh):
    """A graph is of its own model's weights."""
    config, outputs = compiles(), []
    for seed in (0, 1):
        model = tiny_model("llama", seed=seed, num_hidden_layers=2)
        expected = generate(model, SparseCache(model, POLICY), 20)
        got = generate(model, fixed(model, POLICY), 20, compile_config=config)
        assert torch.equal(got, expected)
        outputs.append(got)
    assert not torch.equal(*outputs)


def with_scores(name):
    """A model whose attention is more than a softmax of products: a soft cap, or sinks."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SHAPE | SCORES[name])
    implementation = {"attn_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_config(config, **implementation).eval()


@pytest.mark.parametrize("family", ["gemma3", "qwen3", "mistral_sliding", "phi3", *SCORES])
def test_sliding_windows_soft_caps_and_sinks(family, fresh):
    """Layers with a window keep just the window."""
    model = with_scores(family) if family in SCORES else tiny_model(family)
    expected = generate(model, SparseCache(model, POLICY, static=False), 60)
    cache = fixed(model, POLICY)
    assert torch.equal(generate(model, cache, 60, compile_config=compiles()), expected)
    report = cache.report()
    assert report.decoding == COMPILED
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    layers = zip(report.tokens_kept, report.managed, strict=True)
    windows = [kept for kept, under in layers if not under]
    assert all(kept == 16 for kept in windows)
    assert bool(windows) == (family in ("gemma3", "mistral_sliding", *SCORES))


def test_padding_amid_a_row_and_windows():
    model, ids = tiny_model("gemma3"), random_ids(12, 2)
    mask = torch.ones_like(ids)
    mask[0, 6] = 0
    with pytest.raises(SparsityError, match="padding amid a row"):
        model(ids, attention_mask=mask, past_key_values=fixed(model, POLICY))


def test_a_rehearsal_changes_nothing(shallow):
    """It runs the step on a copy, of one row."""
    cache = fixed(shallow, POLICY)
    shallow(random_ids(21, 2), past_key_values=cache)
    before = [_held(cache, layer) for layer in cache.retentions]
    cache._state.rehearse()
    assert [_held(cache, layer) for layer in cache.retentions] == before
    assert cache.get_seq_length() == 21
