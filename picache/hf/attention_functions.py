"""Attention as a model's layers call it, while a prompt is linked and behind one with APE.

Both have the signature of transformers' attention interface; `attention_switch` registers
them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from picache.errors import PICacheError
from picache.hf.attention import attention_mass, parallel_attention, scattered_attention
from picache.hf.sparse_pass import ScatterMask, under_way

_BLOCK_ROWS = 64
_REFUSED = ("position_bias", "indices")  # arguments that change scores in ways not known here

# What is attached to a model for decoding, by the id of its decoder's configuration: generation may
# run in another thread than the one that attached it.
attached: dict[int, "Attached"] = {}


@dataclass(frozen=True)
class Attached:
    """Attention behind chunks side by side, of one linked batch.

    Attributes:
        inside: which of the linked keys are side by side, bool ``[batch, tokens]``.
        lse_scale: factor on the log-sum-exp of their scores.
        lag: how far rotary positions lag behind the places of the tokens, int64 ``[batch]``.
    """

    inside: Tensor
    lse_scale: float
    lag: Tensor

    def repeats(self, batch: int, tokens: int) -> int:
        """How often the linked batch is repeated in one of `batch` rows and `tokens` keys.

        Raises:
            PICacheError: when that cannot be the linked prompt.
        """
        if batch % len(self.inside) or tokens < self.inside.shape[1]:
            raise PICacheError(
                f"a forward of {batch} rows over {tokens} keys inside `with prompt.attached():`, "
                f"which is for the linked batch of {len(self.inside)} and {self.inside.shape[1]} "
                "tokens alone: run it outside"
            )
        return batch // len(self.inside)


def rotary_positions(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of a decoder while attached: positions behind chunks side by side."""
    state, cache = attached[id(module.config)], kwargs.get("past_key_values")
    fed = kwargs.get("input_ids", args[0] if args else kwargs.get("inputs_embeds"))
    if cache is None or fed is None:
        raise PICacheError(
            "a forward without the prompt's cache inside `with prompt.attached():`: run it outside"
        )
    held = cache.get_seq_length()
    places = torch.arange(held, held + fed.shape[1], device=fed.device)
    lag = state.lag.repeat_interleave(state.repeats(fed.shape[0], held + fed.shape[1]))
    return args, kwargs | {"position_ids": places - lag[:, None]}


def scattered_mask(mask_function: Callable, **_: object) -> ScatterMask:
    """The mask of the pass under way, not made yet."""
    state = under_way()
    return ScatterMask(mask_function, state.positions, state.known)


def attend_scattered(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: ScatterMask,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The rows of the pass under way over the whole prompt's keys, causal by position."""
    state = under_way()
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise PICacheError(
                f"{type(module).__name__} changes its attention scores through {name!r}, which "
                "linking does not know: use a full prefill with this model"
            )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    positions, known = attention_mask.positions, attention_mask.known
    if state.parallel is not None:
        side_by_side, lse_scale = state.parallel
        if s_aux is not None:
            raise PICacheError(
                f"{type(module).__name__} attends with sinks, which chunks side by side (APE) do "
                "not go with: choose a method that places them in order"
            )
        everything = torch.arange(key.shape[2], device=key.device)
        inside = torch.zeros(1, key.shape[2], dtype=torch.bool, device=key.device)
        inside[:, side_by_side] = True
        out = torch.cat(
            [
                parallel_attention(
                    some,
                    key,
                    value,
                    attention_mask(at, everything)[None, None],
                    inside,
                    scaling,
                    lse_scale,
                    softcap,
                )
                for some, at in zip(
                    query.split(_BLOCK_ROWS, dim=2), positions.split(_BLOCK_ROWS), strict=True
                )
            ],
            dim=2,
        )
        return out.transpose(1, 2).contiguous(), None
    out = scattered_attention(
        query, key, value, positions, attention_mask, scaling, softcap, s_aux, known
    )
    if state.observe is not None:
        norms = value.norm(dim=-1, keepdim=True) if state.value_norm else None
        mass = attention_mass(query, key, positions, attention_mask, scaling, softcap, s_aux, norms)
        state.observe(state.layer, mass)
    return out.transpose(1, 2).contiguous(), None


def attend_parallel(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """While decoding behind chunks side by side; `attention_mask` is additive, 0 where allowed."""
    state = attached[id(module.config)]
    repeats = state.repeats(len(key), key.shape[2])  # beams, several sequences
    inside = state.inside.repeat_interleave(repeats, dim=0)
    inside = nn.functional.pad(inside, (0, key.shape[2] - inside.shape[1]))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    allowed = attention_mask == 0
    out = parallel_attention(query, key, value, allowed, inside, scaling, state.lse_scale, softcap)
    return out.transpose(1, 2).contiguous(), None
