"""Every method against the slow definition of what it chooses, on one engine."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from picache import (
    A3,
    CacheBlend,
    Combined,
    FullRecompute,
    LegoLink,
    LinkMethod,
    NaiveReuse,
    OracleDeviation,
    PICacheError,
    ProphetKV,
    RandomRecompute,
)
from picache.methods.base import Layout, top
from tests.helpers import CONFIGS, assert_close, random_ids
from tests.picache.helpers import LENGTHS, compiled, full_logits, linked, pic_of, prompt_parts

EVERY = (
    A3(0.3),
    CacheBlend(0.3),
    CacheBlend.repo(0.3),
    CacheBlend.lmcache(0.3),
    CacheBlend(0.3, "KV", (1, 2), "single"),
    Combined((LegoLink(2), ProphetKV(0.3)), ratio=0.3),
    FullRecompute(),
    LegoLink(3),
    NaiveReuse(),
    NaiveReuse(force_query=False),
    OracleDeviation(0.3),
    ProphetKV(0.3, value_norm=True),
    RandomRecompute(3),
    RandomRecompute(ratio=0.3),
)


class OneLayer(DynamicLayer):
    """Fresh keys and values at `written[layer]`, linked ones elsewhere; remembers the fresh."""

    def __init__(self, stale, written):
        super().__init__()
        self.stale, self.written, self.is_initialized = stale, written, True

    def update(self, key_states, value_states, *args, **kwargs):
        self.fresh = (key_states.clone(), value_states.clone())
        self.keys, self.values = (held.clone() for held in self.stale)
        self.keys[:, :, self.written] = key_states[:, :, self.written]
        self.values[:, :, self.written] = value_states[:, :, self.written]
        return self.keys, self.values

    def get_seq_length(self):
        return 0

    def get_mask_sizes(self, query_length):
        return query_length, 0


def stale_kv(pic, lengths=LENGTHS, query=9, query_alone=False):
    """Whole-prompt KV as compiled and moved, the query's rows of zeros or as compiled alone."""
    documents, question = prompt_parts(lengths, query)
    if query_alone:
        documents, question = [*documents, question], random_ids(1)
    chunks = compiled(pic, documents)
    layers = pic.link(chunks, question, NaiveReuse())["past_key_values"].layers
    pad = 0 if query_alone else 1
    return [
        tuple(torch.nn.functional.pad(t, (0, 0, 0, pad)) for t in (layer.keys, layer.values))
        for layer in layers
    ]


def dense_with(pic, ids, stale, written):
    """The model's own dense forward with linked KV put in by hand, layer by layer."""
    layers = [OneLayer(kv, rows) for kv, rows in zip(stale, written, strict=True)]
    with torch.no_grad():
        logits = pic.model(ids[None], past_key_values=Cache(layers=layers)).logits[:, -1]
    return logits, layers


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("metric", ["K", "V", "KV"])
@pytest.mark.parametrize("layer1_kv", ["fresh_all", "selected_only"])
def test_single_cacheblend_equals_a_dense_oracle(family, metric, layer1_kv):
    """Choose by hand on layer 1 of a dense forward, then put the rows in by hand."""
    pic = pic_of(family)
    method = CacheBlend(0.2, metric, schedule="single", layer1_kv=layer1_kv)
    prompt, ids = linked(pic, method)
    stale, everything = stale_kv(pic), torch.arange(len(ids))
    context, first, count = sum(LENGTHS), LENGTHS[0], int(0.2 * sum(LENGTHS[1:]))
    _, layers = dense_with(pic, ids, stale, [everything] * 4)
    which = {"K": [0], "V": [1], "KV": [0, 1]}[metric]
    distance = sum((layers[1].fresh[i] - stale[1][i]).square().sum((0, 1, 3)) for i in which)
    chosen = first + distance[first:context].topk(count).indices
    rows = torch.cat([chosen.sort().values, torch.arange(context, len(ids))])
    at_1 = everything if layer1_kv == "fresh_all" else rows
    logits, _ = dense_with(pic, ids, stale, [everything, at_1, rows, rows])
    assert_close("logits", prompt.logits, logits)
    entering = len(ids) - first
    assert prompt.report.tokens_recomputed_per_layer == (entering, entering, len(rows), len(rows))


