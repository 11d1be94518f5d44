"""Tests of memory of fixed size share: caches, `generate` compiled on a CPU, what is held."""

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
    """Of each row and head: the columns held, by page, with what the policy notes."""
    pool = cache.retentions[layer].pool
    found = []
    for b in range(pool.start.shape[0]):
        for h in range(pool.start.shape[1]):
            slots = pool.slots[b, h].unflatten(0, (-1, pool.size)).tolist()
            stamps, pins = pool.stamp[b, h].tolist(), pool.pinned[b, h].tolist()
            sums = [[round(x, 3) for x in page] for page in pool.sums[b, h].tolist()]
            pages = zip(pool.start[b, h].tolist(), slots, stamps, pins, sums, strict=True)
            found.append(sorted(page for page in pages if page[0] >= 0))
    return found
