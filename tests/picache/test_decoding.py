"""Several prompts decoded and forced in one batch, against one at a time by transformers."""

import pytest
import torch

from picache import APE, PIC, LegoLink, NaiveReuse
from picache.hf import decoding
from picache.hf.decoding import Prefilled, answers
from tests.helpers import random_ids, tiny_model
from tests.picache.helpers import compiled

NEW = 6


@pytest.fixture(scope="module", params=["llama", "gemma3", "mistral_sliding"])
def model(request):
    """The last two have windows of 16 tokens, shorter than the prompts."""
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def linked(model):
    """Full prefill, two ordinary links and one that must be attached, of the same ids."""
    pic = PIC(model, flops_per_byte=None)
    documents = [random_ids(n, seed=n) for n in (5, 17, 11)]
    chunks, query = compiled(pic, documents), random_ids(4, seed=4)
    parallel = NaiveReuse() if pic.hf.window else APE()
    methods = (NaiveReuse(), parallel, LegoLink(3), LegoLink(5))
    return pic, [pic.link(chunks, query, method) for method in methods]


def prefilled(pic, prompts):
    ids = prompts[0].input_ids
    logits, kv = pic.hf.full_prefill(ids[0])
    held = [(keys[:, :, :-1], values[:, :, :-1]) for keys, values in kv]
    last = (ids.shape[1] - 1,)
    yield Prefilled(ids[:, -1:], logits, held, last, (0,), (1.0,), (1.0,), 0.5)
    for prompt in prompts:
        place, attached = last, None
        if "position_ids" in prompt:
            place, attached = (int(prompt["position_ids"][0, -1]),), prompt.attached
        kv = prompt.past_key_values.kv
        yield Prefilled(ids[:, -1:], prompt.logits, kv, place, (0,), (0.25,), (0.3,), 0.1, attached)


def alone(model, prompts, new_tokens, stop, target=None):
    """What stands behind a single prompt of every arm."""
    targets = None if target is None else [target]
    return [one for (one,) in answers(model, prompts, new_tokens, stop, targets)]


def one_by_one(model, prompts, target):
    """The slow, obvious twin: `generate` and a forward of its own for every arm."""
    ids = prompts[0].input_ids
    greedy = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        new = model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)[0, ids.shape[1] :]
        target = new if target is None else target
        whole = torch.cat([ids, target[None, :-1]], dim=1)
        found = [(new, model(whole).logits[0, -len(target) :])]
        for prompt in prompts:
            with prompt.attached():
                new = model.generate(**prompt, **greedy)[0, ids.shape[1] :]
                fed = torch.cat([ids[:, -1:], target[None, :-1]], dim=1)
                places = {}
                if "position_ids" in prompt:
                    steps = torch.arange(fed.shape[1])
                    places = {"position_ids": prompt["position_ids"][:, -1:] + steps}
                out = model(fed, past_key_values=prompt.past_key_values, **places)
            found.append((new, out.logits[0]))
    return found


@pytest.mark.parametrize("length", [None, 1, 4])
def test_a_batch_answers_as_each_prompt_does_alone(model, linked, monkeypatch, length):
    pic, prompts = linked
    target = None if length is None else random_ids(length, seed=9)
    expected = one_by_one(model, prompts, target)
    for room in (2**30, 40_000, 0):  # for all in a batch, for some, and for each alone
        monkeypatch.setattr(decoding, "TOGETHER", room)
        found = alone(model, prefilled(pic, prompts), NEW, frozenset(), target)
        assert len(found) == len(expected) == 5
        for answered, (tokens, logits) in zip(found, expected, strict=True):
            assert torch.equal(answered.tokens, tokens)
            torch.testing.assert_close(
                answered.log_probabilities, logits.double().log_softmax(-1), atol=1e-4, rtol=0
            )
        assert [one.recomputed for one in found] == [1.0, 0.25, 0.25, 0.25, 0.25]
        assert [one.operations for one in found] == [1.0, 0.3, 0.3, 0.3, 0.3]
    assert len({tuple(one.tokens.tolist()) for one in found}) > 1, "the arms answer differently"


def test_no_more_is_held_than_goes_into_a_batch(model, linked, monkeypatch):
    pic, prompts = linked
    made = []

    def watched():
        for prompt in prefilled(pic, prompts[:1] * 4):
            made.append(prompt)
            yield prompt

    nbytes = sum(t.nbytes for layer in prompts[0].past_key_values.kv for t in layer)
    monkeypatch.setattr(decoding, "TOGETHER", 2 * nbytes)
    running = answers(model, watched(), 1, frozenset(), [random_ids(1, seed=1)])
    next(running)
    assert len(made) == 3, "two in the batch, and the one that no longer fits"


def test_an_answer_is_over_at_a_token_that_ends_it(model, linked):
    pic, prompts = linked
    whole = [one.tokens.tolist() for one in alone(model, prefilled(pic, prompts), NEW, frozenset())]
    end = whole[0][2]
    ended = alone(model, prefilled(pic, prompts), NEW, frozenset({end}))
    for before, after in zip(whole, ended, strict=True):
        cut = before.index(end) + 1 if end in before else len(before)
        assert after.tokens.tolist() == before[:cut]
    assert len(ended[0].log_probabilities) == len(ended[0].tokens), "forced to what full answered"


def test_an_error_leaves_the_model_detached(model, linked):
    pic, prompts = linked
    broken = torch.tensor([10**9])  # no such token
    with pytest.raises(IndexError):
        list(answers(model, prefilled(pic, prompts[1:2]), 1, frozenset(), [broken.repeat(3)]))
    assert model.config._attn_implementation == "sdpa"
    pic.compile(random_ids(3, seed=3))
