"""Tensor parallelism: a model whose layers several processes share, each with its own KV heads."""

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a weight that is shared out; any other tensor as it is."""
    if dist.is_available():
        from torch.distributed.tensor import DTensor

        if isinstance(tensor, DTensor):
            return tensor.to_local()
    return tensor


class Shards:
    """The processes that share each layer of a model; all of them make the same calls.

    Each keeps the KV of its own heads. What is read across heads, to choose tokens by, is summed
    over the processes, so that all of them choose the same.

    Attributes:
        rank: of this process among them.
        size: how many they are, at least 2.
    """

    def __init__(self, mesh: Any) -> None:
        self.rank: int = mesh.get_local_rank()
        self.size: int = mesh.size()
        self._group = mesh.get_group()
        self._device = torch.device(mesh.device_type)

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Shards | None":
        """Those of a model as transformers loads it with a `tp_plan`; None for a whole model."""
        mesh: Any = getattr(model, "_device_mesh", None)  # there is no public name
        if mesh is None or "tp" not in (mesh.mesh_dim_names or ("tp",)):
            return None
        mesh = mesh["tp"] if mesh.ndim > 1 else mesh
        return cls(mesh) if mesh.size() > 1 else None

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, the same bits in each."""
        total = tensor.detach().clone().to(self._device)
        dist.all_reduce(total, group=self._group)
        return total.to(tensor.device)

    def everywhere(self, holds: bool) -> bool:
        """Whether it holds in all of the processes."""
        found = torch.tensor(int(holds), device=self._device)
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self._group)
        return bool(found)

    def fingerprint(self, digest: str) -> str:
        """A hash of the digests of all processes and of this one's place among them.

        The KV of some heads depends on the weights of all others, and is not that of a whole model.
        """
        own = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8, device=self._device)
        every = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(every, own, group=self._group)
        joined = hashlib.sha256(f"{self.rank} of {self.size}".encode())
        for one in every:
            joined.update(bytes(one.tolist()))
        return joined.hexdigest()
