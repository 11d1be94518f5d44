"""The two attention functions that a model's layers call in place of their own.

`attend_scattered` runs while a prompt is linked; `attend_parallel` while the model decodes behind a
prompt whose chunks stand side by side (APE). Both have the signature of transformers' attention
interface, where `attention_switch` registers them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from picache.errors import PICacheError
from picache.hf.attention import attend_blocks, attention_mass, parallel_attention
from picache.hf.sparse_pass import (
    CHANGED_MEANWHILE,
    ScatterMask,
    refuse_unknown_scores,
    under_way,
)

_BLOCK_QUERIES = 64

# What is attached to each model for decoding, by the id of the model's configuration. No context
# variable: `generate` may run in another thread than the one that attached the prompt.
attached: dict[int, "Attached"] = {}


@dataclass(frozen=True)
class Attached:
    """What decoding behind one linked batch of chunks side by side must know.

    Attributes:
        inside: which tokens of the prompt belong to chunks side by side, bool ``[batch, tokens]``.
        lse_scale: factor on the log-sum-exp of the scores on them.
        lag: by how much the rotary position of a new token is smaller than the number of tokens
            before it, padding included, int64 ``[batch]``: chunks side by side share positions.
    """

    inside: Tensor
    lse_scale: float
    lag: Tensor

    def repeats(self, batch: int, tokens: int) -> int:
        """How often each row of the linked batch is repeated in the batch of a forward.

        Beam search and ``num_return_sequences`` repeat the rows.

        Args:
            batch: rows of the forward.
            tokens: keys each of them attends to, the new ones included.

        Raises:
            PICacheError: when the forward cannot be behind the linked prompt.
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
    """Set the rotary positions of new tokens: a forward pre-hook of the decoder while attached."""
    prompt, cache = attached[id(module.config)], kwargs.get("past_key_values")
    fed = kwargs.get("input_ids", args[0] if args else kwargs.get("inputs_embeds"))
    if cache is None or fed is None:
        raise PICacheError(
            "a forward without the prompt's cache inside `with prompt.attached():`: run it outside"
        )
    held = cache.get_seq_length()
    columns = torch.arange(held, held + fed.shape[1], device=fed.device)
    lag = prompt.lag.repeat_interleave(prompt.repeats(fed.shape[0], held + fed.shape[1]))
    return args, kwargs | {"position_ids": columns - lag[:, None]}


def scattered_mask(mask_function: Callable, **_: object) -> ScatterMask:
    """The attention mask of the sparse pass that is running, as a function of positions."""
    running = under_way()
    return ScatterMask(mask_function, running.positions, running.positions_on_cpu)


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
    """Attention of the recomputed tokens over the whole prompt's keys, causal by position."""
    mask, running = attention_mask, under_way()
    if not isinstance(mask, ScatterMask):
        raise PICacheError(CHANGED_MEANWHILE)
    running.attended += 1
    refuse_unknown_scores(module, kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if running.parallel is not None:
        if s_aux is not None:
            raise PICacheError(
                f"{type(module).__name__} attends with sinks, which chunks side by side (APE) do "
                "not go with: choose a method that places them in order"
            )
        out = _attend_side_by_side(query, key, value, mask, *running.parallel, scaling, softcap)
        return out.transpose(1, 2).contiguous(), None
    blocks = mask.blocks(key.shape[2], query.dtype)
    out = attend_blocks(query, key, value, blocks, scaling, softcap, s_aux)
    if running.observe is not None:
        norms = value.norm(dim=-1, keepdim=True) if running.value_norm else None
        mass = attention_mass(query, key, mask.positions, mask, scaling, softcap, s_aux, norms)
        running.observe(running.layer, mass)
    return out.transpose(1, 2).contiguous(), None


def _attend_side_by_side(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: ScatterMask,
    side_by_side: slice,
    lse_scale: float,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """`parallel_attention` of the recomputed tokens, a block of queries at a time."""
    everything = torch.arange(key.shape[2], device=key.device)
    inside = torch.zeros(1, key.shape[2], dtype=torch.bool, device=key.device)
    inside[:, side_by_side] = True
    queries = query.split(_BLOCK_QUERIES, dim=2)
    out = []
    for block, positions in zip(queries, mask.positions.split(_BLOCK_QUERIES), strict=True):
        allowed = mask(positions, everything)[None, None]
        out.append(
            parallel_attention(block, key, value, allowed, inside, scaling, lse_scale, softcap)
        )
    return torch.cat(out, dim=2)


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
    """Attention while decoding behind chunks side by side (APE).

    `attention_mask` is added to the scores: 0 where a key is allowed.
    """
    prompt = attached[id(module.config)]
    repeats = prompt.repeats(len(key), key.shape[2])  # beams, several sequences
    inside = prompt.inside.repeat_interleave(repeats, dim=0)
    inside = nn.functional.pad(inside, (0, key.shape[2] - inside.shape[1]))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    allowed = attention_mask == 0
    out = parallel_attention(query, key, value, allowed, inside, scaling, prompt.lse_scale, softcap)
    return out.transpose(1, 2).contiguous(), None
