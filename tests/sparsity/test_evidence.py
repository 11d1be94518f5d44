"""Statistics of long forwards are taken in blocks: the same numbers, in linear memory."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity import H2O, RKV, SnapKV
from sparsity.policies import rkv
from sparsity.policies.base import Needs
from sparsity.retention.attention import attention_weights
from sparsity.retention.batch_rows import BatchRows, plan
from sparsity.retention.query_weights import (
    AT_ONCE,
    BLOCK,
    block_size,
    forward_weights,
    keep_last,
    keep_newest,
)
from tests.helpers import assert_close
from tests.sparsity.helpers import DrivenLayer, causal_mask


@pytest.mark.parametrize("group", ["mean", "max"])
@pytest.mark.parametrize("length", [BLOCK - 1, 2 * BLOCK + 3])
def test_sums_in_blocks_equal_the_whole_matrix(length, group):
    g = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, length, 8, generator=g)
    keys = torch.randn(2, 2, length, 8, generator=g)
    padding = torch.ones(2, length, dtype=torch.bool)
    padding[0, :5] = False
    step = plan(BatchRows(), H2O(8), 2, length, padding, query.device)
    slots = torch.arange(length).expand(2, 1, -1).masked_fill(~padding[:, None], -1)
    sinks = torch.randn(4, generator=g)
    weigh = partial(attention_weights, scaling=0.3, softcap=2.0, sinks=sinks)
    needs = Needs(attention="all", group=group)
    lazy = causal_mask(padding)
    got = forward_weights(query, query[:, :, -1], keys, slots, step, lazy, needs, weigh)
    allowed = torch.ones(length, length, dtype=torch.bool).tril() & padding[:, None, None]
    whole = weigh(query, keys, allowed)
    whole = whole.amax(2) if group == "max" else whole.mean(2)
    assert_close("sums", got, (whole * padding[:, None, :, None]).sum(2))
    needs = Needs(attention="newest", group=group)
    newest = forward_weights(query, query[:, :, -1], keys, slots, step, lazy, needs, weigh)
    assert_close("newest", newest, whole[:, :, -1])


def test_a_rule_of_the_model_lets_a_block_see_what_comes_after_it():
    """Tokens of one image attend to each other both ways; here the whole text is one."""
    query = torch.randn(1, 2, BLOCK + 9, 8)
    length = query.shape[2]
    step = plan(BatchRows(), H2O(8), 1, length, None, query.device)
    both_ways = replace(causal_mask(), rule=lambda b, h, q, k: (q >= 0) & (k >= 0))
    slots = torch.arange(length).expand(1, 1, -1)
    needs = Needs(attention="all")
    got = forward_weights(
        query, query[:, :, -1], query, slots, step, both_ways, needs, attention_weights
    )
    assert_close("both ways", got, attention_weights(query, query).mean(2).sum(2))


def test_blocks_of_queries_meet_no_keys_that_come_after_them():
    query, blocks = torch.randn(1, 1, 12 * BLOCK, 4), []

    def weigh(query, keys, allowed):
        blocks.append((query.shape[2], keys.shape[2]))
        return attention_weights(query, keys, allowed)

    step = plan(BatchRows(), H2O(8), 1, query.shape[2], None, query.device)
    slots, needs = torch.arange(query.shape[2]).expand(1, 1, -1), Needs(attention="all")
    forward_weights(query, query[:, :, -1], query, slots, step, causal_mask(), needs, weigh)
    assert blocks == [(BLOCK, BLOCK * (i + 1)) for i in range(12)]


def test_a_device_weighs_as_many_queries_at_once_as_fit():
    def of(tokens, device):
        query = torch.empty(2, 9, tokens, 8, device=device)
        return block_size(query, query[:, :3])

    assert of(4096, "cpu") == of(2**20, "meta") == BLOCK
    size = of(4096, "meta")
    assert size > BLOCK
    assert 2 * 9 * 4096 * size <= AT_ONCE < 2 * 9 * 4096 * (size + 1)


def redundancies_of_all_pairs(keys, start, threshold):
    """`rkv.redundancies` from the whole matrix of similarities, summed pair by pair."""
    used = start >= 0
    wide = torch.promote_types(keys.dtype, torch.float32)
    unit = F.normalize(keys.to(wide), dim=-1).masked_fill(~used[..., None], 0)
    similar = unit @ unit.mT
    similar.diagonal(dim1=-2, dim2=-1).zero_()
    close = (similar > threshold) & used[:, :, None]
    newest = start[:, :, None].masked_fill(~close, -1).max(-1, keepdim=True)
    place = torch.arange(start.shape[-1])
    spared = (newest.values >= 0) & (place == newest.indices)
    mean = similar.masked_fill(spared, 0).sum(2) / used.sum(-1, keepdim=True).clamp(min=1)
    return mean.masked_fill(~used, -torch.inf).softmax(-1)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_redundancy_equals_that_of_all_pairs(data):
    """Places in any order, some unused, keys that come again, keys of zero, any block."""
    seed, length = data.draw(st.integers(0, 999)), data.draw(st.sampled_from([1, 2, 7, 63, 130]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    threshold = data.draw(st.sampled_from([0.0, 0.313, 0.707, 0.97]))
    common = data.draw(st.sampled_from([0.0, 1.5]))  # what makes keys resemble each other
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, 3, length, 8, generator=generator) + common
    keys[0, :, length // 2] = keys[0, :, 0]
    keys[1, 0, length // 3] = 0
    start = torch.stack([torch.randperm(length, generator=generator) for _ in range(6)])
    start = start.view(2, 3, length).to(torch.int32)
    start[0, 1:, 1::3] = -1
    start[1, 2] = data.draw(st.sampled_from([-1, 5]))  # a head without a key
    start[1, 2, 1:] = -1
    block, usual = data.draw(st.sampled_from([1, 5, 64, 128])), rkv.BLOCK
    try:
        rkv.BLOCK = block
        got = rkv.redundancies(keys.to(dtype), start, threshold)
    finally:
        rkv.BLOCK = usual
    whole = redundancies_of_all_pairs(keys.to(dtype), start, threshold)
    torch.testing.assert_close(got, whole, rtol=3e-6, atol=0, equal_nan=True)


def test_redundancy_by_hand():
    """Keys at 0, 90 and 0 degrees and one at 45: the newest near-duplicate is not charged.

    Cosines: 0-2 are 1, those with key 3 are .707, those with key 1 else 0. Above .5 key 0 is like
    2 and 3 and spares 3, and so do keys 1 and 2; key 3 is like 0, 1 and 2 and spares 2.
    """
    half = 0.5**0.5
    keys = torch.tensor([[1.0, 0], [0, 3], [2, 0], [5, 5]])[None, None]
    start = torch.arange(4, dtype=torch.int32)[None, None]
    means = torch.tensor([1 + half, half, 1.0, 0]) / 4
    assert_close("by hand", rkv.redundancies(keys, start, 0.5)[0, 0], means.softmax(0))


def numbers_made(compute):
    """How many numbers the tensors have that `compute` makes, each view counted too."""
    made = [0]

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                made[0] += out.numel()
            return out

    with Watch():
        compute()
    return made[0]


@pytest.mark.parametrize(("likeness", "most"), [(2.0, 0.8), (0.0, 3.5)])
def test_redundancy_does_not_go_through_all_pairs_many_times(likeness, most):
    """Not even once where keys have near-duplicates among the newest; before, ten times."""
    length = 2048
    keys = torch.randn(1, 1, length, 16, generator=torch.Generator().manual_seed(0)) + likeness
    start = torch.arange(length, dtype=torch.int32)[None, None]
    made = numbers_made(lambda: rkv.redundancies(keys, start, 0.75))
    assert made <= most * length**2


@pytest.mark.parametrize("policy", [H2O(64), SnapKV(64, window=8), RKV(64)], ids=str)
def test_no_statistic_of_a_prompt_is_quadratic(policy):
    """The largest tensor made while a prompt of n tokens is taken in grows like n, not n * n."""
    largest = []
    for length in (1024, 2048):
        seen = [0]

        class Watch(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                out = function(*args, **(kwargs or {}))
                if isinstance(out, torch.Tensor):
                    seen[0] = max(seen[0], out.untyped_storage().nbytes())  # noqa: B023
                return out

        query, key = torch.randn(1, 2, length, 4), torch.randn(1, 1, length, 4)
        layer = DrivenLayer(policy, 0, 0.5)
        with Watch():
            layer.forward(query, key, key)
        largest.append(seen[0])
    assert largest[1] <= 2.1 * largest[0]


def test_the_last_queries_by_rank_and_none_for_tokens_of_a_past_cache():
    """Three cached tokens and two new ones, window of four; then one more token, then padding."""
    rows, policy = BatchRows(batch=1, seen=3), SnapKV(64, window=4)
    queries, asked = torch.zeros(1, 1, 4, 1), torch.full((1, 4), -1)
    step = plan(rows, policy, 1, 2, None, queries.device)
    new = torch.tensor([13.0, 14.0]).view(1, 1, 2, 1)
    queries, asked = keep_last(queries, asked, new, step)
    assert asked.tolist() == [[4, -1, -1, 3]]
    assert queries[0, 0, [0, 3], 0].tolist() == [14, 13]
    step = plan(step.then, policy, 1, 1, None, queries.device)
    queries, asked = keep_last(queries, asked, torch.full((1, 1, 1, 1), 15.0), step)
    assert asked.tolist() == [[4, 5, -1, 3]]
    assert queries[0, 0, [0, 1, 3], 0].tolist() == [14, 15, 13]
    padding = torch.tensor([[1, 1, 1, 1, 1, 1, 0]])
    step = plan(step.then, policy, 1, 1, padding, queries.device)
    after = keep_last(queries, asked, torch.full((1, 1, 1, 1), 16.0), step)
    assert torch.equal(after[0], queries)
    assert torch.equal(after[1], asked)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_one_query_in_place_equals_the_window_made_anew(size):
    """Padding in the prompt, then single columns with padding among them, past a full window."""
    g = torch.Generator().manual_seed(size)
    policy = SnapKV(64, window=size)
    padding = torch.rand(3, 16, generator=g) < 0.7
    padding[:, 4] = True
    queries, asked = torch.zeros(3, 2, size, 4), torch.full((3, size), -1)
    rows, fast = BatchRows(), None
    for first, stop in [(0, 5)] + [(i, i + 1) for i in range(5, 16)]:
        query = torch.randn(3, 2, stop - first, 4, generator=g)
        whole = padding[:, first:stop].all() and not rows.ragged
        step = plan(rows, policy, 3, stop - first, None if whole else padding[:, :stop], g.device)
        queries, asked = keep_last(queries, asked, query, step)
        if fast is None:
            fast = queries.clone(), asked.clone()
        else:
            keep_newest(*fast, query, step)
        assert torch.equal(fast[0], queries)
        assert torch.equal(fast[1], asked)
        rows = step.then
    assert (asked.amax(1) + 1).tolist() == padding.sum(1).tolist()
