"""Positions inside the cache: equal to the twin that rotates what is kept from scratch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsity
from sparsity import SparseCache, StreamingLLM
from sparsity.retention.rotation import Rotation
from tests.helpers import assert_close, random_ids, tiny_model
from tests.sparsity.helpers import DrivenLayer, run
from tests.sparsity.naive_positions import ROTATED, angles, batch, build, naive

POLICIES = [
    StreamingLLM(8),
    StreamingLLM(6, sinks=1),
    StreamingLLM(9, sinks=3, evict_every=4),
    StreamingLLM(8, sinks=0),
    StreamingLLM(8, dense_layers=2),
]
CASES = [("Llama 2", policy) for policy in POLICIES]
CASES += [(family, POLICIES[0]) for family in ROTATED if family != "Llama 2"]
WIDTHS = (13, *[1] * 9, 5, *[1] * 12)  # a prompt, decoding, another turn, decoding past eviction


@pytest.mark.parametrize(("family", "policy"), CASES, ids=str)
def test_attention_equals_the_twin_that_rotates_from_scratch(family, policy):
    """Rows of different lengths, a second turn, past eviction, in fp32."""
    model = build(family)
    ids, padding = batch(sum(WIDTHS))
    cache = SparseCache(model, policy)
    got = run(model, cache, ids, padding, WIDTHS)
    assert sum(cache.report().evictions) > 0
    sparsity.detach(model)
    assert_close("logits", got, naive(model, policy, ids, padding, WIDTHS), 1e-5)


@pytest.mark.parametrize("family", ["Llama 2", "Gemma 3", "GLM"])
def test_generated_tokens_are_those_of_the_twin(family):
    """Greedy, token for token, a padded row included; absolute positions say something else."""
    model, new = build(family), 24
    ids, padding = batch(13)
    inputs = {"attention_mask": padding.long(), "max_new_tokens": new, "do_sample": False}
    out = {
        positions: model.generate(
            ids, past_key_values=SparseCache(model, StreamingLLM(8, positions=positions)), **inputs
        )
        for positions in ("cache", "absolute")
    }
    sparsity.detach(model)
    padding = torch.cat([padding, torch.ones(2, new, dtype=torch.bool)], 1)
    expected = naive(model, StreamingLLM(8), out["cache"], padding, (13, *[1] * (new - 1)))
    assert torch.equal(out["cache"][:, 13:], expected.argmax(-1))
    assert not torch.equal(out["cache"], out["absolute"])


@settings(max_examples=60, deadline=None)
@given(
    policy=st.sampled_from([StreamingLLM(6), *POLICIES[:4]]),
    seed=st.integers(0, 10**6),
    prompt=st.integers(1, 14),
    pads=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    later=st.lists(st.sampled_from([1, 1, 1, 1, 1, 1, 2, 5]), max_size=14),
    holes=st.booleans(),
)
def test_each_key_is_as_far_from_the_query_as_inside_the_cache(
    policy, seed, prompt, pads, later, holes
):
    """One layer, padding anywhere: a key without its position is a key, so only distances count."""
    generator = torch.Generator().manual_seed(seed)
    total = prompt + sum(later)
    bare = torch.randn(2, 2, total, 8, dtype=torch.float64, generator=generator)
    asked = torch.randn(2, 4, total, 8, dtype=torch.float64, generator=generator)
    padding = torch.ones(2, total, dtype=torch.bool)
    for b, pad in enumerate(pads):
        padding[b, : min(pad, prompt - 1)] = False
    if holes:
        padding[:, prompt:] = torch.rand(2, total - prompt, generator=generator) < 0.7
    rank = (padding.cumsum(-1) - 1).clamp(min=0)[:, None]
    turn = Rotation(angles, "half")
    start = torch.zeros_like(rank)
    key = turn(bare, start.expand(-1, 2, -1), rank.expand(-1, 2, -1))
    query = turn(asked, start.expand(-1, 4, -1), rank.expand(-1, 4, -1))
    distances = []

    def move(keys, old, new):
        distances.append(new)
        return turn(keys, old, new)

    layer, first = DrivenLayer(policy, 0, 0.5, move), 0
    for width in (prompt, *later):
        stop = first + width
        mask = None if padding.all() else padding[:, :stop]
        new = slice(first, stop)
        before = None if layer.pool is None else layer.pool.start.clone()
        out, step = layer.forward(query[:, :, new], key[:, :, new], key[:, :, new], mask)
        pool = layer.pool
        for b in range(2):
            real = padding[b].nonzero()[:, 0]
            for column in (real[(real >= first) & (real < stop)]).tolist():
                at = int(rank[b, 0, column])
                there = pool.start if step.single else before
                held = [] if there is None else [r for r in there[b, 0].tolist() if r >= 0]
                fresh = [int(rank[b, 0, c]) for c in real.tolist() if first <= c <= column]
                seen = sorted({r for r in held if r <= at} | set(fresh))
                columns = real[seen]
                place = torch.arange(len(seen)).expand(1, 2, -1)
                k = turn(bare[b : b + 1, :, columns], 0 * place, place)[0]
                last = place[:, :1, -1:].expand(1, 4, 1)
                q = turn(asked[b : b + 1, :, [column]], 0 * last, last)[0]
                weights = (q @ k.repeat_interleave(2, 0).mT * 0.5).softmax(-1)
                values = key[b][:, columns].repeat_interleave(2, 0)
                assert_close("output", out[b, column - first], (weights @ values)[:, 0], 1e-9)
                if distances and step.single:  # no key is further away than the cache is long
                    assert at - int(distances[-1][b].min()) < policy.budget + policy.evict_every - 1
        first = stop


def test_positions_stay_within_the_budget_past_the_trained_length():
    """A model of 64 positions decodes 150 tokens: none is asked for a key further than 15 back."""
    model, policy = tiny_model("llama", max_position_embeddings=64), StreamingLLM(16)
    cache, furthest = SparseCache(model, policy), []
    for retention in cache.retentions.values():
        turn = retention.move

        def move(keys, old, new, turn=turn):
            furthest.append(cache.get_seq_length() - 1 - int(new.min()))
            return turn(keys, old, new)

        retention.move = move
    model.generate(random_ids(10, 1), past_key_values=cache, max_new_tokens=150, do_sample=False)
    sparsity.detach(model)
    assert len(furthest) == 4 * (159 - 16)
    assert set(furthest) == {15}


def test_a_prompt_in_chunks_closes_the_gap_between_them(llama):
    """At once a token stands where it is in the text; in chunks not beyond budget and chunk."""
    ids = random_ids(60, 1)
    with torch.no_grad():
        dense = llama(ids).logits[:, -1]
        at_once = llama(ids, past_key_values=SparseCache(llama, StreamingLLM(8))).logits[:, -1]
        chunks = [StreamingLLM(8, positions=positions) for positions in ("cache", "absolute")]
        logits = []
        for policy in chunks:
            cache = SparseCache(llama, policy)
            for part in ids.split(12, 1):
                last = llama(part, past_key_values=cache).logits[:, -1]
            logits.append(last)
    sparsity.detach(llama)
    assert_close("at once", at_once, dense)
    _, padding = batch(60, (0,))
    assert_close(
        "chunks", logits[0][:, None], naive(llama, chunks[0], ids, padding, [12] * 5)[:, -1:]
    )
    assert (logits[0] - logits[1]).abs().max() > 1e-2
