"""Tensor parallelism: which KV heads of a layer this process holds."""

from typing import Any

from transformers import PreTrainedModel

from sparsity.errors import SparsityError
from sparsity.policies.base import Policy


def tensor_rank(model: PreTrainedModel) -> int | None:
    """Rank of this process among those that share each layer; None for a model that is whole."""
    mesh: Any = getattr(model, "_device_mesh", None)
    if mesh is None or "tp" not in (mesh.mesh_dim_names or ("tp",)):
        return None
    mesh = mesh["tp"] if mesh.ndim > 1 else mesh
    return mesh.get_local_rank() if mesh.size() > 1 else None


def kv_heads(config: Any) -> int:
    """KV heads of a layer in the whole model."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def first_head(rank: int, total: int, heads: int, policy: Policy) -> int:
    """Index in its layer of the first KV head that this process holds.

    A decision for one KV head is the same in whatever process the head is. One for all heads of a
    layer would need them all in one process, so that a policy which takes such decisions is
    refused.

    Args:
        rank: of this process, see `tensor_rank`.
        total: KV heads of the layer in the whole model.
        heads: KV heads of the layer in this process.
        policy: of the layer.

    Raises:
        SparsityError: for a policy with `shared_heads`.
    """
    if heads == total:
        return 0
    if getattr(policy, "shared_heads", False):
        name = type(policy).__name__
        raise SparsityError(
            f"{name} with shared_heads=True decides once for all {total} KV heads of a layer, and "
            f"tensor parallelism leaves {heads} of them in this process; use shared_heads=False, "
            "or the model in one process"
        )
    return rank * heads
