"""Tests of memory of fixed size share: caches, `generate` compiled on a CPU, what is held."""

import torch
from transformers import CompileConfig

from sparsity import RaaS, SparseCache
from sparsity.hf import compiled_step
from tests.sparsity.helpers import padded_inputs

POLICY = RaaS(16, page_size=4, pin_prompt=False, alpha=0.15)
GREEDY = {"do_sample": False, "eos_token_id": None}


def compiles(backend="eager"):
    """What makes `generate` compile on a CPU, into one graph or not at all."""
    config = compiled_step.compile_config()
    config = CompileConfig(**vars(config) | {"backend": backend})
    if backend == "eager":
        config.options = {"guard_filter_fn": compiled_step.guards_kept}
    else:
        config.options = dict(config.options) | {"triton.cudagraphs": False}
    config._compile_all_devices = True
    return config


def generate(model, cache, tokens=40, rows=(7, 0), prompt=21, **kwargs):
    given = padded_inputs(prompt, *rows) | GREEDY | kwargs
    return model.generate(past_key_values=cache, max_new_tokens=tokens, **given)


def fixed(model, policy, **kwargs):
    return SparseCache(model, policy, static=True, **{"max_tokens": 400} | kwargs)


def held(cache, layer):
    """Of each row and head: the pages held, as columns, stamps and pins; and their sums."""
    pool = cache.retentions[layer].pool
    found = []
    for b in range(pool.start.shape[0]):
        for h in range(pool.start.shape[1]):
            start = pool.start[b, h].tolist()
            order = sorted(
                (at for at, first in enumerate(start) if first >= 0), key=start.__getitem__
            )
            slots = pool.slots[b, h].unflatten(0, (-1, pool.size))
            parts = [t[order].tolist() for t in (slots, pool.stamp[b, h], pool.pinned[b, h])]
            pages = list(zip([start[at] for at in order], *parts, strict=True))
            found.append((pages, pool.sums[b, h][order]))
    return found


def assert_same(one, other, tolerance=1e-4):
    """Of what `held` found: the same pages, and sums that differ by their rounding at most."""
    for (pages, sums), (others, their_sums) in zip(one, other, strict=True):
        assert pages == others
        torch.testing.assert_close(sums, their_sums, rtol=tolerance, atol=tolerance)
