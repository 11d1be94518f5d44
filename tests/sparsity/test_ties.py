"""Equals are told apart by age, whatever the last bits of a sum or the place in a tensor say."""

import pytest
import torch

from sparsity import LazyEviction, VaSE
from sparsity.policies.base import PageView
from sparsity.retention.eviction import eviction_order


def pages(start, values, sums=0, stamp=None):
    """One row and KV head of tokens that came at `start`, with `values` `[tokens, head_dim]`."""
    start = torch.tensor(start, dtype=torch.int32)[None, None]
    stamp = start if stamp is None else torch.tensor(stamp, dtype=torch.int32)[None, None]
    tokens = start.shape[-1]
    return PageView(
        start=start,
        stamp=stamp,
        sums=torch.full((1, 1, tokens, 1), float(sums)),
        pinned=torch.zeros(1, 1, tokens, dtype=torch.bool),
        filled=start >= 0,
        kmin=None,
        kmax=None,
        keys=values[None, None],
        values=values[None, None],
        weights=None,
        window=torch.full((1, 1, 2, tokens), 1 / tokens, dtype=torch.float32),
        now=torch.full((1, 1, 1), int(start.max())),
        page_size=1,
        layer=0,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rounded_up", [1, 4])
def test_of_tokens_with_the_same_range_the_newest_is_large(rounded_up, dtype):
    """The same token twice: its values come from two forwards, and one is an ulp wider."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(8, 4, generator=generator, dtype=dtype)
    values[1] = values[4] = torch.tensor([3.1, 0.0, 0.0, 0.0], dtype=dtype)
    values[rounded_up, 0] = torch.nextafter(values[1, 0], torch.tensor(4.0, dtype=dtype))
    policy = VaSE(8, sinks=0, window=2, large=1, kernel=1, evict_every=1)
    large = policy._is_large(pages(list(range(8)), values))[0, 0]
    assert large.nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("tokens", range(1, 40, 3))
def test_tokens_as_silent_as_each_other_go_oldest_first(tokens):
    """Whether a vector unit or its remainder computes the worth of a token does not count."""
    for longest in range(1, 60):
        policy = LazyEviction(budget=64, evict_every=1, recent=0)
        start = list(range(tokens))[::-1]
        view = pages(start, torch.zeros(tokens, 1), longest, [-7] * tokens)
        assert policy.priority(view).unique().numel() == 1
        none = torch.zeros(0)  # no window of queries, nothing weighed
        order = eviction_order(policy, view, view.pinned, none, none, torch.add)
        assert order.flatten().tolist() == start
