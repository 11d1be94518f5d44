"""Slow, obvious twins: one row, every token kept, all decisions taken from scratch."""

import math
from dataclasses import dataclass

import numpy
import torch

from sparsity import (
    H2O,
    RKV,
    TOVA,
    LazyEviction,
    Quest,
    QuestRaaS,
    RaaS,
    Random,
    ShareRaaS,
    SnapKV,
    StreamingLLM,
    Then,
    VaSE,
)


@dataclass
class Page:
    stamp: int
    pinned: bool = False
    total: float = 0.0
    score: float = 0.0  # what decides between pages of the same worth


class Twin:
    """What one row of one layer keeps, forward by forward.

    keys, values: `[heads, tokens, head_dim]`, all of them so far. queries: of the new tokens,
    `[query heads, stop - first, head_dim]`. Ranks are numbers of real tokens of the row. single:
    whether the forward brings one column to a batch that has begun.
    """

    def __init__(self, policy, layer, heads, scaling):
        self.both = policy if isinstance(policy, Then) else None
        self.policy, self.layer, self.scaling = policy, layer, scaling
        self.pages = [{} for _ in range(heads)]  # of each head: start -> Page
        self.queries = []  # by rank, `[heads, group, head_dim]`
        self.attended = self.kept = [set() for _ in range(heads)]

    def forward(self, keys, values, queries, first, stop, single):
        """The ranks each head attends to (a query: those up to its own) and what it keeps."""
        if stop > first:
            self.keys, self.values = keys, values
            if self.both:
                self.policy = self.both.decode
            new = queries.unflatten(0, (len(self.pages), -1)).transpose(1, 2)
            if single:
                self.one(first, new[:, 0])
            else:
                self.several(first, stop, new)
            self.kept = [self.tokens(pages, stop) for pages in self.pages]
        return self.attended, self.kept

    def one(self, rank, query):
        policy, size = self.policy, self.policy.page_size
        if rank % size == 0:
            if policy.evicts and policy.evict_every is not None:
                kept = policy.budget // size
                if self.counted() == kept + math.ceil(policy.evict_every / size) - 1:
                    self.evict(kept - 1, rank)
            for pages in self.pages:
                pages[rank] = Page(stamp=rank)
        self.queries.append(query)
        self.attended = [
            self.tokens(self.selected(head, query[head], rank), rank + 1)
            for head in range(len(self.pages))
        ]
        self.observe(rank, [rank], [self.tokens(pages, rank + 1) for pages in self.pages])

    def several(self, first, stop, new):
        policy, size = self.policy, self.policy.page_size
        self.attended = [
            self.tokens(pages, first) | set(range(first, stop)) for pages in self.pages
        ]
        for rank in range(first, stop):
            for pages in self.pages:
                start = rank // size * size
                pages.setdefault(start, Page(stamp=start)).pinned |= policy.pin_prompt
            self.queries.append(new[:, rank - first])
        self.observe(stop - 1, range(first, stop), self.attended)
        if self.both:  # all that is held is compressed, and pinned after that
            self.policy = policy = self.both.prompt
            for page in (page for pages in self.pages for page in pages.values()):
                page.pinned = False
        if policy.evicts:
            self.evict(policy.budget // size, stop - 1, spare=(stop - 1) // size * size)
        if self.both:
            for page in (page for pages in self.pages for page in pages.values()):
                page.pinned = self.both.decode.pin_prompt

    def tokens(self, starts, stop):
        size = self.policy.page_size
        return {rank for start in starts for rank in range(start, min(start + size, stop))}

    def counted(self):
        pins = self.policy.pins_count
        return len([page for page in self.pages[0].values() if pins or not page.pinned])

    def evict(self, count, now, spare=None):
        """Drop pages of each head until `count` of those that count are left."""
        policy, surplus = self.policy, self.counted() - count
        if surplus <= 0:
            return
        worth = [self.worth(head, now) for head in range(len(self.pages))]
        if getattr(policy, "shared_heads", False):
            mean = {s: sum(w[s] for w in worth) / len(worth) for s in worth[0]}
            worth = [mean] * len(worth)
        scores = [{start: page.score for start, page in pages.items()} for pages in self.pages]
        if getattr(policy, "shared_heads", False):
            mean = {s: sum(w[s] for w in scores) / len(scores) for s in scores[0]}
            scores = [mean] * len(scores)
        for head, pages in enumerate(self.pages):
            order = []
            for start, page in pages.items():
                protected = start < policy.sinks
                protected |= start + policy.page_size - 1 > now - policy.recent_kept
                value = math.inf if protected else float(numpy.float32(worth[head][start]))
                if not page.pinned and start != spare:
                    score = 0.0 if protected else twelve_bits(scores[head][start])
                    order.append((value, score, start))
            for _, _, start in sorted(order)[:surplus]:
                del pages[start]

    def weights(self, head, query, ranks):
        """Attention of `[group, head_dim]` over sorted ranks, reduced over the group."""
        ranks = sorted(ranks)
        weights = (query @ self.keys[head, ranks].T * self.scaling).softmax(-1)
        weights = weights.amax(0) if self.policy.group == "max" else weights.mean(0)
        return dict(zip(ranks, weights.tolist(), strict=True))

    def by_page(self, weights):
        size, totals = self.policy.page_size, {}
        for rank, weight in weights.items():
            start = rank // size * size
            totals[start] = totals.get(start, 0.0) + weight
        return totals

    def observe(self, now, asked, held):
        """held: the ranks the forward attended to, by head."""
        policy = self.policy
        for head, pages in enumerate(self.pages):
            newest = self.queries[now][head]
            if isinstance(policy, RaaS):
                for start in self.refreshed(pages, head, newest, now):
                    pages[start].stamp = now
                if policy.ties == "score":
                    for start, share in self.shares(pages, head, newest, now).items():
                        pages[start].score = share
            elif isinstance(policy, H2O):
                for rank in asked:
                    seen = {r for r in held[head] if r <= rank}
                    weights = self.weights(head, self.queries[rank][head], seen)
                    for start, weight in self.by_page(weights).items():
                        pages[start].total += weight
            elif isinstance(policy, TOVA | LazyEviction):
                weights = self.weights(head, newest, held[head])
                for start, weight in self.by_page(weights).items():
                    if getattr(policy, "ties", "age") == "score":
                        pages[start].score = weight
                    if isinstance(policy, TOVA):
                        pages[start].total = weight
                    elif weight > policy.alpha:
                        pages[start].total = max(pages[start].total, now - pages[start].stamp)
                        pages[start].stamp = now

    def worth(self, head, now):
        """Of each page of a head, nothing protected yet."""
        policy, pages = self.policy, self.pages[head]
        if isinstance(policy, StreamingLLM):
            return {start: start for start in pages}
        if isinstance(policy, RaaS):
            return {start: page.stamp for start, page in pages.items()}
        if isinstance(policy, Random):
            return {start: self.draw(head, start, now) for start in pages}
        if isinstance(policy, H2O) and policy.normalise == "age":
            return {start: page.total / (now - start + 1) for start, page in pages.items()}
        if isinstance(policy, H2O | TOVA):
            return {start: page.total for start, page in pages.items()}
        if isinstance(policy, LazyEviction):
            return {start: recurrence(now - p.stamp, p.total) for start, p in pages.items()}
        importance = self.importance(head, now)
        if isinstance(policy, SnapKV):
            return importance
        if isinstance(policy, RKV):
            redundancy = self.redundancy(head)
            return {r: policy.mix * importance[r] - (1 - policy.mix) * redundancy[r] for r in pages}
        assert isinstance(policy, VaSE)
        span = {r: (self.values[head, r].max() - self.values[head, r].min()).item() for r in pages}
        span = {r: twelve_bits(wide) for r, wide in span.items()}
        free = [r for r in pages if policy.sinks <= r <= now - policy.recent_kept]
        large = sorted(free, key=lambda r: (span[r], r), reverse=True)[: policy.large_kept]
        worth = {}
        for rank, chance in importance.items():
            noise = -math.log(-math.log(self.draw(head, rank, now) + 2**-25))
            worth[rank] = math.log(chance) + noise if chance > 0 else -math.inf
        return worth | dict.fromkeys(large, math.inf)

    def importance(self, head, now):
        policy, ranks = self.policy, sorted(self.tokens(self.pages[head], now + 1))
        total = dict.fromkeys(ranks, 0.0)
        for asked in range(max(0, len(self.queries) - policy.window), len(self.queries)):
            seen = [rank for rank in ranks if rank <= asked]
            if seen:
                weights = self.weights(head, self.queries[asked][head], seen)
                for rank, weight in weights.items():
                    total[rank] += weight / policy.window
        line = [0.0 if rank > now - policy.recent_kept else total[rank] for rank in ranks]
        reach = policy.kernel // 2
        line = [0.0] * reach + line + [0.0] * reach
        near = [line[i : i + policy.kernel] for i in range(len(ranks))]
        if isinstance(policy, RKV) or getattr(policy, "pooling", "mean") == "max":
            near = [max(window) for window in near]
        else:
            near = [sum(window) / policy.kernel for window in near]
        return self.by_page(dict(zip(ranks, near, strict=True)))

    def redundancy(self, head):
        ranks = sorted(self.pages[head])
        unit = {r: k / (k.norm() or 1) for r, k in zip(ranks, self.keys[head, ranks], strict=True)}
        total = dict.fromkeys(ranks, 0.0)
        for one in ranks:
            similar = {r: (unit[one] @ unit[r]).item() for r in ranks if r != one}
            close = [r for r, cosine in similar.items() if cosine > self.policy.threshold]
            for other, cosine in similar.items():
                if not close or other != max(close):
                    total[other] += cosine
        means = torch.tensor([total[r] / len(ranks) for r in ranks], dtype=torch.float64)
        return dict(zip(ranks, means.softmax(0).tolist(), strict=True))

    def draw(self, head, start, now):
        bits = mix(mix(self.policy.seed * 0x9E3779B1 + self.layer) + head)
        return (mix(mix(bits ^ start) ^ now) >> 8) / 2**24

    def score(self, start, head, query, now):
        page = self.keys[head, start : min(start + self.policy.page_size, now + 1)]
        if getattr(self.policy, "score", "bound") == "exact":
            scores = [(page @ q).max().item() for q in query]
        else:
            low, high = page.min(0).values, page.max(0).values
            scores = [torch.maximum(q * low, q * high).sum().item() for q in query]
        return max(scores) if self.policy.group == "max" else sum(scores) / len(scores)

    def selected(self, head, query, now):
        policy, pages = self.policy, self.pages[head]
        size = policy.page_size
        if isinstance(policy, QuestRaaS):
            always = {s for s, page in pages.items() if not page.pinned} | {max(pages)}
            count = policy.prompt_budget // size + policy.pages_held
        elif isinstance(policy, Quest) or getattr(policy, "attend", "all") == "top":
            always, share = {max(pages)}, 1.0
            if isinstance(policy, RaaS):
                share = 0.5 if policy.top_ratio is None else policy.top_ratio
            count = max(1, math.floor(policy.budget // size * share))
        else:
            return set(pages)
        others = sorted(set(pages) - always, key=lambda s: self.score(s, head, query, now))
        return always | set(others[max(0, len(others) - (count - len(always))) :])

    def shares(self, pages, head, query, now):
        starts = sorted(pages)
        scores = [self.score(start, head, query, now) * self.scaling for start in starts]
        return dict(zip(starts, torch.tensor(scores).softmax(0).tolist(), strict=True))

    def refreshed(self, pages, head, query, now):
        policy, starts = self.policy, sorted(pages)
        if policy.top_ratio is None:
            shares = self.shares(pages, head, query, now)
            least = policy.threshold
            if isinstance(policy, ShareRaaS):
                least = (1 + 2**-10) * policy.share / len(pages)
            return [start for start, share in shares.items() if share > least]
        scores = [self.score(start, head, query, now) for start in starts]
        count = max(1, math.floor(len(starts) * policy.top_ratio))
        order = sorted(zip(scores, starts, strict=True), reverse=True)
        return [start for _, start in order[:count]]


def recurrence(silent, longest):
    if longest == 0:
        return 0.0
    return 2 / (1 + math.exp(1 + silent / longest)) + 2 / (1 + math.exp(longest - 1))


def twelve_bits(number):
    mantissa, exponent = math.frexp(number)
    return math.ldexp(round(mantissa * 2**12), exponent - 12)


def mix(bits):
    bits %= 2**32
    bits = (bits ^ bits >> 16) * 0x85EBCA6B % 2**32
    bits = (bits ^ bits >> 13) * 0xC2B2AE35 % 2**32
    return bits ^ bits >> 16
