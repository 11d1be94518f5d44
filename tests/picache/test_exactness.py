"""Linking against full prefill: where it must be equal it is, on every supported family."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from picache import PIC, FullRecompute, LegoLink, LinkMethod, NaiveReuse, RandomRecompute
from picache.methods.base import Layout
from tests.helpers import CONFIGS, assert_close, random_ids, tiny_model
from tests.picache.helpers import LENGTHS, compiled, pic_of, prefill, prompt_parts


@pytest.mark.parametrize("family", CONFIGS)
def test_recompute_all_is_a_full_prefill(family):
    pic = pic_of(family)
    model = pic.model
    documents, query = prompt_parts()
    ids = torch.cat([*documents, query])
    chunks = compiled(pic, documents)
    prompt = pic.link(chunks, query, FullRecompute())
    logits, _ = prefill(model, ids)
    assert_close("logits", prompt.logits, logits)
    oracle = pic.hf.prefill(ids[None])
    for layer, (keys, values) in zip(prompt["past_key_values"].layers, oracle, strict=True):
        assert_close("keys", layer.keys, keys[:, :, :-1])
        assert_close("values", layer.values, values[:, :, :-1])
    linked = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    dense = model.generate(ids[None], max_new_tokens=16, do_sample=False)
    assert linked.tolist() == dense.tolist()


@pytest.mark.parametrize("family", CONFIGS)
def test_one_chunk_and_a_query_is_a_full_prefill(family):
    pic = pic_of(family)
    model = pic.model
    (document,), query = prompt_parts((23,), query=5)
    ids = torch.cat([document, query])
    prompt = pic.link([pic.compile(document)], query, NaiveReuse())
    assert_close("logits", prompt.logits, prefill(model, ids)[0])
    linked = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    dense = model.generate(ids[None], max_new_tokens=16, do_sample=False)
    assert linked.tolist() == dense.tolist()
    assert prompt.report.tokens_recomputed == 5


@pytest.mark.parametrize("family", CONFIGS)
def test_a_k_as_long_as_the_longest_chunk_is_a_full_prefill(family):
    pic = pic_of(family)
    documents, query = prompt_parts()
    chunks = compiled(pic, documents)
    prompt = pic.link(chunks, query, LegoLink(max(LENGTHS)))
    logits, _ = prefill(pic.model, torch.cat([*documents, query]))
    assert_close("logits", prompt.logits, logits)


@pytest.mark.parametrize("family", CONFIGS)
def test_k_zero_is_naive_and_naive_is_not_full(family):
    pic = pic_of(family)
    documents, query = prompt_parts()
    chunks = compiled(pic, documents)
    zero = pic.link(chunks, query, LegoLink(0))
    naive = pic.link(chunks, query, NaiveReuse())
    assert torch.equal(zero.logits, naive.logits)
    logits, _ = prefill(pic.model, torch.cat([*documents, query]))
    assert (naive.logits - logits).norm() > 0.01 * logits.norm(), "the test would see no error"


class Overridden(DynamicLayer):
    """Every query is computed; keys and values come from the linked cache but at some rows."""

    def __init__(self, keys, values, rows):
        super().__init__()
        self.given = (keys, values)
        self.rows = rows

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys, self.values = (given.clone() for given in self.given)
        self.keys[:, :, self.rows] = key_states[:, :, self.rows]
        self.values[:, :, self.rows] = value_states[:, :, self.rows]
        self.is_initialized = True
        return self.keys, self.values

    def get_seq_length(self):
        return 0

    def get_mask_sizes(self, query_length):
        return query_length, 0


@pytest.mark.parametrize("family", CONFIGS)
def test_scattered_rows_equal_an_independent_oracle(family):
    """A dense forward over the whole prompt with stale keys and values put in by hand."""
    pic = pic_of(family)
    model = pic.model
    documents, query = prompt_parts()
    ids = torch.cat([*documents, query])
    rows = torch.tensor([7, 8, 9, 30, 41, 59, 60, 61, *range(len(ids) - len(query), len(ids))])

    class Chosen(LinkMethod):
        def recompute(self, layout, evidence):
            return rows[:8]

    chunks = compiled(pic, documents)
    stale = pic.link(chunks, query, NaiveReuse())["past_key_values"].layers
    pad = torch.zeros_like(stale[0].keys[:, :, :1])  # the last row is fresh in any case
    layers = [
        Overridden(torch.cat([s.keys, pad], 2), torch.cat([s.values, pad], 2), rows) for s in stale
    ]
    with torch.no_grad():
        expected = model(ids[None], past_key_values=Cache(layers=layers)).logits[:, -1]
    prompt = pic.link(chunks, query, Chosen())
    assert_close("logits", prompt.logits, expected)
    for mine, theirs in zip(prompt["past_key_values"].layers, layers, strict=True):
        assert_close("keys", mine.keys, theirs.keys[:, :, :-1])
        assert_close("values", mine.values, theirs.values[:, :, :-1])


@pytest.mark.parametrize("family", CONFIGS)
def test_a_ragged_batch_equals_its_rows(family):
    pic = pic_of(family)
    model = pic.model
    rows = [prompt_parts(), prompt_parts((5, 40), query=3, seed=1), prompt_parts((1,), 1, seed=2)]
    chunks = [compiled(pic, documents) for documents, _ in rows]
    queries = [query for _, query in rows]
    batch = pic.link(chunks, queries, LegoLink(3))
    out = model.generate(**batch, max_new_tokens=12, do_sample=False)[:, -12:]
    for index, (row, query) in enumerate(zip(chunks, queries, strict=True)):
        alone = pic.link(row, query, LegoLink(3))
        assert torch.equal(batch.logits[index], alone.logits[0])
        tokens = model.generate(**alone, max_new_tokens=12, do_sample=False)[0, -12:]
        assert out[index].tolist() == tokens.tolist()
    assert batch.report.tokens_total == sum(r.tokens_total for r in batch.reports)


@pytest.mark.parametrize("family", CONFIGS)
def test_beams_and_samples_start_from_one_linked_prompt(family):
    pic = pic_of(family)
    model = pic.model
    documents, query = prompt_parts()
    ids = torch.cat([*documents, query])[None]
    prompt = pic.link(compiled(pic, documents), query, FullRecompute())
    beams = dict(max_new_tokens=10, num_beams=3, num_return_sequences=2, do_sample=False)
    assert model.generate(**prompt, **beams).tolist() == model.generate(ids, **beams).tolist()
    sampled = dict(max_new_tokens=10, num_return_sequences=3, do_sample=True)
    torch.manual_seed(5)
    linked = model.generate(**prompt, **sampled)
    torch.manual_seed(5)
    assert linked.tolist() == model.generate(ids, **sampled).tolist()


def test_generate_equals_a_manual_decode_on_the_linked_cache():
    pic = pic_of("llama")
    model = pic.model
    documents, query = prompt_parts()
    prompt = pic.link(compiled(pic, documents), query, LegoLink(2))
    out = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, -8:].tolist()
    cache, tokens, ids = prompt["past_key_values"], [], prompt["input_ids"][:, -1:]
    for _ in range(8):
        with torch.no_grad():
            logits = model(ids, past_key_values=cache).logits[:, -1]
        ids = logits.argmax(-1, keepdim=True)
        tokens.append(ids.item())
    assert out == tokens
    assert tokens[0] == prompt.logits.argmax().item()


def test_the_first_chunk_is_a_prefix_cache_hit_to_the_bit():
    pic = pic_of("qwen3")
    documents, query = prompt_parts()
    chunks = compiled(pic, documents)
    prompt = pic.link(chunks, query, LegoLink(4))
    for layer, (keys, values) in zip(
        prompt["past_key_values"].layers, pic.store.get(chunks[0].key), strict=True
    ):
        assert torch.equal(layer.keys[:, :, : LENGTHS[0]], keys)
        assert torch.equal(layer.values[:, :, : LENGTHS[0]], values)


def test_chat_goes_on_after_a_link():
    pic = pic_of("llama")
    model = pic.model
    documents, query = prompt_parts()
    ids = torch.cat([*documents, query])[None]
    prompt = pic.link(compiled(pic, documents), query, FullRecompute())
    cache = prompt["past_key_values"]
    first = model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
    turn = torch.cat([first, random_ids(6, 1, seed=77)], dim=1)
    second = model.generate(turn, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert second.tolist() == model.generate(turn, max_new_tokens=5, do_sample=False).tolist()


def test_a_prompt_can_be_used_again():
    pic = pic_of("llama")
    documents, query = prompt_parts()
    prompt = pic.link(compiled(pic, documents), query)
    runs = [pic.model.generate(**prompt, max_new_tokens=6, do_sample=False) for _ in range(2)]
    assert torch.equal(*runs)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=5),
    query=st.integers(1, 8),
    k=st.integers(0, 26),
    seed=st.integers(0, 3),
    data=st.data(),
)
def test_any_layout_links(lengths, query, k, seed, data):
    """Counts add up, k at least the longest chunk is exact, and order is honoured."""
    pic = pic_of("llama")
    documents, question = prompt_parts(tuple(lengths), query, seed)
    order = data.draw(st.permutations(range(len(documents))))
    documents = [documents[i] for i in order]
    chunks = compiled(pic, documents)
    prompt = pic.link(chunks, question, LegoLink(k))
    ids = torch.cat([*documents, question])
    assert prompt["input_ids"][0].tolist() == ids.tolist()
    recomputed = sum(min(k, len(d)) for d in documents[1:]) + query
    assert prompt.report.tokens_recomputed == recomputed
    assert prompt.report.tokens_reused == len(ids) - recomputed
    if k >= max((len(d) for d in documents[1:]), default=0):
        assert_close("logits", prompt.logits, prefill(pic.model, ids)[0])


@pytest.mark.parametrize("family", CONFIGS)
def test_only_the_chosen_rows_go_through_the_layers(family):
    """Truly sparse: every linear layer sees the recomputed rows and nothing else."""
    pic = PIC(tiny_model(family), flops_per_byte=None)
    documents, query = prompt_parts()
    chunks = compiled(pic, documents)
    rows: set[int] = set()
    hooks = [
        module.register_forward_pre_hook(lambda m, inputs: rows.add(inputs[0].shape[1]))
        for layer in pic.hf.decoder.layers
        for module in layer.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    prompt = pic.link(chunks, query, LegoLink(3))
    for hook in hooks:
        hook.remove()
    assert rows == {prompt.report.tokens_recomputed} == {3 + 3 + 1 + 3 + 9}


def test_a_chunk_may_stand_in_two_places():
    pic = pic_of("llama")
    (document,), query = prompt_parts((13,))
    chunk = pic.compile(document)
    prompt = pic.link([chunk, chunk, chunk], query, LegoLink(13))
    expected, _ = prefill(pic.model, torch.cat([document] * 3 + [query]))
    assert_close("logits", prompt.logits, expected)


def test_linking_leaves_the_model_as_it_was():
    model = tiny_model("gemma3")
    before = {n: p.clone() for n, p in model.state_dict().items()}
    config, hooks = model.config.to_dict(), [len(m._forward_pre_hooks) for m in model.modules()]
    implementation = model.config._attn_implementation
    pic = PIC(model, flops_per_byte=None)
    documents, query = prompt_parts()
    pic.link(compiled(pic, documents), query)
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == implementation
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


def test_what_the_methods_choose_by_hand():
    layout = Layout((3, 5, 2), 4)
    assert layout.starts == (0, 3, 8)
    assert LegoLink(2).recompute(layout, None).tolist() == [3, 8, 4, 9]
    assert LegoLink(4).recompute(layout, None).tolist() == [3, 8, 4, 9, 5, 6]
    assert FullRecompute().recompute(layout, None).tolist() == [3, 4, 5, 6, 7, 8, 9]
    assert NaiveReuse().recompute(layout, None).tolist() == []
    drawn = RandomRecompute(3, seed=1).recompute(layout, None).tolist()
    assert len(set(drawn)) == 5
    assert sum(3 <= d < 8 for d in drawn) == 3
    assert drawn == RandomRecompute(3, seed=1).recompute(layout, None).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_links_close_to_its_own_prefill(dtype):
    model = tiny_model("llama", dtype=dtype)
    pic = PIC(model, flops_per_byte=None)
    documents, query = prompt_parts()
    prompt = pic.link(compiled(pic, documents), query, FullRecompute())
    logits, _ = prefill(model, torch.cat([*documents, query]))
    assert_close("logits", prompt.logits, logits, 3e-2 if dtype == torch.bfloat16 else 5e-3)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(1, 6)),
        min_size=1,
        max_size=4,
    ),
    k=st.integers(0, 22),
    family=st.sampled_from(["llama", "gemma3"]),
)
def test_any_batch_equals_its_rows(rows, k, family):
    """Logits and the whole cache, left-padded, of every row."""
    pic = pic_of(family)
    parts = [prompt_parts(tuple(lengths), query, seed=i) for i, (lengths, query) in enumerate(rows)]
    chunks = [compiled(pic, documents) for documents, _ in parts]
    batch = pic.link(chunks, [query for _, query in parts], LegoLink(k))
    mask, layers = batch["attention_mask"], batch["past_key_values"].layers
    for index, (row, (_, query)) in enumerate(zip(chunks, parts, strict=True)):
        alone = pic.link(row, query, LegoLink(k))
        length = int(mask[index].sum())
        assert batch["input_ids"][index, -length:].tolist() == alone["input_ids"][0].tolist()
        assert torch.equal(batch.logits[index], alone.logits[0])
        for mine, theirs in zip(layers, alone["past_key_values"].layers, strict=True):
            held = mine.keys.shape[2] - (length - 1)
            assert torch.equal(mine.keys[index, :, held:], theirs.keys[0])
            assert torch.equal(mine.values[index, :, held:], theirs.values[0])
