"""Bad input: an error that says what to do; nothing lost, nothing left attached."""

import copy

import pytest
import torch
import transformers
from transformers import DynamicCache

import sparsity
from sparsity import (
    H2O,
    RKV,
    TOVA,
    Full,
    LazyEviction,
    PyramidKV,
    Quest,
    QuestRaaS,
    RaaS,
    Random,
    SnapKV,
    SparseCache,
    SparsityError,
    StreamingLLM,
    Then,
    VaSE,
)
from tests.helpers import SHAPE, random_ids, tiny_model
from tests.sparsity.helpers import left_as_it_was
from tests.sparsity.zoo import TIGHT


def is_plain(model):
    decoder = model.get_decoder()
    return (
        not decoder._forward_hooks
        and not decoder._forward_pre_hooks
        and model.config._attn_implementation in ("sdpa", "eager")
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RaaS(0), "budget=0"),
        (lambda: Random(-16), "budget=-16"),
        (lambda: StreamingLLM(1.5), "budget=1.5"),
        (lambda: Quest(100), "multiple of the page size; use budget=96"),
        (lambda: RaaS(64, page_size=0), "page_size=0"),
        (lambda: StreamingLLM(4), "fewer sinks"),
        (lambda: Random(8, recent=8), "recent=2"),
        (lambda: RaaS(64, alpha=0.1, top_ratio=0.5), "one of the two"),
        (lambda: RaaS(64, alpha=1.0), "alpha"),
        (lambda: RaaS(64, top_ratio=0.0), "top_ratio"),
        (lambda: RaaS(64, group="sum"), "'max' or 'mean'"),
        (lambda: Quest(64, dense_layers=-1), "dense_layers=-1"),
        (lambda: RaaS(64, score="best"), "'bound' or 'exact'"),
        (lambda: RaaS(64, attend="some"), "'all' or 'top'"),
        (lambda: RaaS(64, evict_every=24), "multiple of 16"),
        (lambda: RaaS(48, sinks=4, recent=17), "above 48"),
        (lambda: QuestRaaS(64, prompt_budget=100), "use prompt_budget=96"),
        (lambda: H2O(64, evict_every=0), "evict_every=0"),
        (lambda: H2O(64, sinks=32), "fewer sinks"),
        (lambda: H2O(64, normalise="length"), "'none' or 'age'"),
        (lambda: H2O(64, recent=-1), "recent=-1"),
        (lambda: TOVA(100, page_size=16), "multiple of the page size"),
        (lambda: SnapKV(64), "recent=64"),
        (lambda: SnapKV(128, kernel=4), "odd number such as 5"),
        (lambda: SnapKV(128, window=0), "window=0"),
        (lambda: SnapKV(128, pooling="sum"), "'mean' or 'max'"),
        (lambda: PyramidKV(128, beta=0), "beta=0"),
        (lambda: RKV(64, mix=0), "mix=0"),
        (lambda: RKV(64, threshold=1), "threshold=1"),
        (lambda: LazyEviction(128), "recent=175"),
        (lambda: LazyEviction(512, alpha=-1), "alpha=-1"),
        (lambda: VaSE(88), "above 90"),
        (lambda: VaSE(256, large=-1), "large=-1"),
        (lambda: Then(RaaS(64), RaaS(64)), "expected SnapKV or PyramidKV"),
        (lambda: Then(SnapKV(128), 64), "to decode with"),
        (lambda: Then(SnapKV(128, evict_every=8), H2O(128)), "without evict_every"),
        (lambda: Then(SnapKV(128), RaaS(1024)), "page_size=1 of SnapKV and page_size=16 of RaaS"),
        (lambda: Then(SnapKV(128, page_size=16), Quest(64)), "give both the same dense_layers"),
        (lambda: Then(SnapKV(128), LazyEviction(256)), "give both the same group"),
        (lambda: Then(SnapKV(128, group="max"), RKV(256)), "window=64 of SnapKV and window=8"),
        (lambda: Then(SnapKV(128), H2O(127)), "has room for 127"),
    ],
)
def test_configuration(make, words):
    with pytest.raises(SparsityError, match=words):
        make()


