"""The cache of a linked prompt, which `generate` goes on from, and what it refuses to be fed."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer
from typing_extensions import override

from picache.chunk import KV
from picache.errors import PICacheError
from picache.hf.ambient import refuse_other_dtype
from picache.hf.attention_switch import Attachment
from picache.hf.held_kv import HeldKV


class LinkedLayer(DynamicLayer):
    """One layer of a linked prompt, from which `generate` goes on as from a `DynamicLayer`.

    It repeats its rows by itself when beams or ``num_return_sequences`` ask for more.

    Args:
        held: the prompt's keys and values, which other caches share.
        index: which layer this is.
        attach: attaches the link method's attention to the model; None where there is none.
    """

    is_croppable = False

    def __init__(self, held: HeldKV, index: int, attach: Attachment | None = None) -> None:
        self._held, self.index, self.attach = held, index, attach
        super().__init__()
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.is_initialized = True

    @property
    def keys(self) -> Tensor:
        """Of the prompt and what was appended, ``[batch, kv_heads, tokens, head_dim]``."""
        return self._held[self.index][0] if self._keys is None else self._keys

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._keys = keys

    @property
    def values(self) -> Tensor:
        """The same of the values."""
        return self._held[self.index][1] if self._values is None else self._values

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._values = values

    @override
    def crop(self, *args: object, **kwargs: object) -> None:
        """Refused: assisted decoding feeds the prompt again and then rolls back."""
        _refuse_assistance()

    def activate_past_recording(self) -> None:
        """Refused before any token is fed: assisted decoding asks for it and rolls back later."""
        _refuse_assistance()

    @override
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> KV:
        """Append new tokens; the batch may grow once by a factor, for beams and several sequences.

        Raises:
            PICacheError: when the batch does not fit, when the whole prompt is fed again, or when
                the method's attention is not attached.
        """
        if self.attach is not None and not self.attach.on:
            raise PICacheError(
                "this prompt's method changes positions and attention while decoding too: run "
                "generate inside `with prompt.attached():`"
            )
        held_kv = (self.keys, self.values)
        refuse_other_dtype((key_states, value_states), held_kv, "the linked cache holds")
        batch, held = key_states.shape[0], self.keys.shape[0]
        if batch % held:
            raise PICacheError(
                f"the linked cache holds a batch of {held}, the model was given {batch}: "
                "link one prompt per row, or generate from this prompt's own input_ids"
            )
        beams = batch // held
        if self.index == 0:
            self._refuse_fed_again(key_states[::beams], value_states[::beams])
        if beams > 1:
            self.batch_repeat_interleave(beams)
        return super().update(key_states, value_states)

    @override
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many tokens are attended to, and from which on; called before a forward's layers.

        Raises:
            PICacheError: when the forward has no tokens.
        """
        if query_length == 0:
            raise PICacheError(
                f"the cache already holds {self.keys.shape[2]} tokens and the model was given no "
                "new ones: generate feeds what input_ids has beyond the cache, so pass the whole "
                "text as input_ids (the prompt's ids, the answer so far, the new turn), with at "
                "least one token more than the cache and ones in attention_mask for all of it"
            )
        return super().get_mask_sizes(query_length)

    def _refuse_fed_again(self, *new: Tensor) -> None:
        """Raise PICacheError where new keys and values of layer 0 are of tokens held already."""
        fed, held = new[0].shape[2], self.keys.shape[2]
        same_positions = fed > 1 and self._holds(*new)
        # A single token that is held alone may well come a second time.
        if fed >= max(held, 2) and not same_positions and self._repeats(*new):
            raise PICacheError(
                f"the cache already holds {held} tokens and the model was given the whole text "
                f"again behind them, in one forward of {fed}: model.generate(**prompt) feeds the "
                "last token alone, and the logits of model(**prompt) are prompt.logits. To go on "
                "by hand, feed what the cache does not hold: model(input_ids=prompt.input_ids"
                "[:, -1:], attention_mask=prompt.attention_mask, "
                "past_key_values=prompt.past_key_values)"
            )
        if not same_positions:
            return
        if fed > held:
            raise PICacheError(
                f"the cache already holds {held} tokens and the model was given some of them "
                f"again, in one forward of all {fed}: that is what generate does with "
                "use_cache=False, where a linked prompt is of no use, and in assisted decoding. "
                "Leave out use_cache; for assisted decoding leave out assistant_model and "
                "prompt_lookup_num_tokens; in a forward of your own, feed only what the cache "
                "does not hold"
            )
        raise PICacheError(
            f"the cache already holds {held} tokens and the model was given some of them again: "
            "pass input_ids with at least one token more than the cache, and take a fresh cache "
            "from the prompt (prompt['past_key_values']) for each run; for assisted decoding, "
            "which feeds it again, leave out assistant_model and prompt_lookup_num_tokens"
        )

    def _repeats(self, *new: Tensor) -> bool:
        """Whether the new tokens begin with all tokens of the cache, in order, at any positions.

        In layer 0 the values, or the keys where those are latents (MLA), depend on the token alone
        and not on its position.
        """
        held = self.keys.shape[2]
        for old, fed in zip((self.keys.float(), self.values.float()), new, strict=True):
            spread = old.var(dim=2, correction=0).sum(dim=(1, 2))
            if held == 1:  # a single token has no variance
                spread = 0.01 * old.square().sum(dim=(1, 2, 3))
            distance = (old - fed[:, :, :held].float()).square().sum(dim=(1, 3))
            same = distance / spread.clamp_min(1e-30)[:, None] < 0.01
            if bool(same.all(dim=1).any()):  # one row is enough: others may differ by padding
                return True
        return False

    def _holds(self, *new: Tensor) -> bool:
        """Whether the first new tokens are in the cache of layer 0 already, one after the other.

        The keys and values of layer 0 depend on the token and its position alone. Equal ones are
        therefore tokens of the prompt that were fed at their old positions again; the same tokens
        at later positions differ by a rotation, of the keys or, where keys are latents (MLA), of
        the values. Distances are compared with the variance of what is held, which a large bias
        does not widen, and up to eight consecutive tokens must agree. The bound, a hundredth of the
        variance, is far above the rounding of half precision.
        """
        count = min(new[0].shape[2], 8, self.keys.shape[2])
        same = torch.ones_like(self.keys[:, 0, :, 0], dtype=torch.bool)
        for held, fed in zip((self.keys.float(), self.values.float()), new, strict=True):
            spread = held.var(dim=2, correction=0).sum(dim=(1, 2)).clamp_min(1e-30)
            for offset in range(count):
                distance = (held - fed[:, :, offset : offset + 1].float()).square().sum(dim=(1, 3))
                same &= (distance / spread[:, None] < 0.01).roll(-offset, dims=1)
        return bool(same[:, : same.shape[1] - count + 1].any())


