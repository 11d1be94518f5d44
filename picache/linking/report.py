"""What linking did and what it cost."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape


@dataclass(frozen=True)
class LinkReport:
    """Counts and measured seconds of one link, or their sums over the rows of a batch.

    Attributes:
        method: the link method, as its ``repr``.
        tokens_total: tokens of the prompt.
        tokens_recomputed_per_layer: for each layer, the tokens that went through it, those of the
            query included.
        bytes_loaded: bytes of keys and values copied into the prompt.
        chunk_hits: for each chunk in prompt order, whether the store had it. A chunk that had been
            evicted, or was found damaged, was compiled again.
        flops: floating-point operations of the link, estimated; what the method measured before it
            chose is included.
        flops_full_prefill: the same estimate for a full prefill of the prompt.
        seconds: what each part took:

            - "look_up": finding the chunks in the store;
            - "compile": compiling chunks it did not have, and a query that is compiled alone;
            - "load": copying KV into the prompt;
            - "rotate": moving keys to their positions;
            - "choose": what the method measured;
            - "capture": capturing a pass of a size that was not captured before (`PIC.warm_up`);
            - "recompute": the chosen tokens; on a CUDA device with queueing the next layer's loads;
            - "first_token": the whole of `PIC.link`, which ends with the logits of the first new
              token (`generate` runs the last token once more, to sample from it itself).

            With chunks off the device, loading overlaps with recomputing, so that the parts may add
            up to more than the whole. Each row of a batch has its share of what was done for all
            of them at once.
        full_prefill: why the prompt was prefilled in full instead of linked; empty when it was
            linked.
        store_failures: what the store failed at meanwhile and how often, by kind, such as "disk
            read: TimeoutError". Such a chunk was compiled, or was not written; nothing else
            happened. Of a batch it is in the first row's report.
        dropped: for each chunk in prompt order, and last for the query, the ids of special tokens
            that came with it and are not in the prompt: a BOS in the middle, an EOS, a second BOS.
            In a batch, row after row.
        seams: for each place where two texts of the prompt meet, in order, whether the joined text
            would have other tokens there (`PIC.cut` gives those); None where token ids were given.
            In a batch, row after row.
        recompute_pass: how the chosen tokens were recomputed: "captured" as a CUDA graph, of how
            many rows, or "eager", and why; empty for a full prefill.
    """

    method: str
    tokens_total: int
    tokens_recomputed_per_layer: tuple[int, ...]
    bytes_loaded: int
    chunk_hits: tuple[bool, ...]
    flops: float
    flops_full_prefill: float
    seconds: dict[str, float] = field(default_factory=dict)
    full_prefill: str = ""
    store_failures: dict[str, int] = field(default_factory=dict)
    dropped: tuple[tuple[int, ...], ...] = ()
    seams: tuple[bool | None, ...] = ()
    recompute_pass: str = ""

    @property
    def tokens_recomputed(self) -> int:
        """Tokens that went through a layer, the query included: the mean over layers, rounded."""
        per_layer = self.tokens_recomputed_per_layer
        return round(sum(per_layer) / len(per_layer))

    @property
    def tokens_reused(self) -> int:
        """Tokens whose KV was reused as compiled: the mean over layers, rounded."""
        return self.tokens_total - self.tokens_recomputed

    @property
    def reuse_ratio(self) -> float:
        """Share of the prompt's tokens that were reused."""
        return self.tokens_reused / self.tokens_total

    @property
    def hits(self) -> int:
        """How many chunks were found in the store."""
        return sum(self.chunk_hits)

    @property
    def misses(self) -> int:
        """How many chunks were compiled again."""
        return len(self.chunk_hits) - self.hits

    def _entries(self) -> list[tuple[str, str]]:
        """Names and texts, as the report is printed."""
        per_layer = self.tokens_recomputed_per_layer
        recomputed = f"{self.tokens_recomputed} recomputed"
        if len(set(per_layer)) > 1:
            recomputed += f" (by layer: {_runs(per_layer)})"
        reused = f"{self.tokens_reused} reused ({self.reuse_ratio:.1%})"
        share = f"{self.flops / self.flops_full_prefill:.1%} of a full prefill (estimated)"
        found = f"{self.hits} hits, {self.misses} misses"
        if self.misses:
            missed = [str(i) for i, hit in enumerate(self.chunk_hits) if not hit]
            found += f" (chunks {', '.join(missed)})"
        entries = [
            ("tokens", f"{self.tokens_total}, {reused}, {recomputed}"),
            ("chunks", f"{found}, {self.bytes_loaded:,} bytes loaded"),
            ("compute", f"{self.flops:.2e} floating-point operations, {share}"),
            ("milliseconds", "  ".join(f"{n} {1e3 * s:.1f}" for n, s in self.seconds.items())),
        ]
        left_out = [str(token) for tokens in self.dropped for token in tokens]
        if left_out:
            entries.insert(
                1, ("left out", f"{len(left_out)} special tokens ({', '.join(left_out)})")
            )
        if changed := sum(map(bool, self.seams)):
            known = sum(seam is not None for seam in self.seams)
            text = f"{changed} of {known} have other tokens than the joined text (see PIC.cut)"
            entries.insert(1, ("seams", text))
        if self.recompute_pass:
            entries.append(("recomputed", self.recompute_pass))
        if self.full_prefill:
            entries.insert(0, ("full prefill", self.full_prefill))
        if self.store_failures:
            seen = (f"{kind} ({count})" for kind, count in self.store_failures.items())
            entries.append(("store failures", ", ".join(seen)))
        return entries

    def __str__(self) -> str:
        return "\n".join([self.method, *(f"  {name}: {text}" for name, text in self._entries())])

    def _repr_html_(self) -> str:
        left = 'style="text-align: left"'  # a notebook sets tables to the right
        rows = (
            f"<tr><th {left}>{escape(name)}</th><td {left}>{escape(text)}</td></tr>"
            for name, text in self._entries()
        )
        return f"<table><caption>{escape(self.method)}</caption>{''.join(rows)}</table>"


