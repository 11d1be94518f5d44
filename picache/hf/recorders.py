"""What records a pass: as CUDA graphs, whose first result is held against that of the pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from picache.hf.due import Due, nothing_due
from picache.hf.graph_pieces import GraphPieces
from picache.hf.padded_forward import CannotCompile
from picache.hf.reading_back import RefuseReadingBack
from picache.hf.sparse_pass import CannotCapture

Forward = Callable[[Due], Tensor]
"""A pass over tensors whose addresses never change; its result lies where the next one writes.

It calls what it is given with the layers that it is about to read."""


class Recording(Protocol):
    """A pass that was recorded.

    Attributes:
        proven: whether calling it does no more than what was recorded.
    """

    proven: bool

    def __call__(self, due: Due) -> Tensor:
        """What the pass gives, on what stands in its memory, once `due` has put it there."""
        ...


class Recorder(Protocol):
    """Records passes of one model."""

    def record(self, forward: Forward) -> Recording:
        """A function that does what `forward` does, on what then stands in its memory."""
        ...


class CUDAGraphs:
    """Records passes as CUDA graphs.

    Args:
        device: of the model.
        dtype: of the model.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._stream = torch.cuda.Stream(device)  # one for all: libraries keep memory for each
        self._pool = torch.cuda.graph_pool_handle()  # graphs that never run at the same time

    def record(self, forward: Forward) -> Recording:
        """Capture it; see `Recorder`."""
        with torch.cuda.device(self._device):
            here = torch.cuda.current_stream()
            self._stream.wait_stream(here)
            # Libraries make their plans and workspaces, and what cannot be captured is found out.
            with torch.cuda.stream(self._stream), RefuseReadingBack():
                forward(nothing_due)
            here.wait_stream(self._stream)
            pieces = GraphPieces(self._stream, self._pool)
            with _workspaces_of_its_own():
                logits = pieces.capture(forward)

        def replay(due: Due) -> Tensor:
            with torch.cuda.device(self._device):
                pieces.replay(due)
            return logits

        return Proven(replay, forward, self._dtype)


class Proven:
    """A recorded pass whose first result is held against that of the pass itself.

    Args:
        replay: the recording.
        forward: what was recorded; does the same again when it is called again.
        dtype: of the model, which tells by how much two runs may differ.
    """

    slack = 1.0
    """Factor on the distance that is put down to rounding."""

    def __init__(self, replay: Forward, forward: Forward, dtype: torch.dtype) -> None:
        self._replay, self._forward, self._dtype = replay, forward, dtype
        self.proven = False

    def __call__(self, due: Due) -> Tensor:
        """What the pass gives; `CannotCapture` where the recording gives something else."""
        given = self._replay(due)
        if not self.proven:
            expected = self._forward(nothing_due)
            bound = 1e-4 if self._dtype in (torch.float32, torch.float64) else 3e-2
            off = (given - expected).float().norm() / expected.float().norm()
            if not off <= self.slack * bound:  # nor where it is not a number
                self._refuse(f"gave numbers that are {float(off):.1e} off those of the pass")
            self.proven = True
        return given

    def _refuse(self, what: str) -> NoReturn:
        raise CannotCapture(f"the captured pass {what} it was captured from")


class ProvenCompiled(Proven):
    """A compiled pass whose first result is held against that of the plain pass.

    The compiler rounds elsewhere than the plain pass does, and no less well.

    Args:
        replay: the compiled pass, recorded.
        forward: the plain pass.
        dtype: as for `Proven`.
    """

    slack = 4.0

    @override
    def _refuse(self, what: str) -> NoReturn:
        raise CannotCompile(f"the compiled pass {what} without compilation")


class RunAgain:
    """The slow twin of `CUDAGraphs`: a recorded pass is run again each time.

    Args:
        device: of the model.
        dtype: of the model.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        pass

    def record(self, forward: Forward) -> Recording:
        """Run it once, to see whether it can be; see `Recorder`."""
        forward(nothing_due)
        return Again(forward)


class Again:
    """A pass that is run again each time.

    Args:
        forward: the pass.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward, self.proven = forward, True

    def __call__(self, due: Due) -> Tensor:
        """What the pass gives."""
        return self._forward(due)


RECORDERS: dict[str, Callable[[torch.device, torch.dtype], Recorder]] = {"cuda": CUDAGraphs}
"""What records passes, by the kind of device; on others they are not recorded."""


@contextmanager
def _workspaces_of_its_own() -> Iterator[None]:
    """What is captured inside the block takes cuBLAS's workspace from the memory of its graph.

    A workspace that was there before would be freed by whoever clears them all, as torch's compiler
    does for graphs of its own, while this graph still writes to it.
    """
    torch._C._cuda_clearCublasWorkspaces()  # noqa: SLF001 - no public name for it
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()  # noqa: SLF001 - or others would use the graph's
