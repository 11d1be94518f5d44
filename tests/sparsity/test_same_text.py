"""A cache goes on with the text it holds; another text, or the same once more, is refused."""

import copy
import gc
import pickle
import weakref
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import sparsity
from sparsity import H2O, Full, RaaS, SparseCache, SparsityError, StreamingLLM
from sparsity.retention.seen_tokens import SeenTokens
from tests.helpers import random_ids
from tests.sparsity.zoo import shallow_model

PROMPT = random_ids(12, 1)
OTHER = random_ids(30, 1, seed=9)


def generate(model, ids, cache, **mode):
    given = {"max_new_tokens": 4, "do_sample": False} | mode
    return model.generate(ids, past_key_values=cache, **given)


def state(cache):
    """Everything that a forward would change."""
    tensors = [
        held
        for retention in cache.retentions.values()
        for held in ([] if retention.pool is None else retention.pool.tensors().values())
    ]
    stock = [(layer.keys, layer.get_seq_length()) for layer in cache.layers]
    return [t.clone() for t in tensors], stock, cache.get_seq_length(), cache.report()


def assert_unchanged(cache, before):
    now = state(cache)
    assert all(torch.equal(a, b) for a, b in zip(now[0], before[0], strict=True))
    for (keys, seen), (had, saw) in zip(now[1], before[1], strict=True):
        assert keys is had
        assert seen == saw
    assert now[2:] == before[2:]


@pytest.mark.parametrize("policy", [RaaS(64), StreamingLLM(8), Full()], ids=str)
def test_a_prompt_fed_again_is_refused(policy, shallow):
    """Without a mask nothing but the ids says that these are not new tokens."""
    cache = SparseCache(shallow, policy)
    with torch.no_grad():
        shallow(input_ids=PROMPT, past_key_values=cache)
        before = state(cache)
        longer = torch.cat([PROMPT, OTHER], 1)
        for ids in (PROMPT, longer):
            with pytest.raises(SparsityError, match="12 tokens that the cache has seen are fed ag"):
                shallow(input_ids=ids, past_key_values=cache)
            assert_unchanged(cache, before)
        got = shallow(input_ids=longer[:, 12:], past_key_values=cache).logits
        fresh = SparseCache(shallow, policy)
        shallow(input_ids=PROMPT, past_key_values=fresh)
        expected = shallow(input_ids=OTHER, past_key_values=fresh).logits
    assert torch.equal(got, expected)


def test_a_text_that_does_repeat_itself_is_taken_when_it_is_said(shallow):
    cache, twice = SparseCache(shallow, Full()), torch.cat([PROMPT, PROMPT], 1)
    with torch.no_grad():
        expected = shallow(input_ids=twice).logits[:, 12:]
        for said in (
            {"attention_mask": torch.ones_like(twice)},
            {"position_ids": torch.arange(12, 24)[None]},
        ):
            cache.reset()
            shallow(input_ids=PROMPT, past_key_values=cache)
            got = shallow(input_ids=PROMPT, past_key_values=cache, **said).logits
            torch.testing.assert_close(got, expected)
        cache.reset()
        for token in (PROMPT[:, :1], PROMPT[:, :1]):  # a token may follow itself
            shallow(input_ids=token, past_key_values=cache)
    assert cache.get_seq_length() == 2


@pytest.mark.parametrize("policy", [RaaS(64), H2O(8), StreamingLLM(8)], ids=str)
@pytest.mark.parametrize("kept", [0, 5, 13])
def test_another_text_handed_to_generate_is_refused(policy, kept, shallow):
    """An unrelated prompt, one that begins alike, and an answer that was edited."""
    cache = SparseCache(shallow, policy)
    first = generate(shallow, PROMPT, cache)
    before = state(cache)
    for length in (15, 16, 30):  # as many tokens as were seen, one more, many more
        other = torch.cat([first[:, :kept], OTHER[:, kept:length]], 1)
        with pytest.raises(SparsityError, match=rf"at token {kept} of row 0 it has seen"):
            generate(shallow, other, cache)
        assert_unchanged(cache, before)
    whole = torch.cat([first, random_ids(3, 1, seed=4)], 1)
    got = generate(shallow, whole, cache)  # nothing was lost
    expected = generate(shallow, PROMPT, again := SparseCache(shallow, policy))
    assert torch.equal(expected, first)
    assert torch.equal(got, generate(shallow, whole, again))
    cache.reset()
    other = generate(shallow, OTHER, cache)
    assert torch.equal(other, generate(shallow, OTHER, SparseCache(shallow, policy)))


