"""The forward of a padded pass: as plain Python, or compiled once for every class of rows."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from picache.chunk import KV
from picache.errors import PICacheError
from picache.hf.compiled import never_compiled
from picache.hf.due import Due, nothing_due
from picache.hf.model import HFModel
from picache.hf.padded_pass import (
    ObservingPass,
    PaddedLayer,
    PaddedPass,
    TracedPass,
    running,
)
from picache.hf.sparse_pass import CannotCapture, Question, Stop

COMPILER: dict[str, Any] = {"backend": "inductor", "options": {"triton.cudagraphs": False}}
"""How passes are compiled: without the compiler's own CUDA graphs, since they are captured here."""


class CannotCompile(CannotCapture):
    """Says why this pass cannot be compiled; it can be captured all the same."""


def padded_forward(
    model: HFModel, rows: Tensor, places: list[KV], due: Due = nothing_due
) -> Tensor:
    """Logits of a padded pass, which writes the keys and values of its rows.

    Args:
        model: the model.
        rows: token ids and positions, int64 ``[2, batch, rows]``; see `picache.hf.padded_pass`.
        places: keys and values of each layer, ``[batch, kv_heads, places + 1, head_dim]``.
        due: called before each layer.

    Returns:
        Of the last row of each prompt, ``[batch, vocab_size]``.
    """
    return _plain(model, rows, places, due)[0]


@torch.no_grad()
def _plain(
    model: HFModel, rows: Tensor, places: list[KV], due: Due = nothing_due
) -> tuple[Tensor, Sequence[int | None]]:
    """The logits, and the window of each layer in the order in which they attend."""
    passing = PaddedPass(rows[1], _room(places), due)
    outside = running.set(passing)
    try:
        with model.attention.padded(), never_compiled:
            return _logits(model.model, passing, rows[0], places), tuple(passing.windows)
    finally:
        running.reset(outside)


@torch.no_grad()
def padded_masses(
    model: HFModel, rows: Tensor, places: list[KV], question: Question, due: Due = nothing_due
) -> Tensor:
    """How much the rows of each prompt attend to each place, in the first layers of a padded pass.

    It writes the keys and values of its rows.

    Args:
        model: as for `padded_forward`.
        rows: as for `padded_forward`; in each prompt at least one.
        places: as for `padded_forward`.
        question: which layers, and whether the values count.
        due: as for `padded_forward`.

    Returns:
        The mean over heads and rows, fp32 ``[layers, batch, places + 1]``.
    """
    passing = ObservingPass(rows[1], _room(places), due, question)
    outside = running.set(passing)
    try:
        with model.attention.padded(), never_compiled, suppress(Stop):
            _logits(model.model, passing, rows[0], places)
        return torch.stack(passing.masses)
    finally:
        running.reset(outside)


def _logits(
    model: nn.Module, passing: PaddedPass, ids: Tensor, places: list[KV], **more: object
) -> Tensor:
    cache = Cache(layers=[PaddedLayer(index, *kv, passing) for index, kv in enumerate(places)])
    out: Any = model(
        input_ids=ids,
        position_ids=passing.positions.clamp_min(0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        **more,
    )
    passing.check_attended()
    return out.logits[:, -1]


def _room(places: list[KV]) -> int:
    """Places for tokens; the last one is for padding."""
    return places[0][0].shape[2] - 1


class CompiledForward:
    """The forward of padded passes of one number of prompts over one arena's size, compiled.

    It is compiled when it is called first; the number of rows may then differ from call to call.
    Calls wait for forwards in other threads that must not be compiled, and those for them.

    Args:
        model: the model, which may not change.
    """

    def __init__(self, model: HFModel) -> None:
        self._model = model
        self._windows: Sequence[int | None] | None = None
        self._compiled = torch.compile(_own(_traced), fullgraph=True, dynamic=False, **COMPILER)

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def __call__(self, rows: Tensor, places: list[KV]) -> Tensor:
        """`padded_forward`, compiled.

        Raises:
            CannotCompile: says what in the model cannot be, or what the compiler lacks.
        """
        if self._windows is None:
            self._windows = _plain(self._model, rows, places)[1]
        torch._dynamo.mark_dynamic(rows, 2)  # noqa: SLF001 - its documented place
        try:
            with self._model.attention.padded(), never_compiled.compiling():
                return self._compiled(self._model.model, rows, places, self._windows)
        except (PICacheError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a compiler may fail in any way
            # The second line is what the compiler met, the others are its advice and its stack.
            what = " ".join(line.strip() for line in str(error).splitlines()[:2])
            raise CannotCompile(f"compiling failed ({type(error).__name__}: {what})") from error


def _traced(
    model: nn.Module, rows: Tensor, places: list[KV], windows: Sequence[int | None]
) -> Tensor:
    """What torch.compile is given; its steps are those of `_plain`."""
    passing = TracedPass(rows[1], _room(places), windows)
    return _logits(model, passing, rows[0], places, padded_pass=passing)


def _own(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function with code of its own: torch.compile compiles one code few times, however
    many models that is for, and forgets what it compiled when the code is gone.
    """
    assert isinstance(function, FunctionType)
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
