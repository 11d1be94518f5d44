"""A prompt under a policy: the device computes on while the next layers are handed to it."""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparsity import RKV, Random, SparseCache
from sparsity.policies.base import Policy
from sparsity.retention import layer
from tests.helpers import random_ids
from tests.sparsity.zoo import SMALL, TIGHT

EVERY = [policy for policy in dict.fromkeys([*SMALL, *TIGHT]) if not isinstance(policy, RKV)]
"""R-KV looks for near-duplicates in blocks, and says that it waits."""


class Waits(TorchDispatchMode):
    """Counts the numbers that a layer's retention asks a tensor for, where a device would wait."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "equal.default")):
            frame = sys._getframe()
            while frame is not None and frame.f_code.co_filename != layer.__file__:
                frame = frame.f_back
            self.count += frame is not None
        return func(*args, **(kwargs or {}))


def waits(model, policy: Policy, ids, mask=None, *, static=False):
    cache = SparseCache(model, policy, static=static, max_tokens=ids.shape[1] + 8)
    given = {} if mask is None else {"attention_mask": mask}
    with torch.no_grad(), Waits() as counted:
        model(input_ids=ids, past_key_values=cache, **given)
    return counted.count


@pytest.mark.filterwarnings("ignore:.*attention sinks")
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("policy", EVERY, ids=str)
def test_rows_that_are_alike_are_taken_in_without_a_wait(policy, static, shallow):
    tokens = 17
    if policy.pin_prompt and policy.pins_count:
        tokens = min(tokens, policy.budget - 2 * policy.page_size)  # a prompt that can be pinned
    assert waits(shallow, policy, random_ids(tokens, 2), static=static) == 0


def test_padding_is_asked_for(shallow):
    """The count counts: how many pages a padded batch fills is on the device alone."""
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[0, :3] = 0
    policy = Random(8, recent=2, pin_prompt=False)
    assert waits(shallow, policy, random_ids(17, 2), mask) > 0