def test_pinned_prompt_that_fills_the_budget(llama):
    for policy in (RaaS(32, page_size=8), Random(32), H2O(32, pin_prompt=True)):
        cache = SparseCache(llama, policy)
        ids = random_ids(40, 1)
        with pytest.raises(SparsityError, match=r"40 tokens.*budget of 32.*pin_prompt=False"):
            llama.generate(ids, max_new_tokens=2, past_key_values=cache)
        assert cache.get_seq_length() == 0
        short = ids[:, :20]  # nothing was lost: the same cache still works
        out = llama.generate(short, max_new_tokens=4, past_key_values=cache)
        assert torch.equal(out, llama.generate(short, max_new_tokens=4))


def test_pinned_pages_leave_no_room_later_on(llama):
    cache = SparseCache(llama, RaaS(32, page_size=8))
    ids = random_ids(30, 1)
    out = llama.generate(ids, max_new_tokens=3, past_key_values=cache)
    assert torch.equal(out, llama.generate(ids, max_new_tokens=3))
    with pytest.raises(SparsityError, match="at least 40"):
        llama(input_ids=out[:, -1:], past_key_values=cache)


def test_going_back_is_refused(llama):
    ids = random_ids(8, 1).repeat(1, 4)
    for policy in (StreamingLLM(8), Full()):
        cache = SparseCache(llama, policy)
        with pytest.raises(SparsityError, match="prompt-lookup"):
            llama.generate(
                ids,
                max_new_tokens=20,
                past_key_values=cache,
                prompt_lookup_num_tokens=4,
                eos_token_id=2,
            )
    for policy in TIGHT:
        cache = SparseCache(llama, policy)
        llama(input_ids=ids, past_key_values=cache) if not policy.pin_prompt else None
        for refused in (cache, *cache.layers):
            with pytest.raises(SparsityError, match="crop"):
                refused.crop(-1)


@pytest.mark.parametrize("masked", [True, False])
def test_a_prompt_that_is_cached_whole(masked, llama):
    ids = random_ids(9, 2)
    mask = torch.ones_like(ids)
    if masked:
        mask[0, :3] = 0
    filled = SparseCache(llama, StreamingLLM(6, sinks=1))
    plain = DynamicCache()
    with torch.no_grad():
        llama(input_ids=ids, attention_mask=mask, past_key_values=filled)
        llama(input_ids=ids, attention_mask=mask, past_key_values=plain)
    for cache in (filled, SparseCache(llama, RaaS(64), past=plain)):
        with pytest.raises(SparsityError, match="cached whole"):
            llama.generate(ids, attention_mask=mask, max_new_tokens=2, past_key_values=cache)
        assert cache.get_seq_length() == 9


def test_another_model_batch_or_mask(llama):
    cache = SparseCache(llama, RaaS(64))
    ids = random_ids(9, 2)
    llama.generate(ids, max_new_tokens=2, past_key_values=cache)
    other = tiny_model("llama", seed=1)
    sparsity.attach(other)
    with pytest.raises(SparsityError, match="another model"):
        other(input_ids=ids[:, :1], past_key_values=cache)
    with pytest.raises(SparsityError, match=r"holds 2 rows .* called with 3"):
        llama(input_ids=random_ids(1, 3), past_key_values=cache)
    with pytest.raises(SparsityError, match="padding mask"):
        llama(
            input_ids=ids[:, :1],
            attention_mask=torch.ones(2, 1, 1, 11, dtype=torch.bool),
            past_key_values=cache,
        )
    with pytest.raises(SparsityError, match="expected a policy"):
        SparseCache(llama, 1024)
    assert cache.report().tokens_seen == 10
    llama(input_ids=ids[:, :1], past_key_values=cache)


def test_past_that_does_not_fit(llama):
    past, ids = DynamicCache(), random_ids(9, 1)
    small = tiny_model("llama", num_hidden_layers=2)
    small(input_ids=ids, past_key_values=past)
    plain = tiny_model("llama")
    with pytest.raises(SparsityError, match="2 layers and the model 4"):
        SparseCache(plain, RaaS(64), past=past)
    assert is_plain(plain)
    used = SparseCache(llama, StreamingLLM(6))
    llama(input_ids=ids, past_key_values=used)
    with pytest.raises(SparsityError, match="9 tokens it has seen"):
        SparseCache(llama, StreamingLLM(6), past=used)