def _refuse_assistance() -> None:
    raise PICacheError(
        "a linked cache cannot roll back, so assisted and prompt-lookup decoding and crop() are "
        "refused: leave out assistant_model and prompt_lookup_num_tokens"
    )


class LinkedCache(Cache):
    """The cache that `PIC.link` hands to `generate`: it holds every prompt token but the last.

    Args:
        held: keys and values of those tokens.
        attach: attaches the link method's attention to the model; None where there is none.
    """

    def __init__(self, held: HeldKV, attach: Attachment | None = None) -> None:
        self._held, self._attach = held, attach
        self._linked = [LinkedLayer(held, index, attach) for index in range(len(held))]
        super().__init__(layers=list(self._linked))

    @property
    def kv(self) -> list[KV]:
        """Keys and values by layer, as they are now, in memory that no later link writes to."""
        self._held.move_out()
        return [(layer.keys, layer.values) for layer in self._linked]

    def fork(self) -> "LinkedCache":
        """Another cache on the same tensors of the prompt; safe, since layers append to copies."""
        return LinkedCache(self._held, self._attach)

    def on(self, device: torch.device) -> "LinkedCache":
        """Another cache with copies of the tensors on a device."""
        # Not named `to`: accelerate moves whatever has that between devices, layer by layer.
        moved = [(keys.to(device), values.to(device)) for keys, values in self.kv]
        return LinkedCache(HeldKV(moved, moved[0][0].shape[2]), self._attach)

    def __getstate__(self) -> dict[str, Any]:
        self._held.move_out()  # or a copy, or a file, would hold the whole arena
        return self.__dict__
