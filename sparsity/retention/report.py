"""What a cache holds, measured."""

from dataclasses import dataclass

from sparsity.html_table import html_table
from sparsity.policies.base import Policy


@dataclass(frozen=True)
class Report:
    """A measurement of a cache. Tuples have one entry for each layer of the model.

    Attributes:
        policy: of the cache.
        tokens_seen: columns that went through the model, padding included.
        tokens_kept: tokens held for one row and KV head, the most of any.
        evictions: tokens evicted so far, summed over rows and KV heads; 0 for layers that
            transformers manages.
        managed: whether the policy decides in this layer; False for layers that transformers
            manages itself (sliding windows, linear attention).
        num_bytes: bytes of all tensors of this cache now: keys, values, and what policies need
            (page minima and maxima, stamps, sums, last queries).
        peak_bytes: the most bytes of its own tensors at once: the layer that a forward of several
            tokens was passing through counts before it was pruned, and one whose places became
            more counts with the places it had.
        past_bytes: bytes of the keys and values handed over by `past=` for the layers that the
            policy decides in; in neither of the two above, since they are read and stay the other
            cache's. This one lets go of them, layer by layer, in its first forward: until then up
            to `peak_bytes` + `past_bytes` are in memory. 0 without `past`.
        decoding: how single tokens are decoded, and why so.
        prompt_attention: what computed the last forward of several tokens in the layers that the
            policy decides in: the model's own implementation, as in `attn_implementation`, or
            ``"sparsity (why)"`` where it cannot; both where layers differ. Empty before there was
            one.
    """

    policy: Policy
    tokens_seen: int
    tokens_kept: tuple[int, ...]
    evictions: tuple[int, ...]
    managed: tuple[bool, ...]
    num_bytes: int
    peak_bytes: int
    past_bytes: int = 0
    decoding: str = ""
    prompt_attention: str = ""

    def _entries(self) -> list[tuple[str, str]]:
        """Names and texts, as the report is printed; what is of no layer has no name."""
        held = f"{self.num_bytes:,} bytes held, {self.peak_bytes:,} at the peak"
        if self.past_bytes:
            held += f", besides {self.past_bytes:,} of the cache it went on from"
        entries = [("", f"{self.tokens_seen:,} tokens seen"), ("", held)]
        if self.decoding:
            entries.append(("", f"single tokens are decoded {self.decoding}"))
        if self.prompt_attention:
            entries.append(("", f"the last prompt's attention by {self.prompt_attention}"))
        if not any(self.managed):
            entries.append(
                ("", "no layer has full attention: the policy decides nothing in this model")
            )
        runs: list[tuple[int, int, str]] = []
        for layer, kept in enumerate(self.tokens_kept):
            text = f"{kept:,} tokens kept, {self.evictions[layer]:,} evictions"
            text += "" if self.managed[layer] else " (not under the policy)"
            if runs and runs[-1][2] == text:
                runs[-1] = (runs[-1][0], layer, text)
            else:
                runs.append((layer, layer, text))
        for first, last, text in runs:
            name = f"layer {first}" if first == last else f"layers {first}-{last}"
            entries.append((name, text))
        return entries

    def __str__(self) -> str:
        """A few lines for people."""
        lines = (f"  {name}: {text}" if name else text for name, text in self._entries())
        return "\n".join([f"{self.policy}", *lines])

    def _repr_html_(self) -> str:
        return html_table(f"{self.policy}", self._entries())
