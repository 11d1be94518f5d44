"""A sparse pass of fixed shape: rows of several prompts, padded, with all that varies in memory.

It does what `picache.hf.sparse_pass` does where every layer is given the same tokens, but reads
nothing back from the device, so that it can be captured as a CUDA graph and replayed for other
prompts, and be compiled before that. Padding stands in front of the rows, so that the last row is
the last token of a prompt. It has position -1: it attends to nothing, and its keys and values are
written to the last place of the memory, where no prompt stands.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer
from typing_extensions import override

from picache.chunk import KV
from picache.errors import PICacheError
from picache.hf.ambient import refuse_autocast, refuse_other_dtype
from picache.hf.due import Due, nothing_due
from picache.hf.sparse_pass import (
    CHANGED_MEANWHILE,
    OTHER_THREAD,
    CannotCapture,
    Question,
    Stop,
    refuse_unknown_scores,
)
from picache.kernels.attention_mass import attention_mass
from picache.kernels.attention_operator import attention_operator
from picache.kernels.scattered_attention import scattered_attention


class Attended(NamedTuple):
    """What a layer attended with, and the log-sum-exp that came of it.

    Args:
        query: ``[batch, heads, rows, head_dim]``.
        keys: ``[batch, kv_heads, places + 1, head_dim]``.
        values: the same of the values.
        lse: of each row's scores, fp32 ``[batch, heads, rows]``.
        scaling: factor on the scores.
        window: how many keys a row attends to at most; None for all.
        softcap: of the scores; None for none.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    lse: Tensor
    scaling: float
    window: int | None
    softcap: float | None


class PaddedPass:
    """What the mask, the cache and the attention share during one padded pass.

    Args:
        positions: where the rows of each prompt stand, int64 ``[batch, rows]`` on the device; -1
            for padding.
        places: places for the tokens of a prompt, without the last, which padding is written to.
        due: called before each layer.

    Attributes:
        positions: as handed in.
        places: as handed in.
        due: as handed in.
        batch: index of the prompt of each row, ``[batch, 1]``.
        written: the place of each row, ``[batch, rows]``.
        updated: how many layers so far have made their keys and values.
        windows: of each layer that so far attended by our function, how many keys its rows attend
            to at most; None for all.
    """

    def __init__(self, positions: Tensor, places: int, due: Due = nothing_due) -> None:
        self.positions, self.places, self.due = positions, places, due
        self.batch = torch.arange(len(positions), device=positions.device)[:, None]
        self.written = torch.where(positions < 0, places, positions)
        self.updated = 0
        self.windows: list[int | None] = []

    def attend(self, mask: object) -> int | None:
        """Note that a layer attends; its window, which `padded_mask` has found."""
        if not isinstance(mask, PaddedMask):
            raise PICacheError(CHANGED_MEANWHILE)
        self.windows.append(mask.window)
        return mask.window

    def enter(self, layer: int) -> None:
        """The keys and values of a layer are made; `Stop` where the pass ends before it."""

    def observe(self, attended: Attended) -> None:
        """Told what a layer attended with."""

    def check_attended(self) -> None:
        """Raise PICacheError unless every layer that made its KV attended by our function."""
        if len(self.windows) != self.updated:
            raise PICacheError(CHANGED_MEANWHILE)


class ObservingPass(PaddedPass):
    """A padded pass that answers a question, and ends when it has.

    Args:
        positions: as for `PaddedPass`.
        places: as for `PaddedPass`.
        due: as for `PaddedPass`.
        question: what is asked.

    Attributes:
        masses: of each layer so far the attention weight of each place, the mean over heads and
            rows, fp32 ``[batch, places + 1]``.
    """

    def __init__(self, positions: Tensor, places: int, due: Due, question: Question) -> None:
        super().__init__(positions, places, due)
        self._question = question
        self.masses: list[Tensor] = []

    @override
    def enter(self, layer: int) -> None:
        if layer == self._question.layers:
            raise Stop

    @override
    def observe(self, attended: Attended) -> None:
        weight = attended.values.norm(dim=-1) if self._question.value_norm else None
        mass = attention_mass(
            attended.query,
            attended.keys,
            self.positions,
            attended.lse,
            attended.scaling,
            attended.window,
            attended.softcap,
            weight,
        )
        self.masses.append(mass)


