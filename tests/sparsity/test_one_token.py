"""What is done in few calls where all rows are alike, against the slow way for rows that differ."""

from dataclasses import replace

import pytest
import torch

from sparsity import H2O, TOVA, LazyEviction, RaaS, StreamingLLM
from sparsity.policies.base import Needs, PageView
from sparsity.retention.attention import attend_and_weigh, attend_reference, attention_weights
from sparsity.retention.batch_rows import plan
from sparsity.retention.eviction import eviction_order, first_evicted
from sparsity.retention.layer import _pages_of
from sparsity.retention.rotation import Rotation
from tests.helpers import assert_close
from tests.sparsity.helpers import DrivenLayer, causal_mask
from tests.sparsity.zoo import SMALL

BATCH, HEADS, GROUP, DIM = 2, 2, 3, 6


def angles(positions):
    angle = positions[..., None].float() * torch.tensor([1.0, 0.3, 0.1])
    return angle.cos(), angle.sin()


class Slow(DrivenLayer):
    """Says of every step that rows may differ, so that each is looked at."""

    def forward(self, query, key, value, mask=None):
        step = plan(self.rows, self.policy, *query.shape[::2], mask, query.device)
        self.rows = step.then
        if step.single:
            rows, valid = replace(step.then, ragged=True), torch.ones(BATCH, 1, dtype=torch.bool)
            step = replace(step, then=rows, valid=valid)
        out = self.retention.attend(query, key, value, step, causal_mask(mask), self.scaling)
        return out, step


def contents(pool):
    """What is held, by column: the order of places is nobody's business."""
    slots, order = pool.slots.sort(-1)
    filled = slots >= 0
    index = order[..., None].expand(-1, -1, -1, pool.keys.shape[-1])
    states = [t.gather(2, index)[filled] for t in (pool.keys, pool.values)]
    start, place = pool.start.sort(-1)
    pages = [pool.stamp, pool.pinned]
    if pool.kmin is not None:
        pages += [pool.kmin.sum(-1), pool.kmax.sum(-1)]
    return [slots[filled], *states, *(t.gather(-1, place)[start >= 0] for t in pages)]


@pytest.mark.parametrize(
    ("policy", "prompt", "dtype"),
    [  # every third in half precision too, whose rounding is no policy's own
        *((policy, prompt, torch.float64) for policy in SMALL for prompt in (3, 13)),
        *((policy, 13, torch.bfloat16) for policy in SMALL[::3]),
    ],
    ids=str,
)
def test_alike_rows_are_kept_as_rows_that_differ(policy, prompt, dtype):
    if policy.pin_prompt and policy.pins_count and prompt > 8:
        prompt = 8
    policy, g, total = policy.at_layer(1, 4), torch.Generator().manual_seed(prompt), prompt + 30
    if dtype == torch.bfloat16 and isinstance(policy, H2O | TOVA | LazyEviction):
        policy = replace(policy, group="mean")
    query = torch.randn(BATCH, HEADS * GROUP, total, DIM, generator=g).to(dtype)
    key, value = torch.randn(2, BATCH, HEADS, total, DIM, generator=g).to(dtype)
    move = Rotation(angles, "half")
    quick = DrivenLayer(policy, 1, 0.4, move)
    slow = Slow(policy, 1, 0.4, move)
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-6
    for first, stop in [(0, prompt)] + [(i, i + 1) for i in range(prompt, total)]:
        new = [t[:, :, first:stop] for t in (query, key, value)]
        (out, step), (expected, _) = quick.forward(*new), slow.forward(*new)
        assert step.alike == (first > 0)
        torch.testing.assert_close(out, expected, atol=bound, rtol=bound)
        for held, twin in zip(contents(quick.pool), contents(slow.pool), strict=True):
            assert torch.equal(held, twin)


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_the_first_page_to_go_is_first_in_the_order(seed, pinned):
    """With ties, infinite worth, pinned pages and unused places."""
    g = torch.Generator().manual_seed(seed)
    tokens = 7
    start = torch.stack([torch.randperm(20, generator=g)[:tokens] for _ in range(4)])
    start = start.to(torch.int32).view(2, 2, tokens)
    if seed % 2:
        start[:, 1, 3] = -1
    pins = torch.rand(2, 2, tokens, generator=g) < 0.4
    view = PageView(
        start=start,
        stamp=torch.randint(0, 3, start.shape, generator=g, dtype=torch.int32),
        sums=torch.zeros(2, 2, tokens, 0),
        pinned=pins if pinned else torch.zeros_like(pins),
        filled=start >= 0,
        kmin=None,
        kmax=None,
        keys=None,
        values=None,
        weights=None,
        window=None,
        now=torch.full((2, 1, 1), 20),
        page_size=1,
        layer=0,
    )
    policy = RaaS(8, page_size=1, sinks=1, recent=3, pin_prompt=pinned)
    none = torch.zeros(0)
    order = eviction_order(policy, view, view.pinned, none, none, torch.add)
    first = first_evicted(policy, view, none, none, torch.add)
    assert torch.equal(order.argmin(-1), first)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("how", ["mean", "max"])
def test_one_pass_gives_output_and_weights(how, masked):
    g = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 1, 5, generator=g)
    key, value = torch.randn(2, 2, 7, 5, generator=g), torch.randn(2, 2, 7, 3, generator=g)
    mask = torch.rand(2, 2, 1, 7, generator=g) < 0.6 if masked else None
    out, weights = attend_and_weigh(query, key, value, mask, attention_weights, how)
    assert_close("out", out, attend_reference(query, key, value, mask))
    each = attention_weights(query, key, mask)[:, :, :, 0]
    assert torch.equal(weights, each.amax(2) if how == "max" else each.mean(2))


def test_pages_are_taken_from_any_layout():
    tokens = torch.arange(2 * 3 * 8 * 5).view(2, 3, 8, 5)
    pages = torch.tensor([[[1, 0], [3, 3], [2, 1]], [[0, 1], [1, 2], [3, 0]]])
    other = tokens.transpose(0, 1).contiguous().transpose(0, 1)  # not contiguous
    taken = _pages_of(tokens, pages, 2)
    assert torch.equal(taken, _pages_of(other, pages, 2))
    assert taken[1, 2, :2, 0].tolist() == tokens[1, 2, 6:8, 0].tolist()


def test_layers_share_the_angles_of_a_step():
    calls = []

    def counted(positions):
        calls.append(positions)
        return angles(positions)

    assert StreamingLLM(8).needs == Needs(moved=4)
    layers = [DrivenLayer(StreamingLLM(8), i, 0.4, Rotation(counted, "half")) for i in range(3)]
    keys = torch.randn(1, 1, 12, DIM, generator=torch.Generator().manual_seed(0))
    for layer in layers:
        layer.forward(keys, keys, keys)
    new = keys[:, :, :1]
    step = plan(layers[0].rows, layers[0].policy, 1, 1, None, new.device)
    outs = [x.retention.attend(new, new, new, step, causal_mask(), 0.4) for x in layers]
    assert len(calls) == 1
    assert all(torch.equal(outs[0], out) for out in outs)
