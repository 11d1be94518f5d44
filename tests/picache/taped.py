"""A recorder for CPUs that, as a CUDA graph does, replays operations over the memory of recording.

It runs no Python of the model, so that whatever a replay does not notice shows.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from typing_extensions import override

from picache.hf import recorders
from picache.hf.due import nothing_due


class _Tape(TorchDispatchMode):
    """Notes every operation with the tensors that it read and made."""

    def __init__(self):
        super().__init__()
        self.operations = []

    @override
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        # Their memory, as a graph knows it, and not the parameters that stand for it.
        read = tree_map(_memory, (args, kwargs or {}))
        self.operations.append((func, *read, made))
        return made


def _memory(value):
    return value.detach() if isinstance(value, Tensor) else value


class Taped:
    """Stands for `recorders.CUDAGraphs`; `Taped.runs` counts what is recorded and replayed.

    Args:
        device: of the model.
        dtype: of the model.
    """

    runs: list[str]

    def __init__(self, device, dtype):
        self._dtype = dtype

    def record(self, forward):
        forward(nothing_due)
        tape = _Tape()
        with torch.no_grad(), tape:
            result = forward(tape.operations.append)
        self.runs.append("record")

        @torch.no_grad()
        def replay(due):
            self.runs.append("replay")
            for operation in tape.operations:
                if isinstance(operation, range):  # layers that are due here
                    due(operation)
                    continue
                func, args, kwargs, made = operation
                again = func(*args, **kwargs)
                for now, then in zip(tree_leaves(again), tree_leaves(made), strict=True):
                    moved = isinstance(now, Tensor) and now.numel()
                    if moved and now.data_ptr() != then.data_ptr():
                        then.copy_(now)
            return result

        return recorders.Proven(replay, forward, self._dtype)
