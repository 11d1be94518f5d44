"""SparseCache, the `transformers.Cache` that keeps what a policy keeps."""

import copy
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from sparsity.arguments import check_instance, whole_number
from sparsity.errors import SparsityError
from sparsity.hf import sink_warning
from sparsity.hf.attach import (
    ATTACHED,
    TOKENS,
    attach,
    decoder_of,
    keep_attached,
)
from sparsity.hf.autocast import autocast_dtype, lowered
from sparsity.hf.decoding_path import choose_places
from sparsity.hf.fixed_memory import leave_to_the_next, take
from sparsity.hf.forward_checks import check_autocast, check_checkpointing, check_states
from sparsity.hf.generate_steps import GenerateSteps
from sparsity.hf.layers import (
    RetainedLayer,
    build_layers,
    layer_bytes,
    managed_layers,
    refuse_rollback,
    stock_layers,
    stock_tokens,
)
from sparsity.hf.rotation_proof import moves_of
from sparsity.hf.tensor_parallel import first_head, kv_heads, tensor_rank
from sparsity.policies import Full
from sparsity.policies.base import Policy
from sparsity.retention.all_layers import AllLayers
from sparsity.retention.layer import LayerRetention
from sparsity.retention.report import Report
from sparsity.retention.rotation import Move


