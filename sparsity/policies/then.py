"""One policy for the prompt, another one while decoding."""

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from typing_extensions import override

from sparsity.errors import SparsityError
from sparsity.policies.base import Needs, PageView, Policy
from sparsity.policies.snapkv import SnapKV


@dataclass(frozen=True)
class Then(Policy):
    """Compress what arrives several tokens at a time as `prompt` does; decode as `decode` does.

    ``Then(SnapKV(512, page_size=16), RaaS(1024))``: at the end of a prompt SnapKV (arXiv
    2404.14469) leaves 512 tokens of it, and RaaS (arXiv 2502.11147) goes on from those. A later
    turn compresses all that is held by then once more. Where `decode` pins prompts, what `prompt`
    leaves is pinned until the next turn; it always fits.

    Both decide over the same pages, so that their page sizes and dense layers must be the same, and
    `group` where both use attention weights. `budget` and the other attributes of a `Policy` are
    those of `decode`.

    Args:
        prompt: `SnapKV`, or `PyramidKV` (whose pages have one token), without `evict_every`.
        decode: any policy but `Then`.

    Raises:
        SparsityError: for two policies that do not fit together: page sizes, dense layers, groups
            or windows that differ, a `prompt` that leaves more than `decode` has room for, and
            positions inside the cache (`StreamingLLM`).
    """

    prompt: SnapKV
    decode: Policy
    budget: int | None = field(init=False, repr=False, compare=False)
    page_size: int = field(init=False, repr=False, compare=False)
    dense_layers: int = field(init=False, repr=False, compare=False)
    pin_prompt: bool = field(default=False, init=False, repr=False, compare=False)
    pins_count: bool = field(init=False, repr=False, compare=False)
    pins_kept: bool = field(init=False, repr=False, compare=False)
    evict_every: int | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        prompt, decode = self.prompt, self.decode
        if not isinstance(prompt, SnapKV) or not isinstance(decode, Policy):
            raise SparsityError(
                f"Then(prompt={prompt!r}, decode={decode!r}): expected SnapKV or PyramidKV for the "
                "prompt, and a policy such as RaaS(budget=1024) to decode with"
            )
        if isinstance(decode, Then) or prompt.evict_every is not None:
            raise SparsityError(
                f"{self}: `prompt` decides at the end of prompts only, `decode` while decoding; "
                "use SnapKV without evict_every, and one plain policy for `decode`"
            )
        if decode.needs.moved:
            raise SparsityError(
                f"Then(decode={decode}): what `prompt` leaves has holes of its own, and positions "
                "inside the cache would have to close those too; use positions='absolute'"
            )
        for name in ("page_size", "dense_layers"):
            if getattr(prompt, name) != getattr(decode, name):
                raise SparsityError(
                    f"Then: {name}={getattr(prompt, name)} of {type(prompt).__name__} and "
                    f"{name}={getattr(decode, name)} of {type(decode).__name__} differ, and both "
                    f"decide over the same pages of the same layers; give both the same {name}"
                )
            object.__setattr__(self, name, getattr(decode, name))
        taken = {
            "budget": decode.budget,
            "pins_count": decode.pins_count,
            "pins_kept": decode.pin_prompt,
            "evict_every": decode.evict_every if decode.evicts else None,
        }
        for name, value in taken.items():
            object.__setattr__(self, name, value)
        mine, other = prompt.needs, decode.needs
        if (other.attention or other.window) and other.group != mine.group:
            raise SparsityError(
                f"Then: group={mine.group!r} of {type(prompt).__name__} and group={other.group!r} "
                f"of {type(decode).__name__} differ; give both the same group"
            )
        if other.window not in (0, mine.window):
            raise SparsityError(
                f"Then: window={mine.window} of {type(prompt).__name__} and window={other.window} "
                f"of {type(decode).__name__} differ, and the last queries are kept once; give both "
                "the same window"
            )
        room = (decode.pages_kept or 0) - (1 if decode.pin_prompt else 0)
        if decode.evicts and decode.pins_count and prompt.budget // prompt.page_size > room:
            raise SparsityError(
                f"Then: {type(prompt).__name__} leaves {prompt.budget} tokens, and "
                f"{type(decode).__name__}(budget={decode.budget}, pin_prompt={decode.pin_prompt}) "
                f"has room for {max(0, room * prompt.page_size)}; lower the first budget or raise "
                "the second"
            )

    @property
    @override
    def evicts(self) -> bool:
        return True

    @property
    @override
    def needs(self) -> Needs:
        return replace(self.decode.needs, window=self.prompt.window, group=self.prompt.group)

    @property
    def shared_heads(self) -> bool:
        """Whether either policy decides once for all KV heads of a layer."""
        return self.prompt.shared_heads or getattr(self.decode, "shared_heads", False)

    @property
    @override
    def pages_kept(self) -> int | None:
        return self.prompt.pages_kept

    @property
    @override
    def pages_held(self) -> int | None:
        return self.decode.pages_held

    @property
    @override
    def keeps_sinks(self) -> bool:
        return self.prompt.keeps_sinks and self.decode.keeps_sinks

    @property
    @override
    def decoding(self) -> Policy:
        return self.decode

    @override
    def at_layer(self, layer: int, layers: int) -> "Then":
        prompt: Any = self.prompt.at_layer(layer, layers)
        return replace(self, prompt=prompt, decode=self.decode.at_layer(layer, layers))

    @override
    def priority(self, pages: PageView) -> Tensor:
        """That of `prompt`: this policy evicts at the end of a prompt, `decoding` later."""
        return self.prompt.priority(pages)

    @override
    def tie(self, pages: PageView) -> Tensor | None:
        """That of `prompt`, as `priority`."""
        return self.prompt.tie(pages)

    @override
    def observe(self, query: Tensor, pages: PageView, scaling: float) -> PageView:
        """That of `decode`, in forwards of several tokens too."""
        return self.decode.observe(query, pages, scaling)

    @override
    def select(self, query: Tensor, pages: PageView) -> Tensor | None:
        return self.decode.select(query, pages)