@pytest.mark.parametrize("family", CONFIGS)
def test_gradual_cacheblend_equals_a_dense_oracle(family):
    """Layer by layer: choose among the rows that are left, by their deviation there."""
    pic = pic_of(family)
    prompt, ids = linked(pic, CacheBlend(0.3))
    stale, context, first = stale_kv(pic), sum(LENGTHS), LENGTHS[0]
    query = torch.arange(context, len(ids))
    rows = torch.arange(first, context)
    written = [torch.arange(first, len(ids))]
    for layer, share in ((1, 1.25), (2, 0.75)):
        full = [*written, *[torch.cat([rows, query])] * (4 - layer)]
        _, layers = dense_with(pic, ids, stale, full)
        written.append(torch.cat([rows, query]))
        fresh, held = layers[layer].fresh[1], stale[layer][1]
        distance = (fresh - held).square().sum((0, 1, 3))[rows]
        count = int(0.3 * share * (context - first) + 1e-9)
        rows = rows[distance.topk(count).indices.sort().values]
    written.append(torch.cat([rows, query]))
    logits, _ = dense_with(pic, ids, stale, written)
    assert_close("logits", prompt.logits, logits)
    assert prompt.report.tokens_recomputed_per_layer == tuple(
        len(one[one >= first]) for one in written
    )


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_cacheblend_as_its_authors_ran_it_leaves_the_query_stale(family):
    """The repo preset: the query compiled alone, only its last token forced."""
    pic = pic_of(family)
    prompt, ids = linked(pic, CacheBlend.repo(0.2))
    stale, everything = stale_kv(pic, query_alone=True), torch.arange(len(ids))
    first, count = LENGTHS[0], int(0.2 * sum(LENGTHS[1:]))
    _, layers = dense_with(pic, ids, stale, [everything] * 4)
    distance = (layers[1].fresh[1] - stale[1][1]).square().sum((0, 1, 3))
    chosen = first + distance[first:-1].topk(count).indices
    rows = torch.cat([chosen.sort().values, everything[-1:]])
    logits, _ = dense_with(pic, ids, stale, [everything, everything, rows, rows])
    assert_close("logits", prompt.logits, logits)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_naive_reuse_of_the_query_computes_one_row(family):
    pic = pic_of(family)
    prompt, ids = linked(pic, NaiveReuse(force_query=False))
    last = torch.tensor([len(ids) - 1])
    logits, _ = dense_with(pic, ids, stale_kv(pic, query_alone=True), [last] * 4)
    assert_close("logits", prompt.logits, logits)
    assert prompt.report.tokens_recomputed == 1


def eager_attention(pic, ids, stale, layer):
    """The model's own attention weights from query rows over stale context, mean of all."""
    model = pic.model
    rows = torch.arange(sum(LENGTHS), len(ids))
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        layers = [OneLayer(kv, rows) for kv in stale]
        with torch.no_grad():
            out = model(ids[None], past_key_values=Cache(layers=layers), output_attentions=True)
    finally:
        model.set_attn_implementation(before)
    values = [torch.stack([one.values]) for one in layers]
    return out.attentions[layer][0, :, rows].mean(dim=(0, 1)), values


@pytest.mark.parametrize("family", CONFIGS)
def test_query_attention_is_the_models_own(family):
    """Against eager attention weights, which HF returns; A3 and ProphetKV follow from them."""
    pic = pic_of(family)
    stale, context, first = stale_kv(pic), sum(LENGTHS), LENGTHS[0]
    _, ids = linked(pic, NaiveReuse())
    expected = torch.stack([eager_attention(pic, ids, stale, layer)[0] for layer in range(4)])

    class Spy(LinkMethod):
        def recompute(self, layout, evidence):
            Spy.first = evidence.query_attention(layers=1)
            Spy.every = evidence.query_attention()
            return torch.empty(0, dtype=torch.int64)

    spied, _ = linked(pic, Spy())
    assert_close("all layers", Spy.every, expected[:, :context], 1e-4)
    assert torch.equal(Spy.first, Spy.every[:1])
    count = int(0.3 * (context - first))

    class Fixed(LinkMethod):
        def __init__(self, positions):
            self.positions = positions

        def recompute(self, layout, evidence):
            return self.positions

    for method, score in ((A3(0.3), expected[0]), (ProphetKV(0.3), expected.mean(0))):
        chosen = first + top(score[first:context], count)
        by_hand, _ = linked(pic, Fixed(chosen))
        assert torch.equal(linked(pic, method)[0].logits, by_hand.logits)
    assert spied.report.flops > linked(pic, NaiveReuse())[0].report.flops