def test_the_tokens_of_a_direct_loop_are_known_as_far_as_the_prompt(shallow):
    cache = SparseCache(shallow, RaaS(64))
    with torch.no_grad():
        shallow(input_ids=PROMPT, past_key_values=cache)
        for token in (7, 8, 9):
            shallow(input_ids=torch.tensor([[token]]), past_key_values=cache)
    for asks in (lambda: generate(shallow, OTHER, cache), lambda: shallow(
        input_ids=torch.cat([PROMPT, OTHER], 1), past_key_values=cache
    )):  # fmt: skip
        with pytest.raises(SparsityError, match=r"another text|fed again"):
            asks()
    history = torch.cat([PROMPT, torch.tensor([[7, 8, 9]]), OTHER[:, :2]], 1)
    assert generate(shallow, history, cache).shape == (1, 21)


@pytest.mark.parametrize("way", ["loop", "generate", "two turns"])
def test_a_prompt_fed_again_after_decoding_is_refused(way, shallow):
    """All of it, or the prompt alone, which is shorter than what was seen."""
    cache = SparseCache(shallow, RaaS(64))
    with torch.no_grad():
        if way == "loop":
            shallow(input_ids=PROMPT, past_key_values=cache)
            for token in (7, 8, 9):
                shallow(input_ids=torch.tensor([[token]]), past_key_values=cache)
        else:
            out = generate(shallow, PROMPT, cache)
            if way == "two turns":
                generate(shallow, torch.cat([out, OTHER[:, :5]], 1), cache)
        before, seen = state(cache), cache.get_seq_length()
        for ids in (PROMPT, torch.cat([PROMPT, OTHER], 1)):
            with pytest.raises(SparsityError, match=f"first 12 of the {seen} tokens .* fed again"):
                shallow(input_ids=ids, past_key_values=cache)
            assert_unchanged(cache, before)
        for turn in (PROMPT[:, :11], PROMPT[:, 1:]):  # begins alike, or ends alike
            shallow(input_ids=turn, past_key_values=cache)


def chunks_go_on(model):
    """Whether this transformers cuts out the chunks of what a cache of its own does not hold yet.

    In 5.4 and 5.17 they begin at the prompt's first token, whatever the cache holds.
    """
    cache = DynamicCache()
    turn = torch.cat([generate(model, PROMPT, cache), OTHER[:, :9]], 1)
    try:
        got = generate(model, turn, cache, prefill_chunk_size=4)
    except (RuntimeError, ValueError, IndexError):
        return False
    return torch.equal(got, generate(model, turn, None))


def test_chunks_of_another_text_are_refused(shallow):
    """In `generate` they are cut out by their length, before anything shows the whole text."""
    cache = SparseCache(shallow, Full())
    out = generate(shallow, PROMPT, cache, prefill_chunk_size=5)
    assert torch.equal(out, generate(shallow, PROMPT, None))
    turn = torch.cat([out, OTHER[:, :9]], 1)
    fork = copy.deepcopy(cache)
    if not chunks_go_on(shallow):
        with pytest.raises(SparsityError, match="Hand generate the full"):
            generate(shallow, turn, cache, prefill_chunk_size=4)
        return
    got = generate(shallow, turn, cache, prefill_chunk_size=4)
    assert torch.equal(got, generate(shallow, turn, None))
    for length, said in (
        (30, r"prefill_chunk_size.*call cache\.reset"),
        (9, "Hand generate the full"),
    ):
        with pytest.raises(SparsityError, match=said):
            generate(shallow, OTHER[:, :length], fork, prefill_chunk_size=4)
    fork.reset()
    generate(shallow, OTHER, fork, prefill_chunk_size=4)