def _runs(counts: tuple[int, ...]) -> str:
    """Counts by layer, with equal neighbours written once: ``0-1: 244, 2-3: 36``."""
    starts = [i for i, n in enumerate(counts) if not i or n != counts[i - 1]]
    ends = [*(start - 1 for start in starts[1:]), len(counts) - 1]
    return ", ".join(
        f"{start}: {counts[start]}" if start == end else f"{start}-{end}: {counts[start]}"
        for start, end in zip(starts, ends, strict=True)
    )


def total(reports: Iterable[LinkReport], seconds: float) -> LinkReport:
    """The sums over the rows of a batch.

    Args:
        reports: one for each row.
        seconds: what linking all of them took.
    """
    rows = list(reports)
    per_layer = zip(*(r.tokens_recomputed_per_layer for r in rows), strict=True)
    reasons = [r.full_prefill for r in rows if r.full_prefill]
    return LinkReport(
        method=rows[0].method,
        tokens_total=sum(r.tokens_total for r in rows),
        tokens_recomputed_per_layer=tuple(sum(counts) for counts in per_layer),
        bytes_loaded=sum(r.bytes_loaded for r in rows),
        chunk_hits=tuple(hit for r in rows for hit in r.chunk_hits),
        flops=sum(r.flops for r in rows),
        flops_full_prefill=sum(r.flops_full_prefill for r in rows),
        seconds={name: sum(r.seconds[name] for r in rows) for name in rows[0].seconds}
        | {"first_token": seconds},
        dropped=tuple(tokens for r in rows for tokens in r.dropped),
        seams=tuple(seam for r in rows for seam in r.seams),
        full_prefill=f"{len(reasons)} of {len(rows)} rows: {reasons[0]}" if reasons else "",
        recompute_pass="; ".join(dict.fromkeys(r.recompute_pass for r in rows if r.recompute_pass)),
        store_failures=dict(sum((Counter(r.store_failures) for r in rows), Counter())),
    )