def test_value_norm_weighs_by_the_values():
    pic = pic_of("llama")
    stale = stale_kv(pic)
    _, ids = linked(pic, NaiveReuse())
    model = pic.model
    rows = torch.arange(sum(LENGTHS), len(ids))
    model.set_attn_implementation("eager")
    layers = [OneLayer(kv, rows) for kv in stale]
    with torch.no_grad():
        out = model(ids[None], past_key_values=Cache(layers=layers), output_attentions=True)
    model.set_attn_implementation("sdpa")
    norms = layers[2].values[0].norm(dim=-1).repeat_interleave(2, dim=0)[:, None]
    expected = (out.attentions[2][0, :, rows] * norms).mean(dim=(0, 1))

    class Spy(LinkMethod):
        def recompute(self, layout, evidence):
            Spy.seen = evidence.query_attention(value_norm=True)[2]
            return torch.empty(0, dtype=torch.int64)

    linked(pic, Spy())
    assert_close("mass", Spy.seen, expected[: sum(LENGTHS)], 1e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_true_deviation_and_the_oracle(family):
    """Zero in layer 0 and in the prefix, elsewhere the distance from a full prefill."""
    pic = pic_of(family)
    stale, context, first = stale_kv(pic), sum(LENGTHS), LENGTHS[0]
    _, ids = linked(pic, NaiveReuse())
    cache = DynamicCache()
    with torch.no_grad():
        pic.model(ids[None], past_key_values=cache)
    expected = torch.stack(
        [
            (layer.keys - keys).square().sum((0, 1, 3)) + (layer.values - v).square().sum((0, 1, 3))
            for layer, (keys, v) in zip(cache.layers, stale, strict=True)
        ]
    )[:, :context]

    class Spy(LinkMethod):
        def recompute(self, layout, evidence):
            Spy.seen = evidence.true_deviation("KV")
            return torch.empty(0, dtype=torch.int64)

    linked(pic, Spy())
    assert_close("deviation", Spy.seen, expected, 1e-4)
    scale = expected[1:, first:].mean()
    assert Spy.seen[0].max() < 1e-6 * scale, "layer 0 depends on no context"
    assert Spy.seen[:, :first].max() < 1e-6 * scale, "the first chunk is exact"
    # Deep inside a chunk a sliding window sees nothing but the chunk, and the token is exact too.
    assert (Spy.seen[1:, first:] > 1e-3 * scale).float().mean() > 0.8


@pytest.mark.parametrize("method", EVERY, ids=repr)
def test_a_ragged_batch_equals_its_rows(method):
    pic = pic_of("qwen3")
    rows = [prompt_parts(), prompt_parts((5, 40), 3, 1), prompt_parts((1, 2), 1, 2)]
    chunks = [compiled(pic, documents) for documents, _ in rows]
    batch = pic.link(chunks, [query for _, query in rows], method)
    alone = [pic.link(c, q, method) for c, (_, q) in zip(chunks, rows, strict=True)]
    assert torch.equal(batch.logits, torch.cat([one.logits for one in alone]))
    model = pic.model
    out = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, -6:]
    singles = [model.generate(**one, max_new_tokens=6, do_sample=False)[0, -6:] for one in alone]
    assert out.tolist() == [one.tolist() for one in singles]


@pytest.mark.parametrize("method", EVERY, ids=repr)
def test_one_chunk_and_a_query_is_exact(method):
    """Nothing behind the prefix to reuse; a query compiled alone is the authors' and is not."""
    pic = pic_of("gemma3")
    prompt, ids = linked(pic, method, (23,), 5)
    if method.force_query:
        assert_close("logits", prompt.logits, full_logits(pic.model, ids))
    assert prompt.report.tokens_recomputed_per_layer[-1] == (5 if method.force_query else 1)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=5),
    query=st.integers(1, 8),
    seed=st.integers(0, 3),
    method=st.sampled_from(
        [A3, CacheBlend, CacheBlend.lmcache, OracleDeviation, ProphetKV, CacheBlend.repo]
    ),
    ratio=st.sampled_from([0.0, 0.15, 0.5, 1.0]),
)
def test_ratios_are_kept_and_one_is_exact(lengths, query, seed, method, ratio):
    pic = pic_of("llama")
    chosen = method(ratio)
    prompt, ids = linked(pic, chosen, tuple(lengths), query, seed)
    reusable = sum(lengths[1:])
    last = prompt.report.tokens_recomputed_per_layer[-1]
    forced = query if chosen.force_query else 1
    gradual = isinstance(chosen, CacheBlend) and chosen.schedule == "gradual" and ratio < 1
    share = 0.75 if gradual else 1.0
    expected = int(ratio * share * reusable + 1e-9)
    if ratio == 1:
        assert last == reusable + query
    else:  # where only the last token is forced, it may be among the chosen
        assert last == expected + forced or (not chosen.force_query and last == max(expected, 1))
    if ratio == 1.0 and isinstance(chosen, A3 | OracleDeviation | ProphetKV):
        assert_close("logits", prompt.logits, full_logits(pic.model, ids))
    if ratio == 0.0 and isinstance(chosen, A3 | OracleDeviation | ProphetKV):
        naive, _ = linked(pic, NaiveReuse(), tuple(lengths), query, seed)
        assert torch.equal(prompt.logits, naive.logits)


