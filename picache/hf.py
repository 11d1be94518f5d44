"""All contact with transformers: what the engine needs of a model, and the linked cache."""

import copy
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    DynamicCache,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer

from picache.attention import scattered_attention
from picache.check import check
from picache.chunk import KV
from picache.errors import PICacheError
from picache.rope import Angles, Rotation, calibrate, frequencies

_NAME = "picache_scattered"
_WINDOWS = ("sliding_window", "attention_chunk_size")  # of any layer, tokens
_FAR = 2**16  # a length to look at where the configuration states no limit
_REFUSED = ("position_bias", "indices")  # arguments that change scores in ways not known here

# Where the rows of the pass under way stand; read by the mask function, which sees no other state.
_positions: ContextVar[Tensor] = ContextVar("picache_positions")


@dataclass(frozen=True)
class ScatterMask:
    """A mask that is not made yet: HF's index function, to be asked at true positions."""

    function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    positions: Tensor

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        """Allowed, bool ``[q, n]``, at positions ``[q]`` and ``[n]``."""
        zero = torch.zeros((), dtype=torch.int64, device=query.device)
        allowed = self.function(zero, zero, query[:, None], key[None, :])
        return allowed.expand(len(query), len(key))

    def to(self, *args: Any, **kwargs: Any) -> "ScatterMask":
        """Follow a layer to its device, as accelerate asks of arguments."""
        return ScatterMask(self.function, self.positions.to(*args, **kwargs))


def _scattered_mask(mask_function: Callable, **_: object) -> ScatterMask:
    return ScatterMask(mask_function, _positions.get())


def _scattered_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: ScatterMask,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise PICacheError(
                f"{type(module).__name__} changes its attention scores through {name!r}, which "
                "linking does not know: use a full prefill with this model"
            )
    out = scattered_attention(
        query,
        key,
        value,
        attention_mask.positions,
        attention_mask,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap,
        s_aux,
    )
    return out.transpose(1, 2).contiguous(), None


