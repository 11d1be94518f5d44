"""What the test files of sparsity share: padded batches, forwards by hand, models left alone."""

from contextlib import contextmanager

import torch

from sparsity.retention.batch_rows import BatchRows, plan
from sparsity.retention.layer import LayerRetention
from sparsity.retention.lazy_mask import LazyMask
from tests.helpers import random_ids


def padded_ids(length, *pads):
    """Ids `[rows, length]`, a row for each of `pads`, and True for those that are no padding."""
    ids = random_ids(length, len(pads))
    padding = torch.ones_like(ids, dtype=torch.bool)
    for b, pad in enumerate(pads):
        padding[b, :pad] = False
    return ids, padding


def padded_inputs(length, *pads):
    """The same as arguments of `generate`."""
    ids, padding = padded_ids(length, *pads)
    return {"input_ids": ids, "attention_mask": padding.long()}


def run(model, cache, ids, padding, widths, positions=None):
    """Logits of the last column of each forward, `widths` columns in each.

    positions: one for all tokens; None for those of the text.
    """
    logits, first = [], 0
    for width in widths:
        stop = first + width
        mask = padding[:, :stop].long()
        ranks = (mask.cumsum(-1) - 1).clamp(min=0)[:, first:]
        with torch.no_grad():
            out = model(
                input_ids=ids[:, first:stop],
                attention_mask=mask,
                position_ids=ranks if positions is None else torch.full_like(ranks, positions),
                past_key_values=cache,
            )
        logits.append(out.logits[:, -1])
        first = stop
    return torch.stack(logits, 1)


def causal_mask(padding=None):
    """What transformers masks in plain causal attention."""
    return LazyMask(None, padding, False, lambda: None)


class DrivenLayer:
    """One layer under a policy, driven forward by forward without a model."""

    def __init__(self, policy, layer=0, scaling=1.0, move=None):
        self.policy, self.scaling, self.rows = policy, scaling, BatchRows()
        self.retention = LayerRetention(policy, layer)
        self.retention.move = move

    @property
    def pool(self):
        return self.retention.pool

    def forward(self, query, key, value, mask=None):
        """The output, and the step: new tokens of each row, as `LayerRetention.attend` takes them.

        mask: True for real tokens, `[batch, columns so far]`; None when all are.
        """
        batch, _, width, _ = query.shape
        step = plan(self.rows, self.policy, batch, width, mask, query.device)
        out = self.retention.attend(query, key, value, step, causal_mask(mask), self.scaling)
        self.rows = step.then
        return out, step


@contextmanager
def left_as_it_was(model):
    """What is done in the block leaves the model's attention and its decoder's hooks alone."""
    decoder = model.get_decoder()
    before = model.config._attn_implementation
    yield
    assert model.config._attn_implementation == before
    assert not decoder._forward_pre_hooks
    assert not decoder._forward_hooks