TINY = {key: SHAPE[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
UNKNOWN = {
    "gptj": lambda: transformers.GPTJConfig(
        vocab_size=128, n_embd=64, n_layer=2, n_head=4, rotary_dim=8
    ),
    "bloom": lambda: transformers.BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4),
    "falcon": lambda: transformers.FalconConfig(**TINY, num_attention_heads=4),
    "t5": lambda: transformers.T5Config(vocab_size=128, d_model=64, d_ff=64, num_layers=2),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **SHAPE | {"num_key_value_heads": 4},
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=4,
        moe_intermediate_size=32,
        n_group=1,
        topk_group=1,
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unsupported_models_are_left_as_they_were(name):
    config = UNKNOWN[name]()
    kind = transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM
    model = kind.from_config(config).eval()
    with left_as_it_was(model):
        for call in (lambda: SparseCache(model, RaaS(64)), lambda: sparsity.attach(model)):
            with pytest.raises(SparsityError, match=r"use it with a cache|use a DynamicCache"):
                call()
    with pytest.raises(SparsityError, match="PreTrainedModel"):
        sparsity.attach(torch.nn.Linear(2, 2))


def test_a_model_that_drops_keyword_arguments_is_detached():
    config = transformers.StableLmConfig(**SHAPE)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    cache = SparseCache(model, RaaS(64))
    with pytest.raises(SparsityError, match="drops keyword arguments"):
        model(input_ids=random_ids(5, 1), past_key_values=cache)
    assert is_plain(model)


def test_an_unfinished_forward_is_noticed(llama):
    cache = SparseCache(llama, RaaS(64))
    ids = random_ids(6, 1)
    layer = llama.model.layers[2]

    def fail(*args):
        raise RuntimeError("out of memory")

    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        llama(input_ids=ids, past_key_values=cache)
    handle.remove()
    with pytest.raises(SparsityError, match="reset"):
        llama(input_ids=ids, past_key_values=cache)
    cache.reset()
    got = llama.generate(ids, max_new_tokens=5, past_key_values=cache)
    assert torch.equal(got, llama.generate(ids, max_new_tokens=5))


def test_a_detached_model_is_refused_and_comes_back(llama):
    cache, ids = SparseCache(llama, RaaS(64)), random_ids(6, 1)
    sparsity.detach(llama)
    with pytest.raises(SparsityError, match=r"call attach\(model\)"):
        llama(input_ids=ids, past_key_values=cache)
    cache.reset()
    sparsity.attach(llama)
    got = llama.generate(ids, max_new_tokens=5, past_key_values=cache)
    assert torch.equal(got, llama.generate(ids, max_new_tokens=5))


def test_a_model_that_drops_its_cache_at_a_length():
    model = tiny_model("phi3", original_max_position_embeddings=20)
    cache, ids = SparseCache(model, RaaS(64)), random_ids(12, 1)
    with pytest.raises(SparsityError, match="drops its cache when a text grows past 20 tokens"):
        model.generate(ids, max_new_tokens=20, past_key_values=cache)
    cache.reset()
    got = model.generate(ids, max_new_tokens=8, past_key_values=cache)
    assert torch.equal(got, model.generate(ids, max_new_tokens=8))


def test_a_copy_of_an_attached_model_is_refused(llama):
    sparsity.attach(llama)
    with pytest.raises(SparsityError, match="before copying"):
        SparseCache(copy.deepcopy(llama), RaaS(64))


def test_rows_without_room_may_be_left_out(llama):
    ids = random_ids(30, 2)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    cache = SparseCache(llama, RaaS(32, page_size=8))
    with torch.no_grad():
        llama(input_ids=ids, attention_mask=mask, past_key_values=cache)
        cache.batch_select_indices(torch.tensor([0]))
        for _ in range(9):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            llama(input_ids=ids[:1, :1], attention_mask=mask[:1], past_key_values=cache)
    assert cache.report().tokens_kept == (19,) * 4


def test_a_model_whose_layers_share_keys_is_refused():
    types = ["sliding_attention", "full_attention"] * 2
    config = transformers.Gemma3nTextConfig(
        **{key: value for key, value in SHAPE.items() if key != "eos_token_id"},
        head_dim=16,
        layer_types=types,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        sliding_window=16,
        activation_sparsity_pattern=None,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with (
        left_as_it_was(model),
        pytest.raises(SparsityError, match=r"shares? keys|between layers|cannot manage"),
    ):
        model(input_ids=random_ids(5, 1), past_key_values=SparseCache(model, RaaS(64)))