class _ScatterLayer(DynamicLayer):
    """Whole-prompt keys and values; an update writes the recomputed rows in their places."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.positions = keys, values, positions

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> KV:
        self.keys.index_copy_(2, self.positions, key_states)
        self.values.index_copy_(2, self.positions, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0


class LinkedLayer(DynamicLayer):
    """One layer of a linked prompt; goes on as a `DynamicLayer`, expanding for beams by itself."""

    keys: Tensor
    values: Tensor

    is_croppable = False

    def __init__(self, keys: Tensor, values: Tensor, index: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.index = keys, values, index

    def crop(self, *args: object, **kwargs: object) -> None:
        """Refused: assisted decoding feeds the prompt again and then rolls back."""
        _refuse_assistance()

    def activate_past_recording(self) -> None:
        """Refused, before anything is fed."""
        _refuse_assistance()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> KV:
        """Append; the batch may grow by a factor once, as beams and `num_return_sequences` do.

        Raises:
            PICacheError: when the batch does not fit, or when the whole prompt is fed again.
        """
        batch, held = key_states.shape[0], self.keys.shape[0]
        if batch != held:
            if batch % held:
                raise PICacheError(
                    f"the linked cache holds a batch of {held}, the model was given {batch}: "
                    "link one prompt per row, or generate from this prompt's own input_ids"
                )
            self.batch_repeat_interleave(batch // held)
        if self.index == 0 and key_states.shape[2] > 1 and self._holds(key_states, value_states):
            raise PICacheError(
                f"the cache already holds {self.keys.shape[2]} tokens and the model was given "
                "some of them again: pass input_ids with at least one token more than the cache, "
                "and take a fresh cache from the prompt (prompt['past_key_values']) for each run; "
                "for assisted decoding, which feeds it again, leave out assistant_model and "
                "prompt_lookup_num_tokens"
            )
        return super().update(key_states, value_states)

    def _holds(self, *new: Tensor) -> bool:
        """Whether the first two new tokens stand in the cache of layer 0 already, side by side.

        There keys and values depend on the token and its position alone, so equal ones are tokens
        of the prompt fed at their old positions again; the same tokens at later positions differ
        by a whole rotation, of the keys or, where keys are latents (MLA), of the values. The bound
        is far over the rounding of half precision.
        """
        errors = []
        for place in (0, 1):
            ones = [part[:, :, place : place + 1].float() for part in new]
            distances = [
                (held.float() - one).square().sum(dim=(1, 3)) / one.square().sum(dim=(1, 3))
                for held, one in zip((self.keys, self.values), ones, strict=True)
            ]
            errors.append(torch.maximum(*distances))
        return bool(((errors[0][:, :-1] < 0.01) & (errors[1][:, 1:] < 0.01)).any())


def _refuse_assistance() -> None:
    raise PICacheError(
        "a linked cache cannot roll back, so assisted and prompt-lookup decoding and crop() are "
        "refused: leave out assistant_model and prompt_lookup_num_tokens"
    )


class LinkedCache(Cache):
    """The cache `PIC.link` hands to `generate`: every layer full, all prompt tokens but the last.

    Args:
        kv: keys and values per layer, each ``[batch, kv_heads, tokens, head_dim]``.
    """

    def __init__(self, kv: list[KV]) -> None:
        self._linked = [LinkedLayer(keys, values, i) for i, (keys, values) in enumerate(kv)]
        super().__init__(layers=list(self._linked))

    def fork(self) -> "LinkedCache":
        """A second cache on the same tensors, safe because layers append by concatenation."""
        return LinkedCache([(layer.keys, layer.values) for layer in self._linked])


class HFModel:
    """What the engine asks of a causal language model.

    Raises:
        PICacheError: when the model cannot be linked exactly; says why.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if not isinstance(model, PreTrainedModel):
            raise PICacheError(
                f"PIC needs a transformers PreTrainedModel, got {type(model).__name__}: "
                "load it with AutoModelForCausalLM.from_pretrained"
            )
        name = type(model).__name__
        if model.training:
            raise PICacheError(f"{name} is in training mode: call model.eval() first")
        if model.config.is_encoder_decoder or not model.can_generate():
            raise PICacheError(f"{name} is not a causal language model: PIC links decoder prompts")
        if model._is_stateful:  # noqa: SLF001 - no public name for it
            raise PICacheError(
                f"{name} keeps a recurrent state beside keys and values, which holds the whole "
                "prefix and cannot be linked: use a full prefill with this model"
            )
        self.model = model
        decoder: Any = model.get_decoder()
        # Some models name their output layer `decoder`.
        self.decoder = decoder if isinstance(decoder, PreTrainedModel) else model.base_model
        self.config = model.config.get_text_config(decoder=True)
        embedding: Any = model.get_input_embeddings()
        self.vocab_size: int = embedding.weight.shape[0]
        self.max_length: int | None = getattr(self.config, "max_position_embeddings", None)
        windows = [
            getattr(self.config, n, None) for n in ("sliding_window", "attention_chunk_size")
        ]
        self.window: int | None = min((w for w in windows if w), default=None)
        self._stretches = False  # until it is measured, with the rotations at hand
        self._digest: tuple[object, str] = (None, "")
        try:
            self._prove()
        except PICacheError as error:
            if model._supports_attention_backend:  # noqa: SLF001 - no public name for it
                raise
            raise PICacheError(
                f"{name} does not state that it uses transformers' attention interface, and "
                f"linking it was tried in vain: {error}"
            ) from error

    def _prove(self) -> None:
        """Measure the rotations and whether frequencies follow the length, then link a prompt."""
        self._rotary = self._find_rotary()
        self.rotations: list[Rotation | None] = calibrate(self._kv_at, self._cos_sin)
        rotated = (layer for layer, rotation in enumerate(self.rotations) if rotation is not None)
        self._rotated = list({self._layer_type(layer): layer for layer in rotated}.values())
        self._short = self._angles_in(2)
        self._stretches = not torch.equal(
            self._short, self._angles_in(2 * (self.max_length or _FAR))
        )
        check(self)

    @property
    def device(self) -> torch.device:
        """Where the first parameter lives."""
        return self.model.device

    def _find_rotary(self) -> nn.Module:
        modules = self.decoder.modules()
        rotary = next((m for m in modules if type(m).__name__.endswith("RotaryEmbedding")), None)
        if rotary is None:
            raise PICacheError(
                f"{type(self.model).__name__} has no rotary embedding module: positions that are "
                "learned, relative or made in another way cannot be moved, use a full prefill"
            )
        return rotary

    def prefill(self, ids: Tensor, position: int = 0) -> list[KV]:
        """KV of ids ``[1, n]`` alone, from `position` on, by the model's own attention."""
        return self._prefill(ids, torch.arange(position, position + ids.shape[1])[None])

    @torch.no_grad()
    def _prefill(self, ids: Tensor, positions: Tensor) -> list[KV]:
        """KV of ids ``[batch, n]`` at positions of the same shape.

        A `DynamicCache` without a config keeps every key of sliding-window layers too.
        """
        if self._stretches:
            self._settle()
        cache = DynamicCache()
        self.decoder(
            input_ids=ids.to(self.device),
            position_ids=positions.to(self.device),
            past_key_values=cache,
            use_cache=True,
        )
        full = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
        return [(x.keys, x.values) for x in full if x.keys is not None and x.values is not None]

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """Logits of the last of ids ``[1, n]``, ``[1, vocab_size]``, of the model without cache."""
        out = self.model(input_ids=ids.to(self.device), use_cache=False, logits_to_keep=1)
        return out.logits[:, -1]

    def _kv_at(self, positions: Tensor, tokens: Tensor) -> list[KV]:
        """What every layer caches of each token alone at its position; refused when not KV."""
        name = type(self.model).__name__
        try:
            kv = self._prefill(tokens[:, None] % self.vocab_size, positions[:, None])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise PICacheError(
                f"{name} does not prefill into a plain DynamicCache ({type(error).__name__}: "
                f"{error}), most often since its layers keep another kind of state: use a full "
                "prefill with this model"
            ) from error
        layers = self.config.num_hidden_layers
        if len(kv) != layers or any(tensor.dim() != 4 for layer in kv for tensor in layer):
            raise PICacheError(
                f"{name} has {layers} layers but caches keys and values in {len(kv)}: layers that "
                "share keys or keep another kind of state cannot be linked, use a full prefill"
            )
        return kv

    def _layer_type(self, layer: int) -> str | None:
        """The layer type the rotary module asks for, where its frequencies differ by type."""
        types: list[str] | None = getattr(self.config, "layer_types", None)
        takes = "layer_type" in inspect.signature(self._rotary.forward).parameters
        return types[layer] if types and takes else None

    def _cos_sin(self, layer: int, positions: Tensor, rotary: nn.Module | None = None) -> Angles:
        """What the rotary module returns at positions; an fp32 input keeps the result in fp32."""
        x = torch.zeros(1, 1, dtype=torch.float32, device=self.device)
        arguments: list[object] = [x, positions[None].to(self.device)]
        if (layer_type := self._layer_type(layer)) is not None:
            arguments.append(layer_type)
        try:
            out = (rotary or self._rotary)(*arguments)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise PICacheError(
                f"the rotary module of {type(self.model).__name__} does not take positions of "
                f"shape {tuple(positions[None].shape)} ({type(error).__name__}: {error}): its "
                "rotation cannot be measured, use a full prefill with this model"
            ) from error
        cos, sin = (out.real, out.imag) if isinstance(out, Tensor) else out
        return cos[0].float(), sin[0].float()

    def angles(self, layer: int, positions: Tensor) -> Angles:
        """cos and sin at positions ``[tokens]``, each ``[tokens, rotary_dim / 2]``, fp32."""
        rotation = self.rotations[layer]
        if rotation is None:
            raise PICacheError(f"layer {layer} has no rotary positions")
        return frequencies(*self._cos_sin(layer, positions), rotation.source)

    def _angles_in(self, length: int) -> Tensor:
        """How position 1 is rotated in a sequence of so many tokens.

        A copy of the rotary module is asked: one that follows the length keeps its last state.
        """
        rotary, at = copy.deepcopy(self._rotary), torch.tensor([1, length - 1])
        seen = []
        for layer in self._rotated:
            self._cos_sin(layer, torch.tensor([0]), rotary)  # back to the short ones, if it can
            seen.append(torch.cat(self._cos_sin(layer, at, rotary), dim=1)[0])
        return torch.cat(seen) if seen else torch.empty(0)

    def _settle(self) -> None:
        """Back to the short frequencies, which a longer text in between has replaced.

        Raises:
            PICacheError: when the rotary module does not go back.
        """
        for layer in self._rotated:
            self._cos_sin(layer, torch.tensor([0]))
        if not torch.equal(self._angles_in(2), self._short):
            raise PICacheError(
                f"{type(self.model).__name__} still rotates keys with the frequencies of a longer "
                "text it was given before (a dynamic RoPE that does not go back, in some releases "
                "of transformers): load the model again, and give it no longer text"
            )

    def check_frequencies(self, compiled: Iterable[int], total: int) -> None:
        """Refuse to link chunks compiled with other rotary frequencies than the prompt's.

        Args:
            compiled: tokens of each chunk as compiled.
            total: tokens of the linked prompt.

        Raises:
            PICacheError: when the model's frequencies follow the length and differ between the two.
        """
        if not self._stretches:
            return
        self._settle()
        for length in sorted(set(compiled)):
            if not torch.equal(self._angles_in(length), self._angles_in(total)):
                raise PICacheError(
                    f"{type(self.model).__name__} rotates keys with other frequencies in a prompt "
                    f"of {total} tokens than in a chunk compiled with {length}: its RoPE follows "
                    f"the length (longrope, dynamic). Link at most {self._longest(length, total)} "
                    "tokens, or use a full prefill"
                )

    def _longest(self, same: int, other: int) -> int:
        """The longest prompt with the frequencies of `same` tokens, by bisection."""
        while other - same > 1:
            middle = (same + other) // 2
            alike = torch.equal(self._angles_in(same), self._angles_in(middle))
            same, other = (middle, other) if alike else (same, middle)
        return same

    @torch.no_grad()
    def scattered_forward(self, ids: Tensor, positions: Tensor, kv: list[KV]) -> Tensor:
        """Run only the rows at `positions` through the layers; write their KV into `kv`.

        Args:
            ids: token ids of the rows, int64 ``[rows]``.
            positions: where they stand, int64 ``[rows]``, ascending, each once.
            kv: keys and values of the whole prompt, overwritten in place at the rows.

        Returns:
            Logits of the last row, ``[1, vocab_size]``.
        """
        positions = positions.to(self.device)
        cache = Cache(layers=[_ScatterLayer(keys, values, positions) for keys, values in kv])
        token = _positions.set(positions)
        try:
            with self._attending():
                out = self.model(
                    input_ids=ids[None].to(self.device),
                    position_ids=positions[None],
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
        finally:
            _positions.reset(token)
        return out.logits[:, -1]

    @contextmanager
    def _attending(self) -> Iterator[None]:
        """The decoder attends by position inside the block, and as before after it."""
        AttentionInterface.register(_NAME, _scattered_attention)
        AttentionMaskInterface.register(_NAME, _scattered_mask)
        modules = self.decoder.modules()
        configs: dict[int, Any] = {id(m.config): m.config for m in modules if hasattr(m, "config")}
        before = [(c, c._attn_implementation) for c in configs.values()]  # noqa: SLF001
        try:
            for config, _ in before:
                config._attn_implementation = _NAME  # noqa: SLF001
            yield
        finally:
            for config, implementation in before:
                config._attn_implementation = implementation  # noqa: SLF001

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the configuration and sums over the bits of every parameter and buffer.

        Models of one configuration with other weights or another dtype do not share chunks. Made
        again when a tensor was replaced or written to since the last time. Frequencies that follow
        the length are written to by every forward and are left out: the configuration has them.
        """
        moving = {id(b) for b in self._rotary.buffers()} if self._stretches else set()
        buffers = [(name, b) for name, b in self.model.named_buffers() if id(b) not in moving]
        tensors = [*self.model.named_parameters(), *buffers]
        state = tuple((t.data_ptr(), t._version) for _, t in tensors)  # noqa: SLF001
        if state != self._digest[0]:
            self._digest = (state, self._sums(tensors))
        return self._digest[1]

    @torch.no_grad()
    def _sums(self, tensors: list[tuple[str, Tensor]]) -> str:
        config = copy.deepcopy(self.config.to_dict())
        for volatile in ("_name_or_path", "transformers_version", "_attn_implementation"):
            config.pop(volatile, None)
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for name, tensor in tensors:
            bits = tensor.detach().contiguous().flatten().view(torch.uint8)
            bits = bits.view(torch.int16) if bits.numel() % 2 == 0 else bits
            sums = [int(bits[::step].sum(dtype=torch.int64)) for step in (1, 2, 3, 7)]
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}{sums}".encode())
        return digest.hexdigest()