def test_a_ratio_of_one_is_exact_for_cacheblend():
    pic = pic_of("qwen2")
    for layer1_kv in ("fresh_all", "selected_only"):
        for schedule in ("single", "gradual"):
            method = CacheBlend(1.0, schedule=schedule, layer1_kv=layer1_kv)
            prompt, ids = linked(pic, method)
            assert_close("logits", prompt.logits, full_logits(pic.model, ids))


def test_positions_are_a_tensor_of_whole_numbers():
    class Answers(LinkMethod):
        def __init__(self, answer):
            self.answer = answer

        def recompute(self, layout, evidence):
            return self.answer

    for answer in ([8, 9], None, torch.tensor([8.5]), torch.tensor([[8]])):
        with pytest.raises(PICacheError, match="positions as a 1-D int64 tensor"):
            linked(pic_of("llama"), Answers(answer))


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    query=st.integers(1, 5),
    ratio=st.floats(0, 1),
    seed=st.integers(0, 9),
)
def test_a_random_share_is_exact_seeded_and_behind_the_prefix(lengths, query, ratio, seed):
    layout = Layout(tuple(lengths), query)
    chosen = RandomRecompute(seed=seed, ratio=ratio).recompute(layout, None).tolist()
    assert len(chosen) == len(set(chosen)) == int(ratio * sum(lengths[1:]) + 1e-9)
    assert set(chosen) <= set(range(lengths[0], sum(lengths)))
    assert chosen == RandomRecompute(seed=seed, ratio=ratio).recompute(layout, None).tolist()


def test_a_random_share_is_uniform_over_the_whole_context():
    """Every place is drawn as often as any other, chunk by chunk or not, and the seed decides."""
    layout, counts = Layout((3, 5, 1, 14), 4), torch.zeros(23)
    draws = [RandomRecompute(seed=s, ratio=0.3).recompute(layout, None) for s in range(2000)]
    for drawn in draws:
        counts[drawn] += 1
    assert counts[:3].sum() == 0
    # 6 of 20: 600 each, four standard deviations of a binomial are 82.
    assert (counts[3:] - 600).abs().max() < 82
    assert len({tuple(drawn.tolist()) for drawn in draws}) > 1900


def test_combined_fills_its_budget_in_order():
    layout = Layout((3, 5, 2, 4), 4)
    both = Combined((LegoLink(1), RandomRecompute(5, seed=3)), ratio=0.5)
    chosen = both.recompute(layout, None).tolist()
    assert len(chosen) == len(set(chosen)) == 5 == layout.share(0.5)
    assert chosen[:3] == [3, 8, 10]
    assert set(Combined((LegoLink(9),)).recompute(layout, None).tolist()) == set(range(3, 14))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CacheBlend(1.5), "CacheBlend needs a ratio of tokens between 0 and 1, got 1.5"),
        (lambda: CacheBlend(metric="Q"), "metric must be one of K, V, KV, got 'Q'"),
        (lambda: CacheBlend(schedule="slow"), "single, gradual, got 'slow'"),
        (lambda: CacheBlend(check_layers=(0,)), "in layer 0 no token deviates"),
        (lambda: CacheBlend(check_layers=(2, 1)), "must ascend"),
        (lambda: CacheBlend(check_layers=()), "check_layers must be a tuple of layer indices"),
        (
            lambda: CacheBlend(check_layers=1),
            "tuple of layer indices, got 1",
        ),
        (lambda: CacheBlend(force_query="no"), "force_query is a bool, got 'no'"),
        (lambda: OracleDeviation(metric="Q"), "metric must be K, V or KV, got 'Q'"),
        (lambda: A3("x"), "A3 needs a ratio of tokens between 0 and 1, got 'x'"),
        (lambda: ProphetKV(-0.1), "got -0.1"),
        (lambda: OracleDeviation(True), "got True"),
        (lambda: RandomRecompute(), "one budget, got k=None and ratio=None"),
        (lambda: RandomRecompute(4, ratio=0.1), "one budget, got k=4 and ratio=0.1"),
        (lambda: RandomRecompute(ratio=1.1), "RandomRecompute needs a ratio .* got 1.1"),
        (lambda: Combined(()), "needs a tuple of link methods"),
        (lambda: Combined((CacheBlend(),)), "more than one set of tokens for all layers"),
        (lambda: Combined((LegoLink,)), "takes link methods"),
    ],
)
def test_bad_arguments_name_the_value(make, message):
    with pytest.raises(PICacheError, match=message):
        make()


def test_a_check_layer_the_model_does_not_have_is_refused():
    with pytest.raises(
        PICacheError, match="check layer 7 leaves nothing to save in a model of 4 layers"
    ):
        linked(pic_of("llama"), CacheBlend(0.2, check_layers=(7,)))


def test_equal_scores_take_the_earlier_token():
    assert top(torch.tensor([1.0, 3.0, 3.0, 2.0]), 2).tolist() == [1, 2]
