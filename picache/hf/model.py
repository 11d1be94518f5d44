"""A transformers model as linking sees it.

All contact with transformers stands in the files of this folder.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    Cache,
    PreTrainedModel,
)

from picache.chunk import KV, Header
from picache.errors import PICacheError
from picache.hf.ambient import refuse_ambient, refuse_other_objects
from picache.hf.attention_switch import AttentionSwitch
from picache.hf.cache import PrefillCache, ScatterLayer, TailLayer, held_by
from picache.hf.compiled import never_compiled, uncompiled
from picache.hf.fingerprint import fingerprint, middles, plain, settings
from picache.hf.rope import Angles, Rotation, calibrate, frequencies
from picache.hf.rotary_module import RotaryModule
from picache.hf.sparse_pass import KVByLayer, Narrow, SparsePass, Stop, current, enter_layer
from picache.hf.tensor_parallel import Shards
from picache.hf.weights_in_memory import WeightsInMemory
from picache.kernels.queued import queued

_WINDOWS = ("sliding_window", "attention_chunk_size")  # of any layer, tokens
_FAR = 2**16  # a long text, in tokens, where the configuration states no limit


class HFModel:
    """A causal language model as linking uses it: what it measures, and the forwards it runs.

    Making one measures how each layer rotates its keys; `picache.hf.self_check.check` then tries to
    link a prompt.

    Args:
        model: the transformers model, in evaluation mode.

    Attributes:
        model: as handed in.
        decoder: the part of it that holds the layers.
        attention: switches the model's attention function.
        config: configuration of the decoder.
        settings: the fields of it that KV may depend on, when the model was measured.
        shards: the processes that share each layer, by tensor parallelism; None for a whole model.
        modules: of the model, by name, as the last `header` saw them.
        max_length: positions the model has; None where it states no limit.
        window: tokens of the smallest attention window of any layer; None without windows.
        rotary: the model's rotary module.
        rotations: of each layer; None for a layer without positions.
        one_token: keys and values of one token in each layer, ``[1, kv_heads, 1, head_dim]``.

    Raises:
        PICacheError: when the model cannot be linked exactly; says why.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        refuse_other_objects(model)
        name = type(model).__name__
        self._made = refuse_ambient(model).without_weights()
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
        self.attention = AttentionSwitch(model, self.decoder)
        self.config = model.config.get_text_config(decoder=True)
        self.shards = Shards.of(model)
        self.modules: tuple[tuple[str, nn.Module], ...] = ()
        self._digest: tuple[object, str] = (None, "")
        self._in_memory: WeightsInMemory | None = None
        self._angle_tables: dict[object, Angles] = {}  # of all positions, by how they are made
        self.measure()

    def measure(self) -> None:
        """Measure how each layer rotates keys, and whether its frequencies follow the length.

        Raises:
            PICacheError: when the model cannot be linked exactly; says why.
        """
        self.settings, self._measured_on = self.settings_now(), self.device
        self.__dict__.pop("loading", None)  # a stream of the device it was on
        self._angle_tables.clear()
        with self.on_trial():
            self._measure()

    def settings_now(self) -> dict[str, Any]:
        """Fields of the configuration that KV may depend on, as they are now."""
        return settings(self.config)

    def _measure(self) -> None:
        self.max_length: int | None = getattr(self.config, "max_position_embeddings", None)
        windows = [getattr(self.config, name, None) for name in _WINDOWS]
        self.window: int | None = min((w for w in windows if w), default=None)
        self.rotary = RotaryModule(self._find_rotary(), self.config, type(self.model).__name__)
        self.one_token = self._kv_at(torch.tensor([0]), torch.tensor([0]))
        self.rotations: list[Rotation | None] = calibrate(self._kv_at, self.rotary.cos_sin)
        rotated = [layer for layer, rotation in enumerate(self.rotations) if rotation is not None]
        self.rotary.detect_length_dependence(rotated, 2 * (self.max_length or _FAR))

    @contextmanager
    def on_trial(self) -> Iterator[None]:
        """Inside the block an error says so where the model makes no promise to be linkable.

        Some models do not state that they attend through transformers' attention interface. They
        are measured all the same, since several do without saying so.
        """
        try:
            yield
        except PICacheError as error:
            if self._made.quantised:
                raise PICacheError(
                    f"{type(self.model).__name__} is quantised by {self._made.quantised}, and "
                    "with that it does not reproduce its own prefill: activations quantised by "
                    "what else is in the batch make a token's keys depend on it. Load the model "
                    f"with its weights quantised alone, or not at all ({error})"
                ) from error
            if self.model._supports_attention_backend:  # noqa: SLF001 - no public name for it
                raise
            raise PICacheError(
                f"{type(self.model).__name__} does not state that it uses transformers' attention "
                f"interface, and linking it was tried in vain: {error}"
            ) from error

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary: of the embedding matrix, which a user may resize."""
        embedding: Any = self.model.get_input_embeddings()
        return embedding.weight.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter lives."""
        first = _first_parameter(self.model)  # transformers' own way takes ten times as long
        return self.model.device if first is None else first.device

    @property
    def moved(self) -> bool:
        """Whether the model is on another device than it was measured on."""
        return self.device != self._measured_on

    @property
    def groups(self) -> int:
        """Query heads that share a KV head, in a layer whose heads are the configuration's."""
        heads: int = self.config.num_attention_heads
        held = self.one_token[0][0].shape[1]
        whole: int = getattr(self.config, "num_key_value_heads", None) or heads
        return max(1, heads // (held if self.shards is None else max(held, whole)))

    @cached_property
    def loading(self) -> "torch.cuda.Stream":
        """The CUDA stream in which layers are loaded while the model computes in its own.

        All links share it: memory that a stream has freed is used again in that stream alone.
        """
        return torch.cuda.Stream(self.device)

    def wait_for_loading(self) -> None:
        """Let the model's CUDA stream wait for all that is being loaded; nothing elsewhere."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).wait_stream(self.loading)

    def finish(self) -> None:
        """Wait until the device has finished its work; on a CPU there is nothing to wait for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

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
        """Keys and values, by layer, of a text prefilled alone with the model's own attention.

        Args:
            ids: token ids, ``[texts, tokens]``; each text alone, from the same position.
            position: rotary position of the first token.
        """
        return self._prefill(ids, torch.arange(position, position + ids.shape[1])[None])

    @torch.no_grad()
    def _prefill(self, ids: Tensor, positions: Tensor) -> list[KV]:
        """Keys and values, by layer, of ids ``[batch, tokens]`` at positions of the same shape."""
        self.attention.refuse_attached()
        cache = PrefillCache()
        with self.attention.turn, uncompiled(self.attention.own):
            self.rotary.restore_short()
            self.decoder(
                input_ids=ids.to(self.device),
                position_ids=positions.to(self.device),
                past_key_values=cache,
                use_cache=True,
            )
        return held_by(cache)

    @torch.no_grad()
    def full_prefill(self, ids: Tensor) -> tuple[Tensor, list[KV]]:
        """Prefill a whole prompt, with nothing reused.

        Args:
            ids: token ids, ``[tokens]``.

        Returns:
            Logits of the first new token, ``[1, vocab_size]``, and keys and values by layer.
        """
        cache = PrefillCache()
        with self.attention.turn, uncompiled(self.attention.own):
            out = self.model(
                input_ids=ids[None].to(self.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return out.logits[:, -1], held_by(cache)

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """Logits ``[1, vocab_size]`` behind ids ``[1, tokens]``, from the model without a cache."""
        with self.attention.turn, uncompiled(self.attention.own):
            out = self.model(input_ids=ids.to(self.device), use_cache=False, logits_to_keep=1)
        return out.logits[:, -1]

    def _kv_at(self, positions: Tensor, tokens: Tensor) -> list[KV]:
        """What every layer caches of each token fed alone at its position.

        Raises:
            PICacheError: when the layers do not all cache plain keys and values.
        """
        name = type(self.model).__name__
        try:
            kv = self._prefill(tokens[:, None] % self.vocab_size, positions[:, None])
        except PICacheError:
            raise
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

    def angles(self, layer: int, positions: Tensor) -> Angles:
        """cos and sin of a layer at positions ``[tokens]``, each ``[tokens, rotary_dim / 2]``.

        In fp32; of a float64 model in fp64.
        """
        rotation = self.rotations[layer]
        if rotation is None:
            raise PICacheError(f"layer {layer} has no rotary positions")
        double = self.one_token[layer][rotation.part].dtype == torch.float64
        if self.rotary.follows_length or not len(positions):
            return self._angles(layer, rotation, positions, double)
        kind = (rotation.source, self.rotary.layer_type(layer), double)
        last = int(positions.max())
        table = self._angle_tables.get(kind)
        if table is None or len(table[0]) <= last:
            every = torch.arange(1 << max(12, last.bit_length()))
            table = self._angle_tables[kind] = self._angles(layer, rotation, every, double)
        at = queued(positions, table[0].device)
        return table[0][at], table[1][at]

    def _angles(self, layer: int, rotation: Rotation, positions: Tensor, double: bool) -> Angles:
        """`angles`, by the model's rotary module."""
        cos, sin = self.rotary.cos_sin(layer, positions)
        if double:
            cos, sin = cos.double(), sin.double()  # the model's own fp32 angles, multiplied in fp64
        return frequencies(cos, sin, rotation.source)

    @torch.no_grad()
    def scattered_forward(
        self,
        ids: Tensor,
        positions: Tensor,
        kv: KVByLayer,
        narrow: Narrow | None = None,
        position_ids: Tensor | None = None,
        parallel: tuple[slice, float] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Recompute some tokens of a prompt, and write their keys and values into `kv`.

        Args:
            ids: token ids of the tokens to recompute, int64 ``[tokens]``.
            positions: where they stand in the prompt, int64 ``[tokens]``, ascending, each once, the
                prompt's last among them.
            kv: keys and values of the whole prompt, layer by layer; a layer is asked for when the
                pass reaches it, and overwritten at the positions.
            narrow: chooses again in each layer (see `picache.hf.sparse_pass.Narrow`); the prompt's
                last token must go on. None to recompute the same tokens in every layer.
            position_ids: rotary positions of the tokens; None where they are `positions`.
            parallel: see `SparsePass`.

        Returns:
            Logits of the first new token, ``[1, vocab_size]``, and for each layer the positions of
            the tokens that entered it.
        """
        running = SparsePass(positions, self.device, narrow, parallel=parallel)
        logits = self._run(ids, kv, int(positions[-1]) + 1, running, position_ids)
        return logits[:, -1], running.entered

    @torch.no_grad()
    def attention_masses(
        self,
        ids: Tensor,
        positions: Tensor,
        kv: KVByLayer,
        layers: int | None = None,
        value_norm: bool = False,
    ) -> Tensor:
        """How much some tokens attend to each token of the prompt; writes their KV into `kv`.

        Args:
            ids: see `scattered_forward`.
            positions: see `scattered_forward`.
            kv: see `scattered_forward`.
            layers: how many of the first layers to run; None for all.
            value_norm: whether to weight attention by the norm of the value it is paid to.

        Returns:
            Attention weights, the mean over heads and over the attending tokens, fp32
            ``[layers, tokens]``, on the CPU.
        """
        masses: list[Tensor] = []
        running = SparsePass(
            positions,
            self.device,
            observe=lambda layer, mass: masses.append(self.over_heads(mass, mean=True).cpu()),
            value_norm=value_norm,
            stop=layers,
        )
        with suppress(Stop):
            self._run(ids, kv, int(positions[-1]) + 1, running)
        return torch.stack(masses)

    def over_heads(self, tensor: Tensor, mean: bool = False) -> Tensor:
        """What was summed over the KV heads that this process holds, over those of all processes.

        Args:
            tensor: the sum over the heads here; or the mean.
            mean: which it is.
        """
        if self.shards is None:
            return tensor
        total = self.shards.summed(tensor)
        return total / self.shards.size if mean else total

    def everywhere(self, holds: bool) -> bool:
        """Whether it holds in all processes that share the model, which is this one if it is whole.

        What some of them would compute and others not, they would wait for each other in vain.
        """
        return holds if self.shards is None else self.shards.everywhere(holds)

    def _run(
        self,
        ids: Tensor,
        kv: KVByLayer,
        length: int,
        running: SparsePass,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits ``[1, 1, vocab_size]`` of a sparse pass over a prompt of `length` tokens."""
        rotary = running.positions if position_ids is None else position_ids.to(self.device)
        count = self.config.num_hidden_layers
        # flash_attention and flex_attention go on from a prefix as they are; sdpa and eager would
        # make a mask, or scores, of all queries times all keys at once.
        own = self.attention.goes_on and running.plain_tail
        kind = TailLayer if own else ScatterLayer
        cache = Cache(layers=[kind(kv, index, length, running) for index in range(count)])
        switch = self.attention.unswitched() if own else self.attention.scattered()
        outside = current.set(running)
        hooks: list[RemovableHandle] = []
        try:
            # Hooks too are set while this thread has the lock.
            with switch, uncompiled(self.attention.own) if own else never_compiled:
                if running.narrow is not None or running.stop is not None:
                    hooks += [
                        layer.register_forward_pre_hook(enter_layer, with_kwargs=True)
                        for layer in self._layers()
                    ]
                try:
                    logits: Tensor = self.model(
                        input_ids=ids[None].to(self.device),
                        position_ids=rotary[None],
                        past_key_values=cache,
                        use_cache=True,
                        logits_to_keep=1,
                    ).logits
                except (RuntimeError, TypeError) as error:
                    if not own:
                        running.check_attended(error)
                    raise
                finally:
                    for hook in hooks:
                        hook.remove()
            if not own:
                running.check_attended()
            return logits
        finally:
            current.reset(outside)

    def _layers(self) -> nn.ModuleList:
        """The decoder's layers; PICacheError when it has no list of them."""
        count = self.config.num_hidden_layers
        for module in self.decoder.children():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return module
        raise PICacheError(
            f"{type(self.decoder).__name__} has no list of its {count} layers, which a method that "
            "drops tokens between layers needs: choose one that keeps them, such as LegoLink"
        )

    def flops(self, entered: Sequence[Tensor]) -> float:
        """An estimate of the floating-point operations of tokens that go through the layers.

        It counts two operations for each parameter of a layer's matrices and each token (all
        experts of a mixture are counted), four for each head dimension and each pair of a token and
        a key it attends to, and the output matrix once.

        Args:
            entered: positions of the tokens that go through a layer, one entry per layer.
        """
        config = self.config
        # The head dimension of the cached keys; the mean, since layers may differ (Gemma 4).
        width = sum(keys.shape[-1] for keys, _ in self.one_token) / len(self.one_token)
        # Most methods give the same tensor for every layer: it is summed once.
        times = Counter(map(id, entered))
        different = {id(positions): positions for positions in entered}
        tokens = sum(times[key] * len(at) for key, at in different.items())
        pairs = sum(times[key] * (int(at.sum()) + len(at)) for key, at in different.items())
        per_token = 2.0 * self._matrix_parameters / config.num_hidden_layers
        attention = 4.0 * config.num_attention_heads * width * pairs
        return per_token * tokens + attention + 2.0 * config.hidden_size * self.vocab_size

    @cached_property
    def _matrix_parameters(self) -> int:
        """Parameters of the layers' matrices; counted once, without adapters that come later."""
        embedding: Any = self.model.get_input_embeddings()
        inside = (p for p in self.decoder.parameters() if p is not embedding.weight)
        return sum(p.numel() for p in inside if p.dim() > 1)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token in all layers, as this process holds them."""
        return sum(tensor.nbytes for layer in self.one_token for tensor in layer)

    def header(self, namespace: str, storage: str) -> Header:
        """All that the KV of this model's chunks depends on besides the text and its sinks.

        It is asked for before a store is, at every compile and every link.

        Args:
            namespace: of the store.
            storage: how the store keeps tensors.

        Raises:
            PICacheError: where KV made now would depend on something else too, such as dropout or
                autocast; see `picache.hf.ambient`.
        """
        now = refuse_ambient(self.model, self._made)
        hashed = self._fingerprint(now.weights)  # may be interrupted: nothing is noted before
        self.modules = now.modules
        self._in_memory = WeightsInMemory(tensor for _, tensor in now.weights)
        return Header(
            model=type(self.model).__name__,
            fingerprint=hashed,
            revision=str(getattr(self.model.config, "_commit_hash", None) or ""),
            dtype=str(self.one_token[0][0].dtype).removeprefix("torch."),
            rope=repr(sorted({str(rotation) for rotation in self.rotations})),
            namespace=namespace,
            storage=storage,
        )

    @property
    def weights_seen(self) -> object:
        """What the last `header` saw of the weights and settings; it differs once they change."""
        return self._digest

    @property
    def in_place(self) -> bool:
        """Whether the weights lie where the last `header` saw them; see `WeightsInMemory`."""
        return self._in_memory is not None and self._in_memory.as_seen

    def _fingerprint(self, weights: Iterable[tuple[str, Tensor]]) -> str:
        """A hash of the configuration and of every parameter and buffer.

        Models of one configuration with different weights or dtypes do not share chunks. The hash
        is made again when the model was measured with other settings, or a tensor was replaced or
        written to since the last time. Merging an adapter writes through ``.data``, which PyTorch
        does not count as a write; it shows in the value in the middle of each tensor. Rotary
        frequencies that depend on the length of the text are left out, since every forward may
        overwrite them; the configuration determines them.
        """
        moving = {id(buffer) for buffer in self.rotary.length_dependent_buffers()}
        tensors = [one for name, t in weights if id(t) not in moving for one in plain(name, t)]
        versions = [
            (t.data_ptr(), 0 if t.is_inference() else t._version)  # noqa: SLF001
            for _, t in tensors
        ]
        seen = (versions, middles([t for _, t in tensors]), self.settings)
        if seen != self._digest[0]:
            self._angle_tables.clear()
            self._digest = (seen, fingerprint(self.settings, tensors))
        here = self._digest[1]
        return here if self.shards is None else self.shards.fingerprint(here)


def _first_parameter(module: nn.Module) -> Tensor | None:
    """The parameter that ``next(module.parameters())`` gives; None where there is none."""
    for parameter in module._parameters.values():  # noqa: SLF001 - attributes are slow
        if parameter is not None:
            return parameter
    for child in module._modules.values():  # noqa: SLF001
        if child is not None and (found := _first_parameter(child)) is not None:
            return found
    return None
