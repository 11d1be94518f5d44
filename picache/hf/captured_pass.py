"""Sparse passes that are captured once as CUDA graphs and replayed for every prompt of their size.

A pass over a few hundred tokens is a few thousand kernels, which Python starts more slowly than the
device runs them. A graph starts all of them at once. It is captured for a number of prompts and of
rows, padded to a size class, over one arena a model; what varies lies in memory that it reads.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from picache.chunk import KV
from picache.errors import PICacheError
from picache.hf.arena import Arena
from picache.hf.due import Due, nothing_due
from picache.hf.model import HFModel
from picache.hf.padded_forward import (
    CannotCompile,
    CompiledForward,
    padded_forward,
    padded_masses,
)
from picache.hf.reading_back import refusing
from picache.hf.recorders import RECORDERS, ProvenCompiled, Recorder, Recording
from picache.hf.size_class import classes_up_to, size_class
from picache.hf.sparse_pass import CannotCapture, Question
from picache.hf.traced_from import traced_from
from picache.kernels.available import KernelError
from picache.kernels.check import why_no_kernels
from picache.kernels.queued import queued
from picache.progress import bar

MOST_ROWS = 32768
"""Rows of all prompts up to which a pass is captured unasked. More would keep a device busy without
a graph, though with slower attention; what ends it is the memory that stays with the graph."""
_NO_MEMORY = "there is not the memory to capture it"
_ROOM = 512  # tokens that may be decoded behind each prompt in an arena that nobody asked for


@dataclass(frozen=True)
class _Class:
    """One size of pass, recorded.

    Attributes:
        rows: int64 ``[2, batch, rows]``, token ids and positions, which the recording reads.
        replay: the recording.
        compiled: what it was recorded of; None for the plain pass.
    """

    rows: Tensor
    replay: Recording
    compiled: CompiledForward | None


class CapturedPasses:
    """The captured passes of one model, and the arena they run over.

    Every method is called by a thread that has the model's turn (`turn`).

    Args:
        model: the model; nothing is allocated before the first link.
    """

    def __init__(self, model: HFModel) -> None:
        self._model = model
        self._arena: Arena | None = None
        # By the number of prompts, of rows, and what is asked for in place of logits.
        self._recorded: dict[tuple[int, int, Question | None], _Class] = {}
        # By the number of prompts and of places of each; made by `warm_up` alone, as it takes long.
        self._compiled: dict[tuple[int, int], CompiledForward] = {}
        self._not_compiled = ""  # why passes that were compiled are so no more
        self._recorder: Recorder | None = None
        self._state: object = None
        self._hooked, self._failed = "", ""  # why nothing is captured at present
        self._checked = False  # whether the kernels were tried on this device

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The block in which a thread fills the arena and runs a pass over it; others wait.

        A model that has changed since its passes were captured loses them here.
        """
        with self._model.attention.turn:
            self._model.attention.refuse_attached()
            state, self._hooked = traced_from(self._model)
            if state != self._state:
                self._drop()
                self._state, self._failed, self._checked = state, "", False
            yield

    def forget(self) -> None:
        """Drop the arena and all that was captured, as when the model has left the device."""
        with self._model.attention.turn:
            self._drop()
            self._state = None

    def why_no_device(self) -> str:
        """Why nothing is captured where the model is; empty where passes are. Needs no turn."""
        kind = self._model.device.type
        if self._model.shards is not None:
            return "processes share each layer (tensor parallelism)"
        return "" if kind in RECORDERS else f"nothing is captured on a {kind}"

    @property
    def replays(self) -> bool:
        """Whether passes were captured, so that a link most likely replays one. Needs no turn."""
        return bool(self._recorded) and not self.why_no_device()

    @property
    def outdated(self) -> bool:
        """Whether the model is not what passes were captured of; needs the turn."""
        state, hooked = traced_from(self._model)
        return state != self._state or hooked != self._hooked

    def only_replays(self, ids: Sequence[Tensor], question: Question | None = None) -> bool:
        """Whether a pass over these rows replays what was captured, and runs nothing besides.

        The first replay of a size runs the pass itself as well, to hold the two together.

        Args:
            ids: of each prompt, the token ids of the rows.
            question: what is asked for in place of logits.
        """
        batch = len(ids)
        recorded = self._recorded.get((batch, size_class(max(map(len, ids))), question))
        compiled = self._compiled.get((batch, self.arena.tokens // batch))
        wanted = None if question is not None else compiled
        return recorded is not None and recorded.compiled is wanted and recorded.replay.proven

    def why_not(self) -> str:
        """Why no pass of this model is captured; empty where passes are."""
        model = self._model
        if reason := self.why_no_device():
            return reason
        if len({tensor.device for layer in model.one_token for tensor in layer}) > 1:
            return "the layers lie on several devices"
        if model.rotary.follows_length:
            return "its rotary frequencies follow the length of the text"
        return self._hooked or self._failed

    def claim(self, batch: int, tokens: int) -> list[KV]:
        """Places for a batch of prompts; what still lies there and is in use moves out.

        Args:
            batch: how many prompts.
            tokens: of the longest.

        Returns:
            Keys and values of each layer, ``[batch, kv_heads, places, head_dim]``; the last place
            is for padding. What is linked in them is to be lent out (`Arena.lend`).

        Raises:
            CannotCapture: when passes of this model are not captured, or there is no memory for an
                arena of that size.
        """
        self._ready()
        if self._arena is None or self._arena.tokens // batch <= tokens:
            limit = self._model.max_length or tokens + _ROOM
            each = size_class(min(tokens + _ROOM, max(limit, tokens)) + 1)
            self._allocate(batch * each)
        elif not self._arena.vacate():  # it stays with those who read it
            self._allocate(self._arena.tokens)
        return self.arena.places(batch)

    @property
    def arena(self) -> Arena:
        """The arena of the last claim."""
        assert self._arena is not None
        return self._arena

    def run(
        self, ids: Sequence[Tensor], positions: Sequence[Tensor], due: Due = nothing_due
    ) -> tuple[Tensor, str, float]:
        """Recompute rows of the prompts that lie in the arena, and write their KV into it.

        Args:
            ids: of each prompt, the token ids of the rows to recompute, int64 ``[rows]``.
            positions: where they stand, ascending, the last token of the prompt among them.
            due: called with layers before they are read; by a compiled pass with all of them.

        Returns:
            Logits of each prompt's first new token, ``[batch, vocab_size]``; how the pass ran, for
            the report; and the seconds that capturing took.

        Raises:
            CannotCapture: says why it is to run in another way; the rows may have been written.
        """
        begun = time.perf_counter()
        try:
            return self._run(ids, positions, due)
        except CannotCompile as error:
            self._compile_no_more(str(error))
            lost = time.perf_counter() - begun
            logits, how, seconds = self._run(ids, positions, due)
            return logits, how, lost + seconds

    def _run(
        self, ids: Sequence[Tensor], positions: Sequence[Tensor], due: Due
    ) -> tuple[Tensor, str, float]:
        """`run`; `CannotCompile` where the compiled form of the pass is of no use."""
        logits, recorded, seconds = self._replayed(ids, positions, None, due)
        return logits, self._how(recorded, max(map(len, ids))), seconds

    def masses(
        self,
        ids: Sequence[Tensor],
        positions: Sequence[Tensor],
        question: Question,
        due: Due = nothing_due,
    ) -> tuple[Tensor, float]:
        """How much rows of the prompts that lie in the arena attend to each token.

        Their keys and values are written.

        Args:
            ids: of each prompt, the token ids of the rows, int64 ``[rows]``; one at least.
            positions: where they stand, ascending.
            question: which layers, and whether the values count.
            due: as for `run`.

        Returns:
            The mean over heads and rows, fp32 ``[layers, batch, places]`` on the CPU, and the
            seconds that capturing took.

        Raises:
            CannotCapture: says why it is to be found in another way.
        """
        masses, _, seconds = self._replayed(ids, positions, question, due)
        return masses.cpu(), seconds

    def _replayed(
        self,
        ids: Sequence[Tensor],
        positions: Sequence[Tensor],
        question: Question | None,
        due: Due,
    ) -> tuple[Tensor, _Class, float]:
        """What a pass gives, the recording that gave it, and the seconds that capturing took."""
        batch, longest = len(ids), max(map(len, ids))
        rows = size_class(longest)
        before = self._recorded.get((batch, rows, question))
        if before is None and batch * rows > MOST_ROWS:
            raise CannotCapture(f"{batch * longest} rows would hold too much memory in a graph")
        begun = time.perf_counter()
        recorded = self._record(batch, rows, question)
        seconds = 0.0 if recorded is before else time.perf_counter() - begun
        padded = torch.zeros(2, batch, rows, dtype=torch.int64)
        padded[1] = -1
        for index, (tokens, at) in enumerate(zip(ids, positions, strict=True)):
            padded[:, index, rows - len(tokens) :] = torch.stack([tokens, at])
        recorded.rows.copy_(queued(padded, recorded.rows.device))
        try:
            return recorded.replay(_apart(due)).clone(), recorded, seconds
        except _NotLoaded as failed:
            raise failed.error from None
        except CannotCompile:
            raise
        except torch.OutOfMemoryError as error:  # the first one runs the pass itself, too
            self._recorded.pop((batch, rows, question), None)
            raise CannotCapture(_NO_MEMORY) from error
        except CannotCapture as error:
            self._recorded.clear()
            self._failed = str(error)
            raise

    def _how(self, recorded: _Class, longest: int) -> str:
        """How a pass ran, for the report."""
        _, batch, rows = recorded.rows.shape
        compiled = recorded.compiled is not None
        how = f"captured{' and compiled' * compiled}, {longest} rows in a class of {rows}"
        if batch > 1:
            how += f", {batch} prompts at once"
        if self._not_compiled:
            how += f", not compiled: {self._not_compiled}"
        elif self._compiled and not compiled:
            how += ", not compiled: the warm-up was for other batches or shorter prompts"
        return how

    def warm_up(
        self,
        tokens: int,
        rows: int,
        batch: int,
        progress: bool,
        compiled: bool = False,
        questions: Sequence[Question] = (),
    ) -> None:
        """Allocate the arena and capture every class of rows up to that of `rows`.

        Args:
            tokens: of the longest prompt, and of what is decoded behind it.
            rows: the most that are recomputed in a prompt.
            batch: how many prompts are linked at once; single ones are prepared for as well.
            progress: whether to show a bar, where tqdm is installed.
            compiled: whether to compile passes of these batches before they are captured; those of
                classes that are captured later, over an arena of this size, are compiled as well.
            questions: what passes over a query are asked for besides, in all these classes.

        Raises:
            PICacheError: when nothing can be captured or compiled, or memory does not suffice.
        """
        with self.turn():
            try:
                self._ready()
                if self._arena is None or self._arena.tokens // batch <= tokens:
                    self._allocate(batch * (tokens + 1))
                elif not self._arena.vacate():  # recording writes to places of other divisions
                    self._allocate(self._arena.tokens)
                # The largest first: the others then fit the memory that it has left in the pool.
                asked = (None, *questions)
                classes = classes_up_to(rows)[::-1]
                sizes = [(n, r, one) for r in classes for n in {batch, 1} for one in asked]
                if compiled:
                    self._compile({batch, 1})
                else:
                    self._compile_no_more("")
                for size in bar(sizes, "capturing passes", "size", progress):
                    self._record(*size)
            except CannotCompile as error:
                self._compile_no_more(str(error))
                raise PICacheError(
                    f"warm_up(compile=True) of {type(self._model.model).__name__}: {error}; leave "
                    "out compile=True to have passes captured as they are"
                ) from error
            except CannotCapture as error:
                if compiled:
                    self._compile_no_more(str(error))
                raise PICacheError(
                    f"no pass of {type(self._model.model).__name__} can be captured ahead: {error}"
                ) from error

    def _ready(self) -> None:
        """Raise `CannotCapture` unless passes can be captured; wait for what still loads."""
        if reason := self.why_not():
            raise CannotCapture(reason)
        model = self._model
        if model.device.type == "cuda":
            if not self._checked:
                self._failed = why_no_kernels(model.one_token, model.groups)
                self._checked = True
                if self._failed:
                    raise CannotCapture(self._failed)
            # A link that failed may have left copies to the arena and a replay behind.
            model.wait_for_loading()
            torch.cuda.current_stream(model.device).synchronize()

    def _allocate(self, tokens: int) -> None:
        """A new arena, in place of the one there is."""
        model = self._model
        needed, free = tokens * model.bytes_per_token, _free_bytes(model.device)
        if self._arena is not None and self._arena.vacate():
            free += self._arena.nbytes
        where = f"the keys and values of {tokens:,} tokens need {needed:,} bytes on {model.device}"
        if needed > free:
            raise CannotCapture(f"{where}, and {free:,.0f} are free")
        self._drop_arena()
        try:
            self._arena = Arena(model.one_token, tokens)
        except torch.OutOfMemoryError as error:
            raise CannotCapture(f"{where}, which are not free in pieces of a layer") from error
        dtype = model.one_token[0][0].dtype
        self._recorder = RECORDERS[model.device.type](model.device, dtype)

    def _compile(self, batches: set[int]) -> None:
        """Compile passes of these numbers of prompts, over this arena, once they are recorded."""
        self._not_compiled = ""
        for batch in batches:
            key = batch, self.arena.tokens // batch
            if key not in self._compiled:
                self._compiled[key] = CompiledForward(self._model)

    def _compile_no_more(self, reason: str) -> None:
        """Record passes without compilation from now on, those that were compiled anew."""
        self._compiled.clear()
        self._not_compiled = reason
        for size in [size for size, one in self._recorded.items() if one.compiled is not None]:
            del self._recorded[size]

    def _drop(self) -> None:
        """Forget the arena, and all that was compiled and captured."""
        self._drop_arena()
        self._compile_no_more("")

    def _drop_arena(self) -> None:
        """Forget the arena and all that was captured over it."""
        self._recorded.clear()
        if self._arena is not None:
            self._arena.vacate()
        self._arena = self._recorder = None

    def _record(self, batch: int, rows: int, question: Question | None = None) -> _Class:
        """The recorded pass of this size, captured now where there is none."""
        size = batch, self.arena.tokens // batch
        compiled = None if question is not None else self._compiled.get(size)
        found = self._recorded.get((batch, rows, question))
        if found is not None and found.compiled is compiled:
            return found
        model, places = self._model, self.arena.places(batch)
        with torch.inference_mode(mode=False):
            static = torch.zeros(2, batch, rows, dtype=torch.int64, device=model.device)
            static[1] = -1  # what runs while it is captured writes nowhere
        assert self._recorder is not None
        recorder = self._recorder

        plain = partial(padded_forward, model, static, places)
        if question is not None:
            plain = partial(padded_masses, model, static, places, question)

        def forward(due: Due) -> Tensor:
            # Inside such a block torch.compile leaves functions alone.
            if compiled is None or refusing():
                return plain(due)
            due(range(len(places)))
            return compiled(static, places)

        try:
            if compiled is not None:
                forward(nothing_due)  # what it needs is built before anything is captured
            replay = recorder.record(forward)
            if compiled is not None:
                replay = ProvenCompiled(replay, plain, model.one_token[0][0].dtype)
        except CannotCompile:
            raise
        except CannotCapture as error:
            self._failed = str(error)
            raise
        except torch.OutOfMemoryError as error:
            raise CannotCapture(_NO_MEMORY) from error
        except KernelError as error:
            self._failed = str(error)
            raise CannotCapture(self._failed) from error
        except PICacheError:
            raise
        # Most often Python that reads a tensor of the device. The eager pass says what is wrong
        # otherwise.
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            what = str(error).splitlines()[0] if str(error) else ""
            self._failed = f"capturing failed ({type(error).__name__}: {what})"
            raise CannotCapture(self._failed) from error
        found = self._recorded[batch, rows, question] = _Class(static, replay, compiled)
        return found


class _NotLoaded(Exception):  # noqa: N818 - carries an error past those that a replay may raise
    """What putting layers in place has raised.

    Args:
        error: that.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _apart(due: Due) -> Due:
    """The same, whose errors are not taken for those of the pass."""

    def told_apart(layers: range) -> None:
        try:
            due(layers)
        except Exception as error:
            raise _NotLoaded(error) from error

    return told_apart


def _free_bytes(device: torch.device) -> float:
    """Bytes that tensors on a CUDA device may still take; infinite elsewhere: it is not known."""
    if device.type != "cuda":
        return math.inf
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused
