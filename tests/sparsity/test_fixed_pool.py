"""Decoding in memory of fixed size: the tokens of memory that grows, in one graph."""

import copy
import pickle
import threading
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache

from sparsity import (
    H2O,
    TOVA,
    Full,
    Quest,
    QuestRaaS,
    RaaS,
    Random,
    SnapKV,
    SparseCache,
    SparsityError,
    StreamingLLM,
    Then,
    detach,
)
from sparsity.hf.decoding_path import COMPILED
from tests.helpers import CONFIGS, SHAPE, random_ids, tiny_model
from tests.sparsity.fixed import GREEDY, POLICY, assert_same, compiles, fixed, generate, held
from tests.sparsity.helpers import padded_inputs
from tests.sparsity.zoo import SCORES, TIGHT, shallow_model


@pytest.mark.compiled
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


@pytest.mark.compiled
def test_inductor_makes_the_same_tokens(shallow, fresh):
    """Of one policy; on a GPU of every one, in test_cuda_compiled."""
    expected = generate(shallow, SparseCache(shallow, POLICY))
    got = generate(shallow, fixed(shallow, POLICY), compile_config=compiles("inductor"))
    assert torch.equal(got, expected)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.compiled
@pytest.mark.parametrize("policy", [POLICY, TIGHT[12]], ids=str)
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


@pytest.mark.compiled
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


def of_config(name):
    """A model with a soft cap or sinks, or one that hands its decoder arguments by position."""
    torch.manual_seed(0)
    more = {"num_key_value_heads": 4} if name == "GPTNeoX" else SCORES[name]
    shape = SHAPE | {"num_hidden_layers": 2} | more
    config = getattr(transformers, f"{name}Config")(**shape)
    implementation = {"attn_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_config(config, **implementation).eval()


@pytest.mark.parametrize(
    "family",
    [
        "gemma3",
        *(
            pytest.param(name, marks=pytest.mark.compiled)
            for name in ("qwen3", "mistral_sliding", "phi3", "GPTNeoX", *SCORES)
        ),
    ],
)
def test_sliding_windows_soft_caps_and_sinks(family, fresh):
    """Layers with a window keep just the window."""
    model = shallow_model(family) if family in CONFIGS else of_config(family)
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
    before = [held(cache, layer) for layer in cache.retentions]
    cache._state.rehearse()
    for layer, found in zip(cache.retentions, before, strict=True):
        assert_same(held(cache, layer), found, tolerance=0)
    assert cache.get_seq_length() == 21


def decodes_alike(model, policy=POLICY, **kwargs):
    """Whether the compiled path makes the tokens of the eager one."""
    expected = generate(model, SparseCache(model, policy, static=False), 12)
    config = compiles()
    return torch.equal(generate(model, fixed(model, policy), 12, compile_config=config), expected)


SCALE = 1.0


def class_of_a_notebook(sign):
    """Classes of one name and one repr, as a cell that is run again defines them."""

    @dataclass(frozen=True)
    class Ours(StreamingLLM):
        def worth(self, pages):
            return sign * pages.start.float()

    return Ours


@pytest.mark.compiled
def test_what_a_graph_was_traced_from_may_change(shallow, fresh):
    """Hooks and what they read, plain objects in a module, tied weights, a class defined anew."""
    global SCALE
    mlp, knob = shallow.model.layers[0].mlp, SimpleNamespace(scale=1.0)
    cell = [1.0]
    mlp.knob = knob
    mlp.register_forward_hook(lambda module, given, out: out * SCALE * cell[0] * module.knob.scale)
    assert decodes_alike(shallow)
    SCALE = 3.0
    assert decodes_alike(shallow)
    cell[0] = 0.5
    assert decodes_alike(shallow)
    knob.scale = 4.0
    assert decodes_alike(shallow)
    shallow.lm_head.weight = torch.nn.Parameter(shallow.lm_head.weight.flip(0))
    assert decodes_alike(shallow)
    for sign in (1, -1):
        assert decodes_alike(shallow, class_of_a_notebook(sign)(12, positions="absolute"))


@pytest.mark.compiled
def test_more_policies_than_torch_lets_one_function_be_traced_for(shallow, fresh):
    for seed in range(10):
        assert decodes_alike(shallow, Random(12, recent=2, pin_prompt=False, seed=seed))


@pytest.mark.parametrize("policy", [H2O(12, evict_every=4), TIGHT[12]], ids=str)
def test_a_prompt_of_embeddings(policy, shallow, fresh):
    """The text that `generate` shows then begins with the first new token."""
    given = {"inputs_embeds": shallow.get_input_embeddings()(random_ids(21, 2))} | GREEDY
    expected, got = (
        shallow.generate(past_key_values=cache, max_new_tokens=25, **given)
        for cache in (SparseCache(shallow, policy, static=False), fixed(shallow, policy))
    )
    assert torch.equal(got, expected)
    calls = []
    shallow.register_forward_pre_hook(lambda *given: calls.append(1))
    cache = fixed(shallow, Full(), max_tokens=30)
    with pytest.raises(SparsityError, match=r"max_tokens=30.*max_tokens=45"):
        shallow.generate(past_key_values=cache, max_new_tokens=25, **given)
    assert not calls


def test_a_step_that_was_prepared_and_did_not_run(shallow):
    """An interruption before the decoder: the next forward goes on from what is held."""
    logits = []
    for cache in (SparseCache(shallow, POLICY, static=False), fixed(shallow, POLICY)):
        steps = []

        def interrupt(module, given, steps=steps):
            steps.append(1)
            if len(steps) == 5:
                raise KeyboardInterrupt

        hook = shallow.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            generate(shallow, cache, rows=(0, 0))
        hook.remove()
        assert cache.get_seq_length() == 24
        assert type(cache.get_seq_length()) is int
        logits.append(shallow(random_ids(7, 2), past_key_values=cache).logits)
    torch.testing.assert_close(*logits)


@pytest.mark.compiled
def test_a_compiled_step_that_fails(shallow, fresh):
    """What was stored of it is seen, and the cache refused until it is reset."""
    runs = []

    def backend(graph, inputs):
        def run(*given):
            result = graph(*given)
            runs.append(1)
            if len(runs) == 4:
                raise MemoryError
            return result

        return run

    cache, config = fixed(shallow, POLICY), compiles()
    config.backend = backend
    with pytest.raises(MemoryError):
        generate(shallow, cache, compile_config=config)
    with pytest.raises(SparsityError, match="did not finish"):
        shallow(random_ids(3, 2), past_key_values=cache)
    cache.reset()
    expected = generate(shallow, SparseCache(shallow, POLICY))
    assert torch.equal(generate(shallow, cache, compile_config=compiles()), expected)


def test_another_conversation_is_refused(shallow):
    cache = fixed(shallow, POLICY)
    text = generate(shallow, cache, 20, rows=(0, 0))
    text[0, 30] += 1
    with pytest.raises(SparsityError, match="at token 30 of row 0"):
        generate(shallow, cache, input_ids=torch.cat([text, text[:, :2]], 1), attention_mask=None)


@pytest.mark.parametrize("family", ["gemma3", "mistral_sliding"])
def test_single_tokens_past_generate_in_a_model_with_windows(family):
    model, ids = tiny_model(family), random_ids(50, 2)
    caches = SparseCache(model, POLICY, static=False), fixed(model, POLICY)
    for first, stop in ((0, 25), *((i, i + 1) for i in range(25, 50))):
        logits = [model(ids[:, first:stop], past_key_values=cache).logits for cache in caches]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_layers_that_were_offloaded_come_back(shallow):
    expected = generate(shallow, SparseCache(shallow, POLICY))
    cache, steps = fixed(shallow, POLICY), []

    def offload(module, given):
        steps.append(1)
        if len(steps) in (3, 9):
            cache.layers[1].offload()

    hook = shallow.lm_head.register_forward_pre_hook(offload)
    assert torch.equal(generate(shallow, cache), expected)
    hook.remove()
    assert cache.layers[1].home is None


def test_a_row_that_becomes_many_at_a_single_token(shallow):
    ids, logits = random_ids(20, 1), []
    mask = torch.ones(3, 21, dtype=torch.long)
    mask[1, 20] = 0
    for cache in (SparseCache(shallow, POLICY, static=False), fixed(shallow, POLICY)):
        shallow(ids, past_key_values=cache)
        new = random_ids(2, 3)
        one = shallow(new[:, :1], attention_mask=mask, past_key_values=cache).logits
        mask_after = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
        two = shallow(new[:, 1:], attention_mask=mask_after, past_key_values=cache).logits
        logits.append(torch.cat([one[mask[:, 20].bool()], two]))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_inference_mode_and_then_without(shallow):
    cache = fixed(shallow, POLICY)
    with torch.inference_mode():
        expected = generate(shallow, cache)
    cache.reset()
    assert torch.equal(generate(shallow, cache), expected)


def test_another_thread_in_the_middle_of_a_step(shallow):
    expected = generate(shallow, SparseCache(shallow, POLICY))
    cache, errors = fixed(shallow, POLICY), []

    def call():
        try:
            shallow(random_ids(3, 2), past_key_values=cache)
        except SparsityError as error:
            errors.append(str(error))

    def interfere(module, given):
        if cache.armed and not errors:
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()

    hook = shallow.model.layers[1].register_forward_pre_hook(interfere)
    assert torch.equal(generate(shallow, cache), expected)
    hook.remove()
    assert "another thread is in a forward" in errors[0]


def test_a_static_cache_of_an_attached_model_is_refused(shallow):
    """Transformers would make masks for it that are not those of an attached model."""
    expected = generate(shallow, DynamicCache(config=shallow.config), 5)
    fixed(shallow, POLICY)
    static = StaticCache(config=shallow.config, max_cache_len=64)
    with pytest.raises(SparsityError, match=r"call detach\(model\) first"):
        generate(shallow, static, 5)
    with pytest.raises(SparsityError, match=r"call detach\(model\) first"):
        generate(shallow, None, 5, cache_implementation="static")
    assert torch.equal(generate(shallow, DynamicCache(config=shallow.config), 5), expected)
    detach(shallow)
    assert torch.equal(generate(shallow, static, 5), expected)


@pytest.mark.parametrize("policy", [TOVA(8), H2O(10), RaaS(16, page_size=4)], ids=str)
def test_what_is_not_a_number_evicts_nothing_that_is_pinned(policy, shallow):
    """One row of the batch is lost, the other goes on as without it."""
    with torch.no_grad():
        shallow.get_input_embeddings().weight[5] = torch.nan
    ids = random_ids(12, 2)
    ids[ids == 5] = 6
    kept = []
    for cache in (SparseCache(shallow, policy, static=False), fixed(shallow, policy)):
        logits = []
        for step in range(6):
            new = random_ids(1, 2) if step else ids
            new[0, -1] = 5 if step == 2 else new[0, -1]
            logits.append(shallow(new, past_key_values=cache).logits[1])
        kept.append((torch.cat(logits), held(cache, 1)[2:]))
    torch.testing.assert_close(kept[0][0], kept[1][0])
    assert_same(kept[0][1], kept[1][1])
