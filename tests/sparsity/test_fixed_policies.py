"""Every policy in memory of fixed size: what it holds and decodes in memory that grows."""

import pytest
import torch
from torch._dynamo.utils import counters

from sparsity import (
    H2O,
    LazyEviction,
    PyramidKV,
    Quest,
    RaaS,
    Random,
    SnapKV,
    SparseCache,
    StreamingLLM,
    Then,
)
from sparsity.hf.decoding_path import COMPILED
from tests.helpers import random_ids
from tests.sparsity.fixed import assert_same, compiles, fixed, generate, held
from tests.sparsity.zoo import SMALL, TIGHT

PROMPT = {"rows": (5, 0), "prompt": 13}


# A graph takes seconds to trace, and other numbers make no other graph: those of TIGHT whose code
# others of it go through, too.
ELSEWHERE = [
    Random(20),
    RaaS(32, page_size=4, alpha=0.15),
    H2O(10),
    LazyEviction(10, evict_every=4, alpha=0.05),
    Then(PyramidKV(6, window=2, beta=4), H2O(12)),
]
TRACED = [policy for policy in TIGHT if policy not in ELSEWHERE]
assert len(TRACED) == len(TIGHT) - len(ELSEWHERE)
KINDS = (StreamingLLM, H2O, SnapKV, Quest, RaaS)


def one_of_each_kind(policies):
    """One of each family of policies; the others as well where all that is compiled runs."""
    kept = [next(each for each in policies if type(each) is kind) for kind in KINDS]
    return [p if p in kept else pytest.param(p, marks=pytest.mark.compiled) for p in policies]


@pytest.mark.parametrize("policy", one_of_each_kind(TRACED), ids=str)
def test_the_compiled_path_makes_the_tokens_of_the_eager_one(policy, shallow, fresh):
    """80 steps, padding; one graph, no break, no second compilation."""
    expected = generate(shallow, SparseCache(shallow, policy, static=False), 80, **PROMPT)
    cache = fixed(shallow, policy)
    got = generate(shallow, cache, 80, compile_config=compiles(), **PROMPT)
    assert torch.equal(got, expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert cache.report().decoding == COMPILED


@pytest.mark.parametrize("policy", SMALL, ids=str)
def test_a_fixed_pool_holds_what_one_that_grows_holds(policy, shallow):
    """Columns, stamps, sums and pins, step by step, with a row whose column is padding at times."""
    caches = [SparseCache(shallow, policy, static=False), fixed(shallow, policy)]
    ids, rows = random_ids(40, 3), 3
    mask = torch.ones(rows, 40, dtype=torch.long)
    mask[0, :5], mask[1, 14:16], mask[2, 20:23] = 0, 0, 0
    for first, stop in ((0, 12), *((i, i + 1) for i in range(12, 30)), (30, 33), (33, 34)):
        outputs = []
        for cache in caches:
            logits = shallow(
                ids[:, first:stop], attention_mask=mask[:, :stop], past_key_values=cache
            ).logits
            outputs.append(logits[mask[:, first:stop].bool()])
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
        for layer in caches[0].retentions:
            assert_same(*(held(cache, layer) for cache in caches))
        assert caches[0].get_seq_length() == caches[1].get_seq_length() == stop
