"""The names a user needs; transformers is loaded when a model is handed in, not before."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sparsity.policy import Policy
from sparsity.report import Report

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


class SparseCache:
    """A transformers cache that keeps what a policy keeps.

    ``model.generate(**inputs, past_key_values=SparseCache(model, RaaS(budget=1024)))`` is all
    there is to do. The object is a ``transformers.Cache``: ``layers[i].keys`` and ``.values`` are
    what layer i holds, ``get_seq_length()`` the number of tokens seen. Layers with full attention
    follow the policy; layers with a sliding window or linear attention stay as transformers has
    them. Left-padded batches, beams, sampling, several turns, chunked prefill, tensor parallelism,
    ``offload(layer)``, ``reset()`` and ``copy.deepcopy`` work; going back (assisted decoding,
    ``crop``) is refused.

    Arguments:
        model: a transformers model for text generation on the attention interface. It is attached
            (see `attach`) and stays so until ``detach(model)``; other caches still work with it.
        policy: what to keep. A frozen dataclass such as ``RaaS(budget=1024)``; budget in tokens.
        past: any transformers cache to go on from; its tensors are read, never written to. Hand
            ``generate`` the full `input_ids`, the cached ones included, and at least one more.
            Its tokens count as a prompt. One row may go on as many (beams, a shared prefix).

    Raises SparsityError for a model that cannot be attached, or whose rotation is not proven where
    the policy counts positions inside the cache, a `past` that does not fit, and, in a forward, for
    a prompt that is already cached whole, another model, a batch of another size, a prompt that
    fills a budget it is pinned in.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "SparseCache":
        """An instance of the class that is bound to transformers."""
        from sparsity.hf import BoundSparseCache

        return super().__new__(BoundSparseCache)

    if TYPE_CHECKING:

        def __init__(
            self, model: "PreTrainedModel", policy: Policy, past: "Cache | None" = None
        ) -> None: ...

        layers: list[Any]

        def get_seq_length(self, layer_idx: int = 0) -> int:
            """Tokens seen so far, padding included."""
            ...

        def reset(self) -> None:
            """Forget everything: as new, `past` gone too."""
            ...

    @property
    def policy(self) -> Policy:
        """The policy of this cache."""
        raise NotImplementedError

    def report(self) -> Report:
        """What is held now, measured from the tensors; waits for the device."""
        raise NotImplementedError


@contextmanager
def keep_attached(model: "PreTrainedModel") -> Iterator[None]:
    """Attached or not, the model is after the block what it was before."""
    from sparsity.hf_attach import is_attached

    before = is_attached(model)
    try:
        yield
    finally:
        if not before:
            detach(model)


def attach(model: "PreTrainedModel") -> None:
    """Let `model` work with SparseCache; done by ``SparseCache(model, policy)`` already.

    Sets one attention function and adds two hooks on the model's decoder. Nothing else of the
    model changes, and with other caches its results stay the same. Calling it again does nothing.
    Raises SparsityError, with the model left as it was, when the model is not supported.
    """
    from sparsity.hf_attach import attach_model

    attach_model(model)


def detach(model: "PreTrainedModel") -> None:
    """Undo `attach`: the model is as it was before. Does nothing to a model not attached."""
    from sparsity.hf_attach import detach_model

    detach_model(model)
