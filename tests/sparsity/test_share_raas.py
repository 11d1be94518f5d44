"""A page is stamped where it gets more than an equal share of the attention."""

import math
from dataclasses import replace

import pytest
import torch

from sparsity import RaaS, ShareRaaS, SparsityError
from tests.sparsity.test_ties import pages


def stamped(policy, scores):
    """The places that one query stamps, of earlier pages of one token with these scores."""
    keys = torch.zeros(len(scores), 2)
    keys[:, 0] = torch.tensor(scores)
    view = pages(list(range(len(scores))), keys)
    view = replace(
        view, kmin=keys[None, None], kmax=keys[None, None], now=torch.full((1, 1, 1), 999)
    )
    seen = policy.observe(torch.tensor([[[1.0, 0.0]]]), view, 1.0)
    return [at for at, stamp in enumerate(seen.stamp[0, 0].tolist()) if stamp == 999]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 999])
def test_of_equals_none_is_stamped(count):
    assert stamped(ShareRaaS(4000, page_size=1), [0.37] * count) == []
    assert stamped(RaaS(4000, page_size=1), [0.37] * count) == list(range(count))


@pytest.mark.parametrize("count", [5, 50, 700])
def test_the_threshold_is_the_share_by_the_number_of_pages(count):
    """One page has half of the attention, one an equal share and a half, the others the rest."""
    rest = (0.5 - 1.5 / count) / (count - 2)
    scores = [math.log(share) for share in [0.5, 1.5 / count] + [rest] * (count - 2)]
    assert stamped(ShareRaaS(4000, page_size=1), scores) == [0, 1]
    assert stamped(ShareRaaS(4000, page_size=1, share=0.2), scores) == list(range(count))


def test_places_without_a_page_are_no_pages():
    """Two pages and two empty places: an equal share is a half."""
    keys = torch.zeros(4, 2)
    keys[:, 0] = torch.tensor([math.log(0.4), math.log(0.6), 9.0, 9.0])
    view = pages([0, 1, -1, -1], keys)
    view = replace(view, kmin=keys[None, None], kmax=keys[None, None])
    policy = ShareRaaS(40, page_size=1)
    seen = policy.observe(torch.tensor([[[1.0, 0.0]]]), replace(view, now=view.now + 7), 1.0)
    assert seen.stamp.tolist() == [[[0, 8, -1, -1]]]


@pytest.mark.parametrize("share", [0, -1, 1.5, math.nan])
def test_a_share_is_above_0_and_at_most_1(share):
    with pytest.raises(SparsityError, match="share"):
        ShareRaaS(128, share=share)
