"""Statistics of long forwards are taken in blocks: the same numbers, in linear memory."""

from functools import partial

import pytest
import torch

from sparsity import H2O, RKV, SnapKV
from sparsity.policies import rkv
from sparsity.policies.base import Needs
from sparsity.retention.attention import attention_weights
from sparsity.retention.batch_rows import BatchRows, plan
from sparsity.retention.query_weights import BLOCK, forward_weights, keep_last, keep_newest
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


def test_redundancy_in_blocks_equals_the_whole_matrix(monkeypatch):
    keys = torch.randn(2, 2, 23, 8, generator=torch.Generator().manual_seed(0))
    start = torch.arange(23).expand(2, 2, -1).clone()
    start[0, :, 4], keys[1, :, 7] = -1, 0
    whole = rkv.redundancies(keys, start, 0.3)
    assert whole[0, :, 4].eq(0).all()
    assert_close("all places", whole.sum(-1), torch.ones(2, 2))
    for block in (1, 5, 22):
        monkeypatch.setattr(rkv, "BLOCK", block)
        assert_close(f"blocks of {block}", rkv.redundancies(keys, start, 0.3), whole)


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
