"""Equals are told apart by age, whatever the last bits of a sum or the place in a tensor say."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.overrides import TorchFunctionMode

from sparsity import LazyEviction, RaaS, VaSE
from sparsity.policies.base import PageView
from sparsity.policies.scores import without_rounding
from sparsity.retention.clock import Clock
from sparsity.retention.eviction import eviction_order, first_evicted
from sparsity.retention.fixed_pool import _worth
from sparsity.retention.page_pool import PagePool


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
        policy = LazyEviction(budget=64, evict_every=1, recent=0, sinks=0, ties="age")
        start = list(range(tokens))[::-1]
        view = pages(start, torch.zeros(tokens, 1), longest, [-7] * tokens)
        assert policy.priority(view).unique().numel() == 1
        none = torch.zeros(0)  # no window of queries, nothing weighed
        order = eviction_order(policy, view, view.pinned, none, none, torch.add)
        assert order.flatten().tolist() == start


def tied(generator, batch, heads, places, size):
    """Pages with few different stamps and scores, some places without a page, some pages pinned."""
    shape = (batch, heads, places)
    ranks = torch.rand(batch, heads, 2 * places, generator=generator).argsort(-1)[..., :places]
    stamp, score = torch.randint(0, 3, (2, *shape), generator=generator)
    unused, pinned = torch.rand(2, *shape, generator=generator) < 0.15
    start = (ranks * size).to(torch.int32).masked_fill(unused, -1)
    return replace(
        pages([0], torch.zeros(1, 1)),
        start=start,
        stamp=stamp.to(torch.int32),
        sums=score[..., None] / 4,
        pinned=pinned & ~unused,
        filled=(start >= 0).repeat_interleave(size, -1),
        now=torch.full((batch, 1, 1), 3 * places * size),
        page_size=size,
    )


def pooled(policy, view):
    """The pages as a pool of fixed size holds them; their keys do not matter here."""
    one = torch.zeros(*view.start.shape[:2], 1, 1)
    return replace(
        PagePool.empty(policy, 0, 0, one, one, one),
        held=view.start.shape[-1],
        high=view.start.shape[-1],
        slots=view.filled.int() - 1,
        start=view.start,
        stamp=view.stamp,
        sums=view.sums,
        pinned=view.pinned,
    )


def said(view, sinks, row, head, place):
    """What decides about a page: stamp, score and age, or age alone where it is protected."""
    at = row, head, place
    start = int(view.start[at])
    if start < sinks:
        return True, 0, 0.0, start
    return False, int(view.stamp[at]), float(view.sums[*at, 0]), start


@pytest.mark.parametrize("sinks", [0, 5])
@pytest.mark.parametrize("pin_prompt", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 7, 3), (3, 2, 13, 1), (2, 3, 9, 16)], ids=str)
def test_every_path_breaks_ties_by_score_and_then_by_age(shape, pin_prompt, sinks):
    """The order of eviction, the first page of it, and the place that `append` takes."""
    policy = RaaS(40 * shape[-1], shape[-1], sinks, pin_prompt=pin_prompt, ties="score")
    generator, none = torch.Generator().manual_seed(0), torch.zeros(0)
    for _ in range(30):
        view = tied(generator, *shape)
        if not pin_prompt:
            view = replace(view, pinned=torch.zeros_like(view.pinned))
        order = eviction_order(policy, view, view.pinned, none, none, torch.add).argsort(-1)
        first = first_evicted(policy, view, none, none, torch.add)
        worth = _worth(pooled(policy, view), policy, Clock.at(view.now[:, 0, 0], 0))
        taken = view.start.masked_fill(worth > worth.amin(-1, keepdim=True), 2**30).argmin(-1)
        assert torch.equal(first, taken)
        for row, head in itertools.product(range(shape[0]), range(shape[1])):
            free = view.used[row, head] & ~view.pinned[row, head]
            expected = sorted(
                free.nonzero().flatten().tolist(), key=partial(said, view, sinks, row, head)
            )
            assert [p for p in order[row, head].tolist() if free[p]] == expected
            if view.used[row, head].all():
                assert first[row, head] == expected[0]
            else:
                assert not view.used[row, head, first[row, head]]


def test_the_sink_outlives_pages_of_the_same_stamp():
    """At the paper's alpha every page is stamped at every step; the query likes the first one."""
    keys = torch.zeros(1, 1, 4, 2)
    keys[..., 0] = torch.tensor([3.0, 0.5, 1.0, 2.0])
    view = replace(
        pages([0, 1, 2, 3], keys[0, 0]), kmin=keys, kmax=keys, sums=torch.zeros(1, 1, 4, 1)
    )
    query, none = torch.tensor([[[1.0, 0.0]]]), torch.zeros(0)
    for ties, gone in (("age", 0), ("score", 1)):
        policy = RaaS(4, page_size=1, pin_prompt=False, ties=ties)
        seen = policy.observe(query, view, 1.0)
        assert seen.stamp.tolist() == [[[3, 3, 3, 3]]]
        assert first_evicted(policy, seen, none, none, torch.add).tolist() == [[gone]]


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1, -(1 << 22)])
def test_what_is_no_number_stays_none_without_rounding(bits):
    """Of some of them the bits, rounded up, would be those of -0, the lowest score."""
    found = without_rounding(torch.tensor([bits, 0x7F800000, 0], dtype=torch.int32).view(
        torch.float32))  # fmt: skip
    assert found[0].isnan()
    assert found[1:].tolist() == [torch.inf, 0]


class Called(TorchFunctionMode):
    """The names of the operations of torch that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("setting", "times"),
    [({}, 1), ({"ties": "score"}, 1), ({"top_ratio": 0.5, "ties": "score"}, 1),
     ({"top_ratio": 0.5}, 0)],
    ids=str,
)  # fmt: skip
def test_shares_are_computed_where_something_reads_them(setting, times):
    """Whichever does, the best half is stamped, and the sums are the shares."""
    keys = torch.tensor([[3.0, 0.0], [0.5, 0.0], [1.0, 0.0], [2.0, 0.0]])
    bounds = keys[None, None]
    view = replace(pages([0, 1, 2, 3], keys), kmin=bounds, kmax=bounds)
    with Called() as called:
        seen = RaaS(4, page_size=1, pin_prompt=False, **setting).observe(
            torch.tensor([[[1.0, 0.0]]]), view, 1.0
        )
    assert called.names.count("softmax") == times
    stamped = [0, 3] if "top_ratio" in setting else [0, 1, 2, 3]
    assert (seen.stamp[0, 0] == 3).nonzero().flatten().tolist() == stamped
    if "ties" in setting:
        torch.testing.assert_close(seen.sums[0, 0, :, 0], keys[:, 0].softmax(0))
