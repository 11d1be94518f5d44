"""How a cache follows `generate`: what is checked when a call begins, and before each step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsity.errors import SparsityError
from sparsity.hf.autocast import autocast_dtype, lowered
from sparsity.hf.compiled_step import collect_traces, compile_config, note_step, signature
from sparsity.hf.decoding_path import COMPILED, why_not_compiled
from sparsity.hf.forward_checks import check_autocast
from sparsity.hf.layers import RetainedLayer
from sparsity.hf.served_cache import ServedCache
from sparsity.retention.all_layers import AllLayers


class GenerateSteps(ServedCache):
    """The part of a `SparseCache` that `generate` meets.

    Each step of decoding in memory of fixed size is armed before the model is called: checked, and
    room made for its token. The model's forward is then tensor operations only.
    """

    _state: AllLayers
    _why: str | None  # steps are not compiled; None where they are
    _dropped_at: int | None  # columns at which the model's own code drops every cache

    def __init__(self) -> None:
        self.autocast: torch.dtype | None = None
        self.signature = ""
        self._preparing = False
        self._before_ids = 0  # columns that stand before the ids `generate` shows: embeddings

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` compiles the steps of decoding; read by transformers.

        False while a prompt is prepared, for which transformers would make masks otherwise.
        """
        return self._why is None and not self._preparing

    @property
    def armed(self) -> bool:
        """Whether the next forward is a step of decoding that was checked beforehand."""
        return self._state.armed

    def generate_begins(self, config: Any, mode: Any, columns: int) -> None:
        """Check that there is room for the text, and choose how its tokens are decoded."""
        state = self._state
        if state.max_tokens is not None and columns > state.max_tokens:
            raise SparsityError(
                f"max_tokens={state.max_tokens}, and generate is to make a text of {columns + 1} "
                "tokens (padding included), of which the last needs no place: make the cache with "
                f"max_tokens={columns} or more, or generate less"
            )
        if not state.fixed:
            return
        self._why = why_not_compiled(config, mode)
        if self._why is None and config.compile_config is None:
            config.compile_config = compile_config()

    def prepare(
        self, own: Callable[..., Any], input_ids: Tensor, args: tuple[Any, ...], kwargs: Any
    ) -> dict[str, Any]:
        """Check that the text goes on from what is held; of a step of decoding, arm the cache."""
        state, begins = self._state, kwargs.get("is_first_iteration", False)
        serves = kwargs.get("use_cache") is not False  # or it is refused by the forward
        if serves and (begins or not state.fixed or not state.decoding):
            state.catch_up()
            state.tokens.hand(input_ids, kwargs, state.rows.seen)
        self._preparing = True
        try:
            inputs = own(input_ids, *args, **kwargs)
        finally:
            self._preparing = False
        ids = inputs.get("input_ids")
        single = ids is not None and ids.shape[1] == 1
        if serves and single and not begins and state.clock is not None:
            self._arm(own, input_ids, inputs)
        elif begins:
            self.signature = ""
        return inputs

    def _arm(self, own: Any, input_ids: Tensor, inputs: dict[str, Any]) -> None:
        """Check a step of decoding of `generate`, whose new tokens are all real, and prepare it."""
        state = self._state
        if not self.signature:  # once in a call
            state.catch_up()
            self._before_ids = state.rows.seen + 1 - input_ids.shape[1]  # of a prompt's embeddings
            more = (self.autocast, input_ids.shape[0])
            self.signature = signature(own.__self__, state.retentions, more)
            if note_step(self.signature) and input_ids.is_cuda:
                state.rehearse()
        collect_traces()
        inputs.pop("attention_mask", None)
        columns = self._before_ids + input_ids.shape[1]
        self.check_length(columns)
        check_autocast(autocast_dtype(input_ids.device), self.autocast)
        for layer in self.layers:
            layer.prefetch()
        state.arm(columns - 1)
        state.tokens.follow(input_ids)

    def decode(
        self, layer: RetainedLayer, query: Tensor, key: Tensor, value: Tensor, **scores: Any
    ) -> Tensor:
        """Attention of one managed layer in an armed step."""
        clock = self._state.clock
        assert clock is not None
        if self.autocast is None:
            return layer.retention.decode(query, key, value, clock, **scores)
        with torch.autocast(query.device.type, enabled=False):
            query, key, value = (lowered(x, self.autocast) for x in (query, key, value))
            return layer.retention.decode(query, key, value, clock, **scores)

    def step_begins(self) -> None:
        """Open an armed step."""
        self._state.step_begins()

    def stepped(self) -> None:
        """Close an armed step."""
        self._state.stepped()

    def check_length(self, columns: int) -> None:
        """Refuse a forward by which the model's own code drops every cache."""
        if columns == self._dropped_at:
            raise SparsityError(
                f"this model drops its cache when a text grows past {self._dropped_at} tokens "
                "(original_max_position_embeddings, where its rotation changes), and would go on "
                "without the SparseCache; keep the prompt and the new tokens below that"
            )

    def how_decoded(self) -> str:
        """How single tokens are decoded, for people."""
        if self._state.compiled:
            return COMPILED
        if self._state.fixed:
            why = "so far" if self._why is None else f", since {self._why}"
            return f"in memory of fixed size, not compiled{why}"
        return f"in memory that grows, since {self._why}"
