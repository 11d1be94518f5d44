"""How `generate` compiles a step of decoding, and what a compiled step depends on.

torch.compile guards each attribute that a graph was traced from, here some ten thousand, and looks
at all of them before each token: about a millisecond. What a step depends on does not change while
`generate` runs, so that it is summed up in one string when a call begins, and that string is
guarded instead: a model or a cache that differs in any of it is traced anew.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import CompileConfig, PretrainedConfig

from sparsity.retention.layer import LayerRetention

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_MODES = 64  # longest container that is looked into


def compile_config() -> CompileConfig:
    """How `generate` compiles a step: into one graph, that CUDA graphs replay."""
    if not _filters_guards():
        return CompileConfig(fullgraph=True, dynamic=False)
    options = {"triton.cudagraphs": True, "guard_filter_fn": guards_kept}
    return CompileConfig(fullgraph=True, dynamic=False, mode=None, options=options)  # type: ignore[arg-type]


def _filters_guards() -> bool:
    """Whether this torch takes `guard_filter_fn`: from 2.8 on."""
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 8)


def guards_kept(guards: Sequence[Any]) -> list[bool]:
    """Which guards torch.compile keeps: not those on what a `signature` sums up."""
    return [_kept(guard) for guard in guards]


def _kept(guard: Any) -> bool:
    if guard.orig_guard.source.is_unspecialized_nn_module():
        return False
    if guard.name.startswith("G["):  # code; of what it reads, only torch's global hooks may change
        return "_global_" in guard.name
    _, inside, path = guard.name.partition("past_key_values']")
    return not inside or path in ("", ".signature", "._state.armed")


def signature(model: nn.Module, retentions: dict[int, LayerRetention], more: object) -> str:
    """A hash of all that a compiled step depends on, but the values of tensors.

    Args:
        model: that decodes.
        retentions: of the cache, each with its pool.
        more: anything else with a repr.
    """
    found = hashlib.sha256(repr(more).encode())
    for part in (*_of_model(model), *map(_of_retention, retentions.values())):
        found.update(part.encode())
    return found.hexdigest()


def _of_retention(retention: LayerRetention) -> str:
    pool = retention.pool
    assert pool is not None
    tensors = {name: _kind(tensor) for name, tensor in pool.tensors().items()}
    state = (retention.layer, retention.first_head, retention.places, type(retention.move))
    return f"{retention.policy!r}{state}{tensors}"


def _of_model(model: nn.Module) -> Iterator[str]:
    """What each module and config has that is no module, tensor or function of its class."""
    for name, module in model.named_modules():
        plain = {key: _plain(value) for key, value in vars(module).items()}
        tensors = {key: _kind(x) for key, x in module.named_parameters(recurse=False)}
        tensors |= {key: _kind(x) for key, x in module.named_buffers(recurse=False)}
        yield f"{name}{type(module)}{plain}{tensors}"


def _plain(value: object) -> str:
    """The value, where it is one that a graph may have been traced from; else what it is."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, PretrainedConfig):
        return str({key: _plain(inner) for key, inner in vars(value).items()})
    if isinstance(value, dict) and len(value) <= _MODES:
        return str({key: _plain(inner) for key, inner in value.items()})
    if isinstance(value, list | tuple | set | frozenset) and len(value) <= _MODES:
        return str([_plain(inner) for inner in value])
    return f"{type(value)} {id(value)}" if callable(value) else str(type(value))


def _kind(tensor: torch.Tensor) -> tuple[object, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
