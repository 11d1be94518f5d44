"""One layer, driven directly: the same kept set and the same output as the slow twin."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity import RaaS
from tests.helpers import assert_close
from tests.sparsity.helpers import DrivenLayer
from tests.sparsity.twins import Twin
from tests.sparsity.zoo import SMALL, selects

HEADS, GROUP, DIM, SCALING = 2, 2, 4, 0.5
KINDS = ("random", "constant", "tied", "spiky")


def make(kind, shape, generator):
    """Whole numbers in float64: equal scores are equal in any order of sums, or once rounded."""
    values = torch.randint(-3, 4, shape, generator=generator).double()
    if kind == "constant":
        return torch.ones(shape, dtype=torch.float64)
    if kind == "tied":
        return (values > 0).double()
    if kind == "spiky":
        return values * (torch.rand(shape[:-1], generator=generator) < 0.1)[..., None] * 5
    return values


@pytest.mark.parametrize("policy", SMALL, ids=str)
@settings(max_examples=16, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 10**6),
    prompt=st.integers(1, 14),
    pads=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    later=st.lists(st.sampled_from([1, 1, 1, 1, 1, 1, 2, 5]), max_size=14),
    holes=st.booleans(),
)
def test_kept_set_and_output_equal_the_twin(policy, kind, seed, prompt, pads, later, holes):
    if policy.pin_prompt and policy.pins_count:  # longer forwards are pinned: stay in the budget
        later = [1] * len(later)
    policy = policy.at_layer(1, 4)
    generator = torch.Generator().manual_seed(seed)
    pads = [min(p, prompt - 1) for p in pads]
    total = prompt + sum(later)
    keys = make(kind, (2, HEADS, total, DIM), generator)
    values = make(kind, (2, HEADS, total, DIM), generator)
    padding = torch.ones(2, total, dtype=torch.bool)
    for b, pad in enumerate(pads):
        padding[b, :pad] = False
    if holes:  # padding inside of later forwards, too
        padding[:, prompt:] = torch.rand(2, total - prompt, generator=generator) < 0.7
    columns = [padding[b].nonzero()[:, 0].tolist() for b in range(2)]
    twins = [Twin(policy, 1, HEADS, SCALING) for _ in range(2)]
    layer, first = DrivenLayer(policy, 1, SCALING), 0
    for width in (prompt, *later):
        stop = first + width
        query = make(kind, (2, HEADS * GROUP, width, DIM), generator)
        mask = None if padding.all() else padding[:, :stop]
        new = slice(first, stop)
        out, step = layer.forward(query, keys[:, :, new].clone(), values[:, :, new].clone(), mask)
        allowed = torch.zeros(2, HEADS, width, total, dtype=torch.bool)
        for b, real in enumerate(columns):
            before, after = int(padding[b, :first].sum()), int(padding[b, :stop].sum())
            asked = query[b][:, padding[b, first:stop]]
            attended, kept = twins[b].forward(
                keys[b][:, real], values[b][:, real], asked, before, after, step.single
            )
            for h in range(HEADS):
                held = sorted(s for s in layer.pool.slots[b, h].tolist() if s >= 0)
                assert held == [real[rank] for rank in sorted(kept[h])]
                for rank in attended[h]:
                    allowed[b, h, :, real[rank]] = True
        first = stop
        if selects(policy) and width == 1:
            continue  # whole numbers tie too often, and ties may go either way when reading
        causal = torch.arange(total) <= torch.arange(stop - width, stop)[:, None]
        expected = plain(query, keys, values, allowed & causal)
        for b in range(2):
            if (real := padding[b, stop - width : stop]).any():
                assert_close("output", out[b, real], expected[b, real], 1e-5)


def plain(query, keys, values, allowed):
    k, v, m = (t.repeat_interleave(GROUP, 1) for t in (keys, values, allowed))
    scores = query @ k[:, :, : m.shape[-1]].mT * SCALING
    weights = scores.masked_fill(~m, -1e30).softmax(-1)
    return (weights @ v).transpose(1, 2)


def test_raas_by_hand():
    """Pages of 4, room for 3, one KV head of size 1; a page's score is its largest key * query.

    Prompt 0-7 is pages A (0-3) and B (4-7), both 0 except B with 5; both stamped when opened.
    Token 8 opens C; its query 1 sees A 0, B 5, C 0: only B is above 0.4 and is stamped 8.
    Tokens 9-11 with query 0 see equal shares of 1/3: nothing is refreshed.
    Token 12 needs a page: stamps are A 0, B 8, C 8: A goes, D takes A's place.
    Tokens 13-15 do nothing. Token 16 needs a page: B 8, C 8, D 12: a tie, the older B goes.
    """
    policy = RaaS(12, page_size=4, alpha=0.4, pin_prompt=False)
    layer = DrivenLayer(policy)
    keys = torch.zeros(1, 1, 20, 1)
    keys[0, 0, 4:8] = 5.0
    starts = {}
    for first, stop in [(0, 8)] + [(i, i + 1) for i in range(8, 20)]:
        query = torch.full((1, 1, stop - first, 1), 1.0 if first == 8 else 0.0)
        key = keys[:, :, first:stop]
        layer.forward(query, key, key)
        starts[stop - 1] = layer.pool.start[0, 0].tolist()
    assert starts[7] == [0, 4]
    assert starts[8] == starts[11] == [0, 4, 8]
    assert starts[12] == starts[15] == [12, 4, 8]
    assert starts[16] == starts[19] == [12, 16, 8]
    assert layer.pool.stamp[0, 0].tolist() == [12, 16, 8]
