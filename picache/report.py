"""What linking did and what it cost."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LinkReport:
    """Counts and measured seconds of one link, or the sums over a batch.

    Attributes:
        method: the link method, as written.
        tokens_total: tokens of the prompt.
        tokens_reused: tokens whose KV was taken as compiled.
        tokens_recomputed: tokens that went through the layers, the query included.
        bytes_loaded: bytes of KV copied into the prompt.
        hits: chunks found in the store.
        misses: chunks that had been evicted and were compiled again.
        seconds: "compile" (misses only), "load" (copy into the prompt), "rotate", "recompute", and
            "first_token": the whole of `PIC.link`, which ends with the logits of the first new
            token (`generate` runs the last token once more, to sample from it itself).
    """

    method: str
    tokens_total: int
    tokens_reused: int
    tokens_recomputed: int
    bytes_loaded: int
    hits: int
    misses: int
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def reuse_ratio(self) -> float:
        """Share of the prompt's tokens that were reused."""
        return self.tokens_reused / self.tokens_total

    def __str__(self) -> str:
        parts = "  ".join(f"{name} {1e3 * value:.1f}" for name, value in self.seconds.items())
        return (
            f"{self.method}: {self.tokens_total} tokens, {self.tokens_reused} reused "
            f"({self.reuse_ratio:.1%}), {self.tokens_recomputed} recomputed\n"
            f"chunks: {self.hits} hits, {self.misses} misses, {self.bytes_loaded:,} bytes loaded\n"
            f"milliseconds: {parts}"
        )


def total(reports: Iterable[LinkReport], seconds: float) -> LinkReport:
    """The sums over the rows of a batch; `seconds` is what linking all of them took."""
    rows = list(reports)
    return LinkReport(
        method=rows[0].method,
        tokens_total=sum(r.tokens_total for r in rows),
        tokens_reused=sum(r.tokens_reused for r in rows),
        tokens_recomputed=sum(r.tokens_recomputed for r in rows),
        bytes_loaded=sum(r.bytes_loaded for r in rows),
        hits=sum(r.hits for r in rows),
        misses=sum(r.misses for r in rows),
        seconds={name: sum(r.seconds[name] for r in rows) for name in rows[0].seconds}
        | {"first_token": seconds},
    )