class TracedPass(PaddedPass):
    """A padded pass as torch.compile traces it, which cannot evaluate a mask.

    Context variables cannot be read there either, so that attention is handed this as the argument
    `padded_pass`.

    Args:
        positions: as for `PaddedPass`.
        places: as for `PaddedPass`.
        known: the windows of all layers in the order in which they attend, as a `PaddedPass` of
            the same model over as many places has found them.
    """

    def __init__(self, positions: Tensor, places: int, known: Sequence[int | None]) -> None:
        super().__init__(positions, places)
        self._known = known

    @override
    def attend(self, mask: object) -> int | None:
        """Note that a layer attends; its window, which is known."""
        window = self._known[len(self.windows)]
        self.windows.append(window)
        return window


running: ContextVar[PaddedPass] = ContextVar("picache_padded_pass")
"""The padded pass that this thread runs."""


def _under_way() -> PaddedPass:
    found = running.get(None)
    if found is None:
        raise PICacheError(OTHER_THREAD)
    return found


class PaddedLayer(DynamicLayer):
    """One layer of the cache of a padded pass: the memory of all prompts, which it writes to.

    Args:
        index: of the layer.
        keys: ``[batch, kv_heads, places + 1, head_dim]``.
        values: the same of the values.
        of: the pass.
    """

    def __init__(self, index: int, keys: Tensor, values: Tensor, of: PaddedPass) -> None:
        super().__init__()
        self.is_initialized, self.index = True, index
        self.keys, self.values = self.memory = keys, values
        self.of = of

    @override
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> KV:
        """Write the keys and values of the rows; return those of all places."""
        self.of.enter(self.index)
        refuse_autocast(key_states.device.type)
        fresh, whole = (key_states, value_states), self.memory
        refuse_other_dtype(fresh, whole, "the compiled chunks hold")
        self.of.updated += 1
        self.of.due(range(self.index, self.index + 1))
        for new, held in zip(fresh, whole, strict=True):
            held[self.of.batch, :, self.of.written] = new.transpose(1, 2)
        return whole

    @override
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.of.places, 0

    @override
    def get_seq_length(self) -> int:
        return self.of.places


class PaddedMask:
    """An attention mask that is causal by position, within a window of keys or without one.

    Attributes:
        window: how many keys each row attends to at most; None for all.
    """

    def __init__(self, window: int | None) -> None:
        self.window = window

    def to(self, *args: Any, **kwargs: Any) -> "PaddedMask":
        """Itself; accelerate calls this on a layer's arguments."""
        return self


def padded_mask(mask_function: Callable, **_: object) -> PaddedMask | None:
    """The mask of the padded pass that is running, reduced to its window; None where traced."""
    if torch.compiler.is_compiling():
        return None
    return PaddedMask(window_of(mask_function, _under_way().places))


def window_of(mask_function: Callable, places: int) -> int | None:
    """The window of a mask function of transformers; None where it is plainly causal.

    The function is evaluated on the CPU at the beginning, in the middle and at the end.

    Args:
        mask_function: whether attention is allowed, given the batch row, the head, the query's
            position and the key's position.
        places: positions that a prompt may have.

    Raises:
        CannotCapture: where it is neither causal nor a sliding window.
    """
    some = sorted({0, 1, 2, places // 3, places // 2, places - 2, places - 1})
    queries = torch.tensor([at for at in some if 0 <= at < places])[:, None]
    keys, zero = torch.arange(places)[None], torch.zeros((), dtype=torch.int64)
    try:
        allowed = mask_function(zero, zero, queries, keys).expand(len(queries), places)
    except RuntimeError as error:  # it reads tensors on the device
        raise CannotCapture("its attention mask depends on more than positions") from error
    window = int(allowed[-1].sum())
    if not torch.equal(allowed, (keys <= queries) & (keys > queries - window)):
        raise CannotCapture("its attention mask is neither causal nor a sliding window")
    return None if window == places else window


def attend_padded(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PaddedMask | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    padded_pass: TracedPass | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention of the rows over all places, causal by position; see `attend_scattered`."""
    passing = _under_way() if padded_pass is None else padded_pass
    window = passing.attend(attention_mask)
    refuse_unknown_scores(module, kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    given = (query, key, value, passing.positions, scaling, window, softcap, s_aux)
    if padded_pass is not None:
        return attention_operator(*given), None
    out, lse = scattered_attention(*given)
    passing.observe(Attended(query, key, value, lse, scaling, window, softcap))
    return out.transpose(1, 2).contiguous(), None
