"""Record a dense run, to replay policies over it without the model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from sparsity.arguments import described, whole_number, whole_numbers
from sparsity.errors import SparsityError
from sparsity.policies import Full
from sparsity.recorded.trace import LayerTrace, Trace
from sparsity.retention.attention import PromptAttention
from sparsity.retention.batch_rows import Step
from sparsity.retention.layer import LayerRetention
from sparsity.retention.lazy_mask import LazyMask

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Meter:
    """How many bytes a recording may still take."""

    def __init__(self, max_bytes: int) -> None:
        self.most, self.taken = max_bytes, 0

    def take(self, num_bytes: int) -> None:
        """Count so many bytes more; SparsityError when `max_bytes` is exceeded."""
        self.taken += num_bytes
        if self.taken > self.most:
            raise SparsityError(
                f"the recording takes more than max_bytes={self.most:,}: record fewer layers "
                "(layers=[...]), fewer tokens, or raise max_bytes"
            )


class Recording(LayerRetention):
    """A layer that keeps all tokens, and records the queries of every forward."""

    def __init__(self, layer: int, meter: Meter) -> None:
        super().__init__(Full(), layer)
        self.meter = meter
        self.queries: list[Tensor] = []
        self.forwards: list[int] = []
        self.scores: dict[str, Any] = {}

    @override
    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        step: Step,
        mask: LazyMask,
        scaling: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        own: PromptAttention | None = None,
    ) -> Tensor:
        if query.shape[0] != 1:
            raise SparsityError(
                f"record takes one text at a time, and the model was called with {query.shape[0]} "
                "rows: leave out beams and several sequences, and give input_ids of one row"
            )
        if step.valid is not None and not bool(step.valid.all()):
            raise SparsityError(
                "record takes a text without padding, and the attention_mask leaves tokens out: "
                "give the row alone, without its padding"
            )
        if mask.rule is not None:
            raise SparsityError(
                f"layer {self.layer} masks more than what comes later, which a trace does not "
                "hold: leave it out of layers=[...]"
            )
        self.meter.take(query.nbytes + key.nbytes + value.nbytes)
        self.queries.append(query[0].detach().cpu())
        self.forwards.append(query.shape[2])
        self.scores = {"scaling": scaling, "softcap": softcap}
        self.scores["sinks"] = None if sinks is None else sinks.detach().cpu()
        return super().attend(query, key, value, step, mask, scaling, softcap, sinks, own)

    def trace(self) -> LayerTrace:
        """What was recorded, in the CPU's memory."""
        assert self.held is not None
        keys, values = (t[0, :, : sum(self.forwards)].detach().cpu().clone() for t in self.held)
        return LayerTrace(torch.cat(self.queries, dim=1), keys, values, **self.scores)


def record(
    model: "PreTrainedModel",
    layers: Sequence[int] | None = None,
    max_bytes: int = 2**30,
    **inputs: Any,
) -> Trace:
    """Run ``model.generate(**inputs)`` with dense attention and record what attention saw.

    Queries, keys and values are kept in the model's dtype, in the CPU's memory. From them follow
    the attention to any page at any step (`Trace.mass`) and what any policy would have kept
    (`replay`). Memory is linear in the text.

    Args:
        model: as for `SparseCache`; left as it was.
        layers: indices of the layers to record; None for all with full attention.
        max_bytes: most bytes to keep.
        inputs: of `generate`, one sequence, without a cache.

    Raises:
        SparsityError: for more than one sequence, padding, layers without full attention, a
            recording that grows over `max_bytes`, a cache or embeddings among the inputs, a model
            that several processes share, and as `SparseCache` does.
    """
    from sparsity.hf.attach import keep_attached
    from sparsity.hf.cache import SparseCache
    from sparsity.hf.tensor_parallel import tensor_rank

    if tensor_rank(model) is not None:
        raise SparsityError(
            "record would see the heads of this process alone, since tensor parallelism shares "
            "each layer out over several: record with the model in one process"
        )
    if refused := {"past_key_values", "inputs_embeds", "return_dict_in_generate"} & set(inputs):
        raise SparsityError(
            f"record takes no {', '.join(sorted(refused))}: give input_ids, of one row; it brings "
            "its own cache, and returns the trace"
        )
    max_bytes = whole_number("max_bytes", max_bytes, least=0)
    prompt = inputs.get("input_ids", inputs.get("inputs"))
    if not isinstance(prompt, Tensor) or prompt.dim() != 2:
        given = list(prompt.shape) if isinstance(prompt, Tensor) else described(prompt)
        raise SparsityError(
            f"input_ids is {given}: record needs input_ids, a tensor int64 [1, tokens], to "
            "generate from, such as tokenizer(text, return_tensors='pt').input_ids"
        )
    with keep_attached(model):
        cache = SparseCache(model, Full(), static=False)
        managed = sorted(cache.retentions)
        wanted = managed if layers is None else whole_numbers("layers", layers)
        if unknown := sorted(set(wanted) - set(managed)):
            raise SparsityError(
                f"layers={unknown} of this model have no full attention to record: choose of "
                f"{managed}"
            )
        if not wanted:
            raise SparsityError("no layer of this model has full attention: nothing to record")
        meter = Meter(max_bytes)
        recordings = {layer: Recording(layer, meter) for layer in wanted}
        for recording in recordings.values():
            cache.replace(recording)
        generate: Any = model.generate
        ids = generate(**inputs, past_key_values=cache, return_dict_in_generate=False)
    first = recordings[wanted[0]]
    return Trace(
        ids=ids[0].cpu(),
        prompt_tokens=prompt.shape[1],
        forwards=tuple(first.forwards),
        layers={layer: recording.trace() for layer, recording in recordings.items()},
        full_layers=tuple(managed),
    )