def test_padding_is_not_compared(shallow):
    """What stands under the padding is nobody's text; a real token there is."""
    ids, mask = random_ids(9, 2), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    cache = SparseCache(shallow, RaaS(64))
    out = generate(shallow, ids, cache, attention_mask=mask)
    turn = torch.cat([out, random_ids(3, 2, seed=4)], 1)
    turn[0, :3] = 77
    longer = torch.cat([mask, torch.ones(2, 7, dtype=torch.int64)], 1)
    fork = copy.deepcopy(cache)
    got = generate(shallow, turn, cache, attention_mask=longer)
    assert torch.equal(got[:, 16:], generate(shallow, turn, None, attention_mask=longer)[:, 16:])
    turn[1, 2] += 1
    with pytest.raises(SparsityError, match="at token 2 of row 1"):
        generate(shallow, turn, fork, attention_mask=longer)


@pytest.mark.parametrize("way", ["fork", "pickle", "rows", "repeat"])
def test_what_was_seen_goes_with_a_cache_and_its_rows(way, shallow):
    ids = random_ids(9, 3)
    cache = SparseCache(shallow, RaaS(64))
    out = generate(shallow, ids, cache)
    turn = torch.cat([out, random_ids(3, 3, seed=4)], 1)
    if way == "fork":
        cache = copy.deepcopy(cache)
    elif way == "pickle":
        cache = pickle.loads(pickle.dumps(cache))
    elif way == "rows":
        cache.batch_select_indices(torch.tensor([True, False, True]))
        cache.reorder_cache(torch.tensor([1, 0]))
        turn = turn[[2, 0]]
    else:
        cache.batch_repeat_interleave(2)
        turn = turn.repeat_interleave(2, dim=0)
    with pytest.raises(SparsityError, match="of row 0 it has seen"):
        generate(shallow, turn.flip(0), copy.deepcopy(cache))
    got = generate(shallow, turn, cache)
    assert torch.equal(got, generate(shallow, turn, None))


def test_beams_hold_texts_of_their_own(shallow):
    """After a beam search each row holds another text: going on with the best one is refused."""
    cache = SparseCache(shallow, RaaS(64))
    best = generate(shallow, PROMPT, cache, num_beams=3, max_new_tokens=8)
    turn = torch.cat([best, random_ids(3, 1, seed=4)], 1)
    with pytest.raises(SparsityError, match="the cache holds another text"):
        generate(shallow, turn, cache, num_beams=3)
    ids = cache._state.tokens._known(torch.zeros(3, 1), 19)
    alone = [SparseCache(shallow, RaaS(64)) for _ in ids]
    for row, one in zip(ids, alone, strict=True):  # the rows hold what is said of them
        with torch.no_grad():
            shallow(input_ids=row[None], past_key_values=one)
    for layer in range(2):
        keys = torch.cat([one.layers[layer].keys[:, :, :19] for one in alone])
        torch.testing.assert_close(cache.layers[layer].keys[:, :, :19], keys)


def test_new_tokens_alone_with_a_mask_for_all_go_on(shallow):
    """The other way of transformers; and what they are is known in the turn after that."""
    cache = SparseCache(shallow, RaaS(64))
    first = generate(shallow, PROMPT, cache)
    new = torch.cat([first[:, 15:], random_ids(3, 1, seed=4)], 1)
    whole = torch.cat([first[:, :15], new], 1)
    expected = generate(shallow, whole, None)
    got = generate(shallow, new, cache, attention_mask=torch.ones_like(whole))
    assert torch.equal(got[:, 4:], expected[:, 19:])
    wrong = torch.cat([expected, OTHER], 1)
    wrong[0, 17] += 1
    with pytest.raises(SparsityError, match="at token 17 of row 0"):
        generate(shallow, wrong, cache)


def test_only_the_new_turn_is_refused(shallow):
    cache = SparseCache(shallow, RaaS(64))
    generate(shallow, PROMPT, cache)
    new = random_ids(3, 1, seed=4)
    before = state(cache)
    for mask in (None, torch.ones_like(new)):
        for more in ({}, {"prefill_chunk_size": 2}):
            with pytest.raises(SparsityError, match=r"seen 15.*Hand generate the full input_ids"):
                generate(shallow, new, cache, attention_mask=mask, **more)
    with pytest.raises(SparsityError, match="called with none that is new"):
        shallow(input_ids=new[:, :0], past_key_values=cache)
    assert_unchanged(cache, before)