class SparseCache(GenerateSteps, Cache):
    """A transformers cache that keeps what a policy keeps.

    ``model.generate(**inputs, past_key_values=SparseCache(model, RaaS(budget=1024)))`` is all there
    is to do. The object is a ``transformers.Cache``: ``layers[i].keys`` and ``.values`` are what
    layer i holds, ``get_seq_length()`` is the number of tokens seen. Layers with full attention
    follow the policy; layers with a sliding window keep their window, and those with linear
    attention stay as transformers has them. Left-padded batches, beams, sampling, several turns,
    chunked prefill, tensor parallelism, ``offload(layer)``, ``reset()`` and ``copy.deepcopy`` work;
    going back (assisted decoding, ``crop``) is refused.

    On a CUDA device a policy that bounds what it holds keeps it in memory of fixed size, and
    `generate` compiles its steps of decoding into one CUDA graph; see `static` and `max_tokens`.
    Where that was done, the memory of a cache that is gone is kept for the next cache of the same
    kind and batch, so that the graph serves it too: clone what you want to keep of a cache, and
    ``detach(model)`` to free the memory.

    Args:
        model: a transformers model for text generation, written on the attention interface. It is
            attached (see `attach`) and stays so until ``detach(model)``; it still works with other
            caches.
        policy: which tokens to keep, such as ``RaaS(budget=1024)``; budgets are in tokens.
        past: any transformers cache to go on from; its tensors are read, never written to. Hand
            ``generate`` the full `input_ids`, the cached ones included, and at least one more. Its
            tokens count as a prompt. One row may become many (beams, a shared prefix).
        max_tokens: columns that a text may have, padding included; more are refused. A policy that
            does not bound what it holds (`Quest`, `Full`, `SnapKV` without `evict_every`) needs
            it to decode in memory of fixed size.
        static: whether the cache is of fixed size once the prompt is in, so that `generate`
            compiles its step of decoding (torch.compile and CUDA graphs; the first use of a model
            takes the time to compile). None for where that is possible, on a CUDA device; False
            for memory that grows as it is needed; True to refuse anything else, and for a CPU.
            `report()` says which way was taken and why.

    Raises:
        SparsityError: for a model that cannot be attached, or whose rotary embedding cannot be
            verified where the policy counts positions inside the cache, and for a `past` that does
            not fit; in a forward, for a prompt that is already cached whole or does not go on from
            what is held, another model, a batch of another size, and a prompt that fills the budget
            it is pinned in.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        past: Cache | None = None,
        max_tokens: int | None = None,
        static: bool | None = None,
    ) -> None:
        decoder = decoder_of(model)
        check_instance("policy", policy, Policy, "a policy such as RaaS(budget=1024)")
        if past is not None:
            _check_past(past)
        if max_tokens is not None:
            max_tokens = whole_number("max_tokens", max_tokens, least=1)
        on_cuda = next(decoder.parameters()).is_cuda
        windows = static is True or (static is None and on_cuda)
        layers, rows = build_layers(decoder.config, policy, past, windows)
        places, self._why = choose_places(model, decoder, layers, max_tokens, static)
        if windows and not places:
            layers, rows = build_layers(decoder.config, policy, past)
        moves = _moves(model, decoder) if policy.needs.moved else {}
        attach(model)
        Cache.__init__(self, layers=layers)
        GenerateSteps.__init__(self)
        managed = [layer.retention for layer in layers if isinstance(layer, RetainedLayer)]
        for retention in managed:
            retention.move = moves.get(retention.layer)
            retention.places = places.get(retention.layer)
        self._state = AllLayers(policy, {x.layer: x for x in managed}, rows)
        self._state.max_tokens = max_tokens
        for layer in managed_layers(layers):
            layer.state = self._state
        self._state.peak_bytes = sum(layer_bytes(layer) for layer in layers)
        self._stock = stock_layers(decoder.config, policy)
        self._model = TOKENS[decoder]
        sink_warning.ask(self._model, policy, managed)
        leave_to_the_next(self, decoder, self._state)
        self._rank, self._heads = tensor_rank(model), kv_heads(decoder.config)
        self._dropped_at = _dropped_at(decoder.config)

    def __copy__(self) -> NoReturn:
        """Refused: two caches would write to the same memory."""
        raise SparsityError("a SparseCache is copied whole or not at all: use copy.deepcopy(cache)")

    @property
    def policy(self) -> Policy:
        """The policy of this cache."""
        return self._state.policy

    @property
    def retentions(self) -> dict[int, LayerRetention]:
        """What each managed layer holds, by the layer's index in the model."""
        return dict(self._state.retentions)

    def replace(self, retention: LayerRetention) -> None:
        """Use another retention for its layer; before the first forward."""
        self._state.retentions[retention.layer] = retention
        self.layers[retention.layer].retention = retention

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention: check and count the new tokens, and hand them on."""
        if self._state.armed:  # the attention function stores them
            return key_states, value_states
        return self._update(key_states, value_states, layer_idx, *args, **kwargs)

    @torch.compiler.disable
    def _update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self._state.step is None:
            raise SparsityError(
                "a SparseCache works with an attached model only, and this one is detached (or its "
                "decoder was called past its hooks); call attach(model) first"
            )
        layer, state = self.layers[layer_idx], self._state
        if self.autocast is not None and isinstance(layer, RetainedLayer):
            key_states = lowered(key_states, self.autocast)
            value_states = lowered(value_states, self.autocast)
        if state.repeats:  # the first layer of a forward: nothing has changed yet
            try:
                check_states(layer, layer_idx, key_states, value_states)
            except SparsityError:
                state.withdraw()
                raise
            repeats, state.repeats = state.repeats, 0
            if repeats > 1:
                self.batch_repeat_interleave(repeats)
        layer.prefetch()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def begin(self, token: str, decoder: PreTrainedModel, arguments: dict[str, Any]) -> None:
        """Check and plan a forward; nothing has changed when it raises SparsityError."""
        if token != self._model:
            raise SparsityError(
                "this SparseCache was made for another model; make one for this model with "
                "SparseCache(model, policy)"
            )
        positions = arguments.get("position_ids")
        if positions is not None and positions.dim() > 2 and self.policy.needs.moved:
            raise SparsityError(
                f"position_ids are {tuple(positions.shape)}: where positions have several axes "
                "(images, videos) there are none to count inside the cache; use "
                "positions='absolute' with this model"
            )
        state = self._state
        state.turn.enter(busy=state.busy)
        try:
            state.disarm()
            for layer in managed_layers(self.layers):
                layer.get_seq_length()  # the steps that were armed are counted on the device
            autocast = self._checked_autocast(arguments)
            step, repeats = state.plan(arguments)
            self.check_length(step.stop)
            if state.fixed and state.clock is None:
                take(decoder, state, len(step.before), autocast or decoder.dtype)
        except Exception:
            self._state.abandon()
            raise
        self.autocast = autocast
        if step.single and state.clock is not None:
            for layer in self.layers:
                layer.prefetch()
        state.open(step, repeats, arguments.get("input_ids"))

    def _checked_autocast(self, arguments: dict[str, Any]) -> torch.dtype | None:
        tokens = arguments.get("input_ids")
        tokens = arguments["inputs_embeds"] if tokens is None else tokens
        autocast = autocast_dtype(tokens.device)
        if self._state.rows.real is not None:  # there was a forward before
            check_autocast(autocast, self.autocast)
        return autocast

    def attend(
        self, layer: RetainedLayer, query: Tensor, key: Tensor, value: Tensor, **scores: Any
    ) -> Tensor:
        """Attention of one managed layer in the forward under way."""
        index = layer.retention.layer
        if layer.pending != (key.shape, value.shape):
            self.give_up(
                f"layer {index} attends to other tensors than it gave to the cache (latent "
                "attention, or keys shared between layers)"
            )
        layer.pending = None
        if self._rank is not None:
            layer.retention.first_head = first_head(
                self._rank, self._heads, key.shape[1], layer.retention.policy
            )
        state = self._state
        state.reached.add(index)
        assert state.step is not None
        if state.clock is not None and state.step.single:
            mask, _ = scores.pop("mask"), scores.pop("own")
            if mask.custom or (mask.rule is not None and not layer.retention.window):
                raise SparsityError(
                    "a mask beyond padding was handed in for a single new token, and a cache of "
                    "fixed size has none: make it with static=False"
                )
            return layer.retention.decode(query, key, value, state.clock, **scores)
        out = layer.retention.attend(query, key, value, state.step, **scores)
        layer.show()
        return out

    def finish(self) -> None:
        """Close a forward: all managed layers must have come through the attention function."""
        if missed := self._state.missed():
            self.give_up(
                f"layers {missed} did not reach the attention function with the cache: the model "
                "drops keyword arguments on the way, or its attention implementation was changed"
            )
        prompt = self._state.step is not None and not self._state.step.single
        self._state.close(self._stock_bytes)
        if prompt:
            sink_warning.warn(self._model, self.policy, self.retentions.values())

    def _stock_bytes(self) -> int:
        stock = [layer for layer in self.layers if not isinstance(layer, RetainedLayer)]
        return sum(layer_bytes(layer) for layer in stock)

    def abandon(self) -> None:
        """Close a forward that failed; unless it was refused, what is held is incomplete."""
        self._state.abandon()

    def give_up(self, why: str) -> NoReturn:
        """Detach the model, which cannot be served right, and raise SparsityError.

        Gradient checkpointing of a part in training mode is found only here, where it has left out
        the cache; it is not the model's fault, and the model stays attached.
        """
        for decoder, attachment in list(ATTACHED.items()):
            if attachment.token == self._model:
                check_checkpointing(decoder)
                del ATTACHED[decoder]
                attachment.undo(decoder)
        raise SparsityError(f"SparseCache does not support this model: {why}. It was detached")

    def report(self) -> Report:
        """Measure what is held, from the tensors themselves; waits for the device."""
        self._state.catch_up()
        tokens = [
            self._state.kept(i) if isinstance(layer, RetainedLayer) else (stock_tokens(layer), 0)
            for i, layer in enumerate(self.layers)
        ]
        return Report(
            policy=self._state.policy,
            tokens_seen=self._state.rows.seen,
            tokens_kept=tuple(kept for kept, _ in tokens),
            evictions=tuple(dropped for _, dropped in tokens),
            managed=tuple(
                isinstance(layer, RetainedLayer) and not layer.retention.window
                for layer in self.layers
            ),
            num_bytes=sum(layer_bytes(layer) for layer in self.layers),
            peak_bytes=self._state.peak_bytes,
            past_bytes=sum(retention.past_bytes for retention in self._state.retentions.values()),
            decoding=self.how_decoded(),
            prompt_attention=self._state.prompt_attention,
        )

    def reset(self) -> None:
        """Forget everything, a `past` included: the cache is as new."""
        for i, layer in enumerate(self.layers):
            if isinstance(layer, RetainedLayer):
                layer.reset()
            else:
                self.layers[i] = copy.deepcopy(self._stock[i])
        self._state.clear()

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Columns seen, padding included; a tensor while torch.compile traces a step."""
        return self.layers[layer_idx].get_seq_length()

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Bring a layer back that `offload` has moved away; a forward does so by itself."""
        self.layers[layer_idx].prefetch()

    def reorder_cache(self, beam_idx: Any) -> None:
        """Take the rows of `beam_idx`, int64 `[rows]`, in that order, as beam search does."""
        beam_idx = _row_index("beam_idx", beam_idx)
        super().reorder_cache(beam_idx)
        self._state.take(beam_idx)
        self._state.measure(self._stock_bytes)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of `indices` (int64 numbers or a bool mask), in that order."""
        indices = _row_index("indices", indices)
        super().batch_select_indices(indices)
        self._state.take(indices)
        self._state.measure(self._stock_bytes)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times, copies next to each other."""
        repeats = whole_number("repeats", repeats, least=1)
        super().batch_repeat_interleave(repeats)
        if (batch := self._state.rows.batch) is not None:
            self._state.take(torch.arange(batch).repeat_interleave(repeats))
        self._state.measure(self._stock_bytes)

    def activate_past_recording(self) -> None:
        """Refused with SparsityError: assisted decoding would go back."""
        refuse_rollback()

    def crop(self, tokens_to_remove: int) -> None:
        """Refused with SparsityError, unless there is nothing to remove."""
        if tokens_to_remove:
            refuse_rollback()


def _row_index(name: str, given: Any) -> Tensor:
    """Numbers of rows, or a bool for each row, as a tensor; SparsityError for anything else."""
    index = None if isinstance(given, str) else torch.as_tensor(given)
    if index is None or index.dim() != 1 or index.is_floating_point() or index.is_complex():
        raise SparsityError(
            f"{name}={given!r}: expected the numbers of the rows to take, such as [0, 2], or a "
            "bool for each row"
        )
    return index


def _check_past(past: object) -> None:
    note = ""
    if isinstance(past, Mapping):
        note = "; hand in what stands in it: past=given['past_key_values']"
    elif isinstance(past, tuple | list):
        note = "; put keys and values into one: DynamicCache().update(keys, values, layer)"
    check_instance("past", past, Cache, "a transformers cache, such as a filled DynamicCache", note)


def _moves(model: PreTrainedModel, decoder: PreTrainedModel) -> dict[int, Move]:
    """How to move each layer's keys between positions; the model is left as it was."""
    with keep_attached(model):
        return moves_of(decoder, lambda: SparseCache(model, Full()))


def _dropped_at(config: Any) -> int | None:
    """Columns at which the Phi-3 family's `prepare_inputs_for_generation` drops any cache."""
    if config.model_type not in ("phi3", "phimoe", "phi4_multimodal"):
        return None
    return getattr(config, "original_max_position_embeddings", None)
