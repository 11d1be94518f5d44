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
from picache.hf.fixed_memory import FixedMemory
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

    @override
    def reset(self) -> None:
        """Refused: other caches of the prompt share the tensors."""
        raise PICacheError(
            "a linked cache is not emptied, since it shares the prompt's tensors: take a new one "
            "from the prompt (prompt['past_key_values']), or a DynamicCache for another text"
        )

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
        beams = self._rows_repeated(key_states, value_states)
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

    @override
    def get_seq_length(self) -> int:
        """Tokens held: asked before a model goes on from them, and before another cache does.

        Raises:
            PICacheError: when the method's attention is not attached.
        """
        self._refuse_unattached()
        return super().get_seq_length()

    def _refuse_unattached(self) -> None:
        if self.attach is not None and not self.attach.on:
            raise PICacheError(
                "this prompt's method changes positions and attention while decoding too: run "
                "generate inside `with prompt.attached():`, with the prompt's own cache"
            )

    @property
    def _stored(self) -> KV:
        """The tensors that hold the tokens, with or without room behind them."""
        return self.keys, self.values

    def _rows_repeated(self, *new: Tensor) -> int:
        """How often each row that is held stands in new keys and values, which may be appended.

        Raises:
            PICacheError: where they may not, see `update`.
        """
        self._refuse_unattached()
        refuse_other_dtype((new[0], new[1]), self._stored, "the linked cache holds")
        batch, held = new[0].shape[0], self._stored[0].shape[0]
        if batch % held:
            raise PICacheError(
                f"the linked cache holds a batch of {held}, the model was given {batch}: "
                "link one prompt per row, or generate from this prompt's own input_ids"
            )
        beams = batch // held
        if self.index == 0 and new[0].shape[2] > 1:  # a single token may well come again
            self._refuse_fed_again(*(one[::beams] for one in new))
        return beams

    def _refuse_fed_again(self, *new: Tensor) -> None:
        """Raise PICacheError where new keys and values of layer 0 are of tokens held already."""
        fed, held = new[0].shape[2], self.keys.shape[2]
        same_positions = self._holds(*new)
        if fed >= held and not same_positions and self._repeats(*new):
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


class FixedLayer(LinkedLayer):
    """One layer of a linked prompt that `generate` goes on from in memory of fixed size.

    Its shapes and addresses stay, as those of a `StaticLayer`, so that a step can be compiled.

    Args:
        held: the prompt's keys and values, which other caches share.
        index: which layer this is.
        memory: of all layers of this cache.
    """

    is_compileable = True

    def __init__(self, held: HeldKV, index: int, memory: FixedMemory) -> None:
        self.memory = memory
        super().__init__(held, index)

    @property
    @override
    def keys(self) -> Tensor:
        """See `LinkedLayer`; waits for the device once tokens were appended."""
        return self._tokens_of(0)

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        _refuse_other_tensors(keys)

    @property
    @override
    def values(self) -> Tensor:
        """The same of the values."""
        return self._tokens_of(1)

    @values.setter
    def values(self, values: Tensor | None) -> None:
        _refuse_other_tensors(values)

    def _tokens_of(self, part: int) -> Tensor:
        if not self.memory.opened:
            return self._held[self.index][part]
        return self.memory.layers[self.index][part][:, :, : int(self.memory.lengths[self.index])]

    @property
    @override
    def _stored(self) -> KV:
        return self.memory.layers[self.index]

    @override
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> KV:
        """Write new tokens behind the others; return all places. See `LinkedLayer`."""
        if not torch.compiler.is_compiling():
            self.memory.open()
            beams = self._rows_repeated(key_states, value_states)
            if beams > 1:
                self.batch_repeat_interleave(beams)
        keys, values = self.memory.layers[self.index]
        length = self.memory.lengths[self.index]
        at = torch.arange(key_states.shape[2], device=keys.device) + length
        keys.index_copy_(2, at, key_states)
        values.index_copy_(2, at, value_states)
        length.add_(key_states.shape[2])
        return keys, values

    @override
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The places of a mask; called before a forward's layers. See `LinkedLayer`."""
        if not torch.compiler.is_compiling():
            super().get_mask_sizes(query_length)
            self.memory.make_room(query_length)
        return self.memory.places, 0

    @override
    def get_seq_length(self) -> Any:
        """Tokens held; a number on the device once tokens were appended."""
        return self.memory.lengths[self.index] if self.memory.opened else self._held.tokens

    @override
    def batch_repeat_interleave(self, repeats: int) -> None:
        self.memory.change(self.index, lambda rows: rows.repeat_interleave(repeats, dim=0))

    @override
    def batch_select_indices(self, indices: Tensor) -> None:
        self.memory.change(self.index, lambda rows: rows[indices])

    @override
    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.memory.change(self.index, lambda rows: rows.index_select(0, beam_idx.to(rows.device)))


def _refuse_other_tensors(tensor: Tensor | None) -> None:
    """Raise PICacheError where a layer of fixed size is handed other tensors to hold."""
    if tensor is not None:
        raise PICacheError(
            "a linked cache of fixed size keeps its tensors, and cannot be offloaded: to replace "
            "them, copy them into a DynamicCache"
        )


class LinkedCache(Cache):
    """The cache that `PIC.link` hands to `generate`: it holds a prompt's tokens but the last ones.

    Where the prompt lies in an arena its layers are of fixed size, so that `generate` compiles its
    steps of decoding on a CUDA device; elsewhere they grow.

    Args:
        held: keys and values of those tokens.
        attach: attaches the link method's attention to the model; None where there is none.
    """

    def __init__(self, held: HeldKV, attach: Attachment | None = None) -> None:
        self._held = held
        self._linked: list[LinkedLayer]
        if held.fixed and attach is None:
            memory = FixedMemory(held)
            self._linked = [FixedLayer(held, index, memory) for index in range(len(held))]
        else:
            self._linked = [LinkedLayer(held, index, attach) for index in range(len(held))]
        super().__init__(layers=list(self._linked))

    @property
    def kv(self) -> list[KV]:
        """Keys and values by layer, as they are now, in memory that no later link writes to."""
        now = [(layer.keys, layer.values) for layer in self._linked]
        return [(keys.clone(), values.clone()) for keys, values in now] if self._held.lent else now