@pytest.mark.parametrize("used", [False, True])
def test_without_the_use_of_a_cache(used, shallow):
    cache = SparseCache(shallow, RaaS(64))
    ids = torch.cat([generate(shallow, PROMPT, cache), OTHER], 1) if used else PROMPT
    for call in (
        lambda: generate(shallow, ids, cache, use_cache=False),
        lambda: generate(shallow, ids[:, -3:], cache, use_cache=False),
        lambda: shallow(input_ids=ids[:, -3:], past_key_values=cache, use_cache=False),
    ):
        with pytest.raises(SparsityError, match=r"use_cache=False.*Leave out"):
            call()
        assert cache.get_seq_length() == (15 if used else 0)
    assert generate(shallow, ids, cache).shape == (1, ids.shape[1] + 4)


def test_embeddings_are_not_compared(shallow):
    embeddings = shallow.get_input_embeddings()
    cache = SparseCache(shallow, RaaS(64))
    with torch.no_grad():
        expected = shallow(input_ids=PROMPT).logits[:, 6:]
        shallow(inputs_embeds=embeddings(PROMPT[:, :6]), past_key_values=cache)
        got = shallow(inputs_embeds=embeddings(PROMPT[:, 6:]), past_key_values=cache).logits
        torch.testing.assert_close(got, expected)
        embeds = embeddings(PROMPT)
    out = shallow.generate(
        inputs_embeds=embeds,
        past_key_values=SparseCache(shallow, RaaS(64)),
        max_new_tokens=4,
        do_sample=False,
    )
    assert torch.equal(out, generate(shallow, PROMPT, None)[:, 12:])


def test_a_past_is_not_known_and_what_comes_after_is(shallow):
    past = DynamicCache()
    with torch.no_grad():
        shallow(input_ids=PROMPT[:, :11], past_key_values=past)
    cache = SparseCache(shallow, RaaS(64), past=past)
    out = generate(shallow, PROMPT, cache)
    assert torch.equal(out, generate(shallow, PROMPT, None))
    with pytest.raises(SparsityError, match="at token 0 of row 0"):
        generate(shallow, OTHER, cache)
    turn = torch.cat([out, OTHER], 1)
    assert torch.equal(generate(shallow, turn, cache), generate(shallow, turn, None))


def test_a_decoded_token_costs_no_tensor_work():
    """What is known of a text follows `generate` by reference: no kernel, nothing waited for."""

    class Operations(TorchDispatchMode):
        seen: ClassVar[list] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(func)
            return func(*args, **(kwargs or {}))

    tokens = SeenTokens()
    tokens.hand(PROMPT, {"is_first_iteration": True}, seen=0)
    tokens.feed(PROMPT, seen=0, stop=12)
    longer = [OTHER[:, :stop].clone() for stop in range(13, 30)]
    new = PROMPT[:, :1]
    with Operations():
        for ids in longer:
            stop = ids.shape[1]
            tokens.hand(ids, {"next_sequence_length": 1}, seen=stop - 1)
            tokens.feed(new, seen=stop - 1, stop=stop)
    assert tokens.ids is longer[-1]
    assert Operations.seen == []


def test_detaching_leaves_the_model_as_it_was(shallow):
    before = dict(vars(shallow))
    SparseCache(shallow, RaaS(64))
    assert "prepare_inputs_for_generation" in vars(shallow)
    sparsity.detach(shallow)
    assert vars(shallow) == before
    own = shallow.prepare_inputs_for_generation
    shallow.prepare_inputs_for_generation = own  # such as an adapter's
    SparseCache(shallow, RaaS(64))
    assert vars(shallow)["prepare_inputs_for_generation"] is not own
    sparsity.detach(shallow)
    assert vars(shallow)["prepare_inputs_for_generation"] is own


def test_an_attached_model_is_freed():
    model = shallow_model("llama")
    SparseCache(model, RaaS(64))
    weak = weakref.ref(model)
    del model
    gc.collect()
    assert weak() is None


@pytest.mark.parametrize("way", ["copied", "pickled"])
def test_a_copy_of_an_attached_model_is_on_its_own(way, shallow):
    sparsity.attach(shallow)
    copied = way == "copied"
    other = copy.deepcopy(shallow) if copied else pickle.loads(pickle.dumps(shallow))
    expected = generate(shallow, PROMPT, None)
    sparsity.detach(shallow)
    assert other.prepare_inputs_for_generation.__wrapped__.__self__ is other
    assert torch.equal(generate(other, PROMPT, None), expected)
