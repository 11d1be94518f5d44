"""How `generate` compiles a step of decoding, and what a compiled step depends on.

torch.compile guards each attribute that a graph was traced from, here some ten thousand, and looks
at all of them before each token: about a millisecond. Of the model and the cache that does not
change while `generate` runs, so that it is summed up in one string when a call begins, and that
string is guarded instead: a model or a cache that differs in any of it is traced anew. Guards on
hooks, and on globals of code that is neither ours nor a library's, are kept.
"""

import gc
import hashlib
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import CompileConfig, GenerationConfig

from sparsity.hf.generate_watch import Watched
from sparsity.retention.layer import LayerRetention

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_MOST = 64  # entries of the longest container that is looked into
_OF_GENERATE = ("_compiled_call", "_last_compile_config", "generation_config")
_LIBRARIES = ("torch", "transformers", "sparsity")
_STEPS: set[str] = set()  # signatures of all steps that were compiled
_traces, _collected = 0, 0  # graphs that were traced with `guards_kept`


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
    """Which guards torch.compile keeps: those on what no `signature` sums up.

    Called by it once for each graph that it has traced.
    """
    global _traces
    _traces += 1
    return [_kept(guard) for guard in guards]


def _kept(guard: Any) -> bool:
    name = guard.name
    if "hooks" in name:  # what a hook reads may be anything
        return not guard.guard_type.startswith("EMPTY")
    if guard.orig_guard.source.is_unspecialized_nn_module():
        return False
    if "G['" in name:
        return not _of_a_library(name)
    _, inside, path = name.partition("past_key_values']")
    return not inside or path in ("", ".signature", "._state.armed", "._state.begun")


def _of_a_library(name: str) -> bool:
    """Whether a guard is on a global of code that is not the user's."""
    scope = name.split("G['", 1)[1].split("']", 1)[0]
    if not scope.startswith("__import_"):  # of the file that the traced call starts in, or builtin
        return True
    return scope.removeprefix("__import_").split("_dot_")[0] in _LIBRARIES


def collect_traces() -> None:
    """Collect what torch.compile has traced with since the last time: it holds a cache, in circles.

    Below torch 2.8, and with a `compile_config` of the user's own, that is left to Python.
    """
    global _collected
    if _collected != _traces:
        _collected = _traces
        gc.collect()


def note_step(signature: str) -> bool:
    """Note that a step of this signature is compiled; whether it is the first of its kind.

    torch.compile refuses to trace a function more than eight times, as it cannot know that it is
    traced for so many models, policies and batches. Its limit is raised with them.
    """
    new = signature not in _STEPS
    _STEPS.add(signature)
    config: Any = torch._dynamo.config  # noqa: SLF001 (the documented place)
    config.recompile_limit = max(config.recompile_limit, len(_STEPS) + 8)  # of this thread alone
    return new


def signature(model: nn.Module, retentions: dict[int, LayerRetention], more: object) -> str:
    """A hash of what a compiled step depends on and what may change between two calls.

    Of tensors their kinds, not their values, which a step reads; of code the identities.

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
    pool, policy = retention.pool, retention.policy
    assert pool is not None
    tensors = {name: _kind(tensor) for name, tensor in pool.tensors().items()}
    state = (retention.layer, retention.first_head, retention.places, type(retention.move))
    classes = (id(type(policy)), id(type(policy.decoding)))  # as a notebook defines them anew
    return f"{policy!r}{classes}{state}{tensors}"


def _of_model(model: nn.Module) -> Iterator[str]:
    """Of each module what a graph may have been traced from, and of its file the functions."""
    files: set[str] = set()
    numbers: dict[int, int] = {}  # of parameters, so that tied ones are told from others
    for name, module in model.named_modules():
        file = type(module).__module__
        if file not in files:
            files.add(file)
            functions = vars(sys.modules[file]).items()
            yield str({key: id(value) for key, value in functions if callable(value)})
        plain = {
            key: _plain(value) for key, value in vars(module).items() if key not in _OF_GENERATE
        }
        own = module.named_parameters(recurse=False)
        tensors = {key: (*_kind(x), numbers.setdefault(id(x), len(numbers))) for key, x in own}
        tensors |= {key: _kind(x) for key, x in module.named_buffers(recurse=False)}
        yield f"{name}{type(module)}{id(type(module).forward)}{plain}{tensors}"


def _plain(value: object, depth: int = 4) -> str:
    """The value, where it is one that a graph may have been traced from; else what it is."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, torch.Tensor | GenerationConfig | Watched) or not depth:
        return str(type(value))
    inside = partial(_plain, depth=depth - 1)
    if isinstance(value, dict) and len(value) <= _MOST:
        return str({key: inside(each) for key, each in value.items()})
    if isinstance(value, list | tuple | set | frozenset) and len(value) <= _MOST:
        return str([inside(each) for each in value])
    if callable(value):
        return f"{type(value)} {id(value)}"
    return f"{type(value)}{inside(getattr(value, '__dict__', None))}"


def _kind(tensor: torch.Tensor) -> tuple[object, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
