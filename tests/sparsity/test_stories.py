"""Retention on a real trained model that this project did not make: stories260K."""

from functools import cache

import pytest
import torch
from transformers import DynamicCache

from picache import PIC, LegoLink
from sparsity import Full, RaaS, SparseCache, StreamingLLM, detach
from tests.sparsity.zoo import AMPLE, QUARTER, enlarged
from tests.stories260k import (
    StoriesTokenizer,
    golden,
    load_model,
    needs_stories,
    published_stories,
)

pytestmark = needs_stories


@cache
def stories():
    return load_model()


def next_token_loss(cache, ids, prompt):
    """Mean NLL of ids after `prompt` tokens, fed one by one as decoding does."""
    model, losses = stories(), []
    with torch.no_grad():
        logits = model(ids[None, :prompt], past_key_values=cache).logits[:, -1]
        for token in ids[prompt:]:
            losses.append(torch.nn.functional.cross_entropy(logits, token[None]))
            logits = model(token[None, None], past_key_values=cache).logits[:, -1]
    return torch.stack(losses).mean().item()


@cache
def dense_loss(tokens, prompt):
    return next_token_loss(DynamicCache(), torch.tensor(tokens), prompt)


@pytest.mark.parametrize("policy", AMPLE, ids=str)
def test_the_golden_text_comes_out_under_an_ample_budget(policy):
    ids = golden()[0][:129]
    cache = SparseCache(stories(), enlarged(policy, 2))  # AMPLE is so for a half of that
    start = torch.tensor([ids[:3]])
    out = stories().generate(
        start, past_key_values=cache, max_new_tokens=len(ids) - 3, do_sample=False
    )
    detach(stories())
    assert out[0].tolist() == ids
    assert sum(cache.report().evictions) == 0


@pytest.mark.parametrize("policy", QUARTER, ids=lambda p: type(p).__name__)
def test_next_token_loss_on_real_text_at_a_quarter_of_the_context(policy):
    """The model is local: 64 of 256 tokens keep every policy within half a nat of dense."""
    ids = torch.tensor([1, *StoriesTokenizer().encode(published_stories()[1])])
    dense = dense_loss(tuple(ids.tolist()), 32)
    cache = SparseCache(stories(), policy)
    kept = next_token_loss(cache, ids, 32)
    report = cache.report()
    detach(stories())
    assert abs(kept - dense) < 0.5
    if policy.evicts:
        most = policy.budget + (policy.evict_every or 0) - 1
        assert max(report.tokens_kept) <= most or not policy.pins_count
        assert sum(report.evictions) > 0


def test_positions_inside_the_cache_hold_past_the_trained_length():
    """Trained on 512 tokens, reading 4,000 of its own stories, 32 a forward."""
    torch.manual_seed(0)
    bos = torch.ones(20, 1, dtype=torch.long)
    text = stories().generate(
        bos, attention_mask=bos, max_new_tokens=199, do_sample=True, temperature=0.8, top_k=0
    )
    ids, loss = text.flatten(), {}
    caches = {"dense": DynamicCache()}
    for positions in ("cache", "absolute"):
        caches[positions] = SparseCache(stories(), StreamingLLM(128, positions=positions))
    for name, held in caches.items():
        with torch.no_grad():
            parts = [stories()(p[None], past_key_values=held).logits[0] for p in ids.split(32)]
        each = torch.nn.functional.cross_entropy(torch.cat(parts)[:-1], ids[1:], reduction="none")
        loss[name] = each[:512].mean().item(), each[3000:].mean().item()
    detach(stories())
    early = [before for before, _ in loss.values()]
    assert max(early) - min(early) < 0.05
    assert loss["cache"][1] < early[0] + 0.3
    assert loss["absolute"][1] > 3
    assert loss["dense"][1] > 3


def test_a_linked_prompt_goes_on_under_a_policy():
    """picache hands over an ordinary cache: linking and retention compose."""
    ids = [1, *StoriesTokenizer().encode(published_stories()[0])]
    pic = PIC(stories())
    chunks = [pic.compile(ids[i : i + 24]) for i in range(0, 72, 24)]
    prompt = pic.link(chunks, ids[72:80], LegoLink(4))
    dense = stories().generate(**prompt, max_new_tokens=40, do_sample=False)
    inputs = {name: prompt[name] for name in ("input_ids", "attention_mask")}
    for policy in (Full(), RaaS(128), StreamingLLM(128)):
        cache = SparseCache(stories(), policy, past=prompt["past_key_values"])
        out = stories().generate(
            **inputs, past_key_values=cache, max_new_tokens=40, do_sample=False
        )
        assert out.tolist() == dense.tolist()
    cache = SparseCache(stories(), StreamingLLM(32), past=prompt["past_key_values"])
    stories().generate(**inputs, past_key_values=cache, max_new_tokens=40, do_sample=False)
    assert max(cache.report().tokens_kept) == 32
    detach(stories())
