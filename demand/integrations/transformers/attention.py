"""Whether the engine can run the attention function of a model."""

import inspect
from typing import Any

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from demand.errors import DemandError

_SPARSE_CACHE = "kv_retention"
"""Name under which `sparsity` registers the attention function of a model with a SparseCache."""


def check_attention(model: Any) -> None:
    """Refuse a model whose attention the engine would not run, or would silently replace.

    The engine pages the KV cache itself, and can do so for the attention functions "sdpa" and
    "eager" and the flash attention of transformers.

    Raises:
        DemandError: another attention function, such as that of a SparseCache.
    """
    name = model.config.get_text_config(decoder=True)._attn_implementation  # noqa: SLF001 (no public reader)
    if name == _SPARSE_CACHE:
        raise DemandError(
            f"the model attends by {name!r}, the attention function of a SparseCache, with which "
            "it cannot be batched continuously; first take it off: sparsity.detach(model)"
        )
    if name not in ("sdpa", "eager", "paged|eager") and "flash" not in (name or ""):
        raise DemandError(
            f"the model attends by {name!r}, with which it cannot be batched continuously; set "
            'another first: model.set_attn_implementation("sdpa")'
        )
    function = ALL_ATTENTION_FUNCTIONS.get(name)  # "eager" is the model's own, and not among them
    module = inspect.getmodule(function)
    is_kernel = "/" in name  # of a repository of the Hub
    if module is not None and not is_kernel and module.__name__.split(".")[0] != "transformers":
        raise DemandError(
            f"the attention function {name!r} was replaced by {module.__name__}."
            f"{getattr(function, '__qualname__', function)}, which cannot be batched continuously; "
            "register that of transformers again, or load the model in another process"
        )
