"""Slow, obvious twins: one row, one KV head, every token kept, all decisions taken from scratch."""

import math

import torch

from sparsity import Quest, RaaS, Random, StreamingLLM


def simulate(policy, layer, head, keys, forwards, scaling):
    """Run a whole history of forwards and say what stays.

    keys: `[tokens, head_dim]`, all of them. forwards: `(first, stop, query)` with the ranks of the
    new tokens and the newest one's query `[group, head_dim]`. Returns the ranks the last forward
    attends to (those before its own tokens included) and the ranks kept after it.
    """
    size = policy.page_size
    limit = policy.budget // size if policy.evicts else None
    pages = {}  # start -> [stamp, pinned]
    attended = set()
    for first, stop, query in forwards:
        if stop == first:
            continue
        now = stop - 1
        if stop - first == 1 and first > 0:
            if first % size == 0:
                if limit is not None and len(pages) == limit:
                    evict(policy, pages, layer, head, now)
                pages[first] = [first, False]
            chosen = selected(policy, pages, keys[:stop], query)
            attended = tokens_of(chosen, size, stop)
            observe(policy, pages, keys[:stop], query, now, scaling)
        else:
            attended = tokens_of(pages, size, first) | set(range(first, stop))
            for rank in range(first, stop):
                page = pages.setdefault(rank // size * size, [rank // size * size, False])
                page[1] = page[1] or policy.pin_prompt
            observe(policy, pages, keys[:stop], query, now, scaling)
            while limit is not None and len(pages) > limit:
                evict(policy, pages, layer, head, now, newest=max(pages))
    return attended, tokens_of(pages, size, forwards[-1][1])


def tokens_of(starts, size, stop):
    return {rank for start in starts for rank in range(start, min(start + size, stop))}


def evict(policy, pages, layer, head, now, newest=None):
    worth = {
        start: (worth_of(policy, start, page[0], layer, head, now), start)
        for start, page in pages.items()
        if not page[1] and start != newest
    }
    del pages[min(worth, key=worth.get)]


def worth_of(policy, start, stamp, layer, head, now):
    if isinstance(policy, StreamingLLM):
        return math.inf if start < policy.sinks else start
    if isinstance(policy, RaaS):
        return stamp
    assert isinstance(policy, Random)
    if start > now - policy.recent:
        return 1 + start
    bits = mix(mix(policy.seed * 0x9E3779B1 + layer) + head)
    return (mix(mix(bits ^ start) ^ now) >> 8) / 2**24


def mix(bits):
    bits %= 2**32
    bits = (bits ^ bits >> 16) * 0x85EBCA6B % 2**32
    bits = (bits ^ bits >> 13) * 0xC2B2AE35 % 2**32
    return bits ^ bits >> 16


def bound(policy, start, keys, query):
    page = keys[start : start + policy.page_size]
    low, high = page.min(0).values, page.max(0).values
    bounds = [torch.maximum(q * low, q * high).sum().item() for q in query]
    return max(bounds) if policy.group == "max" else sum(bounds) / len(bounds)


def selected(policy, pages, keys, query):
    if not isinstance(policy, Quest):
        return set(pages)
    current = max(pages)
    others = sorted(
        (start for start in pages if start != current),
        key=lambda start: bound(policy, start, keys, query),
    )
    count = policy.budget // policy.page_size - 1
    return {current, *others[len(others) - min(count, len(others)) :]}


def observe(policy, pages, keys, query, now, scaling):
    if not isinstance(policy, RaaS):
        return
    starts = sorted(pages)
    scores = [bound(policy, start, keys, query) * scaling for start in starts]
    if policy.top_ratio is None:
        shares = torch.tensor(scores).softmax(0).tolist()
        fresh = [start for start, share in zip(starts, shares, strict=True) if share > policy.alpha]
    else:
        count = max(1, math.floor(len(starts) * policy.top_ratio))
        order = sorted(zip(scores, starts, strict=True), reverse=True)
        fresh = [start for _, start in order[:count]]
    for start in fresh:
        pages[start][0] = now
