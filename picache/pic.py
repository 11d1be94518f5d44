"""The public face: compile chunks once, link them in any order."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from picache.chunk import KV, Chunk, as_ids, content_key
from picache.engine import compile_chunk, layout_of, link_row
from picache.errors import PICacheError
from picache.methods import LegoLink
from picache.plan import LinkMethod, rows_to_compute
from picache.report import LinkReport, total
from picache.store import ChunkStore, kv_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from picache.hf import LinkedCache

Document = str | Sequence[int] | Tensor


class LinkedPrompt(Mapping[str, Any]):
    """Keyword arguments for ``model.generate(**prompt)``, usable any number of times.

    Keys: ``input_ids`` and ``attention_mask``, int64 ``[batch, tokens]``, left-padded, and
    ``past_key_values``, a fresh `Cache` at each access, holding every token but the last.

    Attributes:
        logits: of the first new token, ``[batch, vocab_size]``.
        report: what linking did; the sums over a batch.
        reports: the same, one per row.
    """

    def __init__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        cache: "LinkedCache",
        logits: Tensor,
        reports: tuple[LinkReport, ...],
        seconds: float,
    ) -> None:
        self._inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        self._cache = cache
        self.logits = logits
        self.reports = reports
        self.report = total(reports, seconds)

    def __getitem__(self, name: str) -> Any:
        return self._cache.fork() if name == "past_key_values" else self._inputs[name]

    def __iter__(self) -> Iterator[str]:
        return iter((*self._inputs, "past_key_values"))

    def __len__(self) -> int:
        return len(self._inputs) + 1

    def __repr__(self) -> str:
        batch, tokens = self._inputs["input_ids"].shape
        return f"LinkedPrompt(batch {batch}, {tokens} tokens)\n{self.report}"


class PIC:
    """Position-independent caching on a HuggingFace causal language model.

    The first chunk of a prompt is an exact prefix and is reused untouched; the query is always
    recomputed in full. Everything between is approximate unless it is recomputed.

    Args:
        model: any causal LM on transformers' attention interface with rotary positions that
            `picache.rope.calibrate` can prove.
        tokenizer: needed for text; token ids do without.
        store: where compiled chunks live; one without a bound by default.
        sinks: what becomes of a BOS that a chunk in the middle begins with. "drop" compiles the
            chunk behind it and leaves its KV out; "keep" leaves it in the prompt, as EPIC's code
            does. A chunk without a BOS is compiled as it stands.

    Raises:
        PICacheError: when the model cannot be linked exactly; says why.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        store: ChunkStore | None = None,
        sinks: Literal["drop", "keep"] = "drop",
    ) -> None:
        if sinks not in ("drop", "keep"):
            raise PICacheError(f"sinks must be 'drop' or 'keep', got {sinks!r}")
        from picache.hf import HFModel  # transformers is loaded when a model is handed in

        self._model = HFModel(model)
        self.tokenizer = tokenizer
        self.store = ChunkStore() if store is None else store
        self.sinks = sinks
        self._bos = self._special("bos_token_id")

    def _special(self, name: str) -> tuple[int, ...]:
        """The ids of a special token: the tokenizer's, else the model configuration's."""
        for source in (self.tokenizer, self._model.model.generation_config, self._model.config):
            found = None if source is None else getattr(source, name, None)
            if found is not None:
                return tuple(found) if isinstance(found, list | tuple) else (found,)
        return ()

    def _tokens(self, document: Document, what: str, special: bool) -> tuple[int, ...]:
        if isinstance(document, str):
            if self.tokenizer is None:
                raise PICacheError(
                    f"{what} is text but PIC has no tokenizer: PIC(model, tokenizer=...), or give "
                    "token ids"
                )
            document = self.tokenizer(document, add_special_tokens=special)["input_ids"]
        return as_ids(document, self._model.vocab_size, what)

    def compile(self, document: Document) -> Chunk:
        """Prefill one chunk alone and keep its KV; a second compile of the same tokens is a hit.

        Args:
            document: text, or token ids as a list or a 1-D tensor.

        Raises:
            PICacheError: when it is empty, out of the vocabulary, longer than the model's positions
                or larger than the store; the store is unchanged.
        """
        ids = self._tokens(document, "a document", special=True)
        limit = self._model.max_length
        if limit is not None and len(ids) > limit:
            raise PICacheError(
                f"a document of {len(ids)} tokens is longer than the model's {limit} positions: "
                "split it into chunks"
            )
        key = content_key(ids, self._model.fingerprint)
        kv = self.store.get(key)
        if kv is None:
            kv = compile_chunk(self._model, ids)
            self.store.put(key, kv)
        return Chunk(key, ids, kv_bytes(kv))

    def link(
        self,
        chunks: Sequence[Chunk] | Sequence[Sequence[Chunk]],
        query: Document | Sequence[Document],
        method: LinkMethod | None = None,
    ) -> LinkedPrompt:
        """Link compiled chunks and a query into a prompt whose KV is ready.

        Args:
            chunks: in prompt order; or a list of such lists, for a batch.
            query: what follows the last chunk; or one query per row, for a batch.
            method: which tokens to recompute; `LegoLink()` by default.

        Raises:
            PICacheError: on an empty list, an empty query, a chunk of another model, or a prompt
                longer than the model's positions; the store is unchanged.
        """
        begun = time.perf_counter()
        method = LegoLink() if method is None else method
        if isinstance(method, type) or not isinstance(method, LinkMethod):
            raise PICacheError(
                f"method={method!r} is no link method: give one such as LegoLink(k=16)"
            )
        if not isinstance(chunks, list | tuple):
            raise PICacheError(
                f"chunks must be a list of what PIC.compile returned, got {type(chunks).__name__}"
            )
        if not len(chunks):
            raise PICacheError("link needs at least one chunk: the first is the exact prefix")
        if isinstance(chunks[0], Chunk):
            checked = [self._check(chunks, query)]
        elif not isinstance(chunks[0], list | tuple):
            raise PICacheError(
                f"link takes chunks that PIC.compile returned, got {type(chunks[0]).__name__} at "
                "place 0: compile the document first"
            )
        else:
            if not isinstance(query, list | tuple) or len(query) != len(chunks):
                raise PICacheError(
                    f"a batch of {len(chunks)} lists of chunks needs a list of as many queries"
                )
            checked = [self._check(row, q) for row, q in zip(chunks, query, strict=True)]
        for row, skips, tokens in checked:  # refuse before anything is loaded or compiled
            layout = layout_of(row, skips, tokens)
            if (limit := self._model.max_length) is not None and layout.total_length > limit:
                raise PICacheError(
                    f"the linked prompt has {layout.total_length} tokens, the model has positions "
                    f"for {limit}: link fewer or shorter chunks"
                )
            self._model.check_frequencies((c.num_tokens for c in row), layout.total_length)
            rows_to_compute(method, layout)
        linked = [
            link_row(self._model, self.store, row, skips, tokens, method)
            for row, skips, tokens in checked
        ]
        return self._batch(linked, begun)

    def _check(self, chunks: Any, query: Any) -> tuple[list[Chunk], list[int], tuple[int, ...]]:
        """A row with the leading tokens to leave out of each chunk, and the query's ids."""
        if not chunks:
            raise PICacheError("link needs at least one chunk: the first is the exact prefix")
        skips = []
        for index, chunk in enumerate(chunks):
            if not isinstance(chunk, Chunk):
                raise PICacheError(
                    f"link takes chunks that PIC.compile returned, got {type(chunk).__name__} at "
                    f"place {index}"
                )
            if content_key(chunk.ids, self._model.fingerprint) != chunk.key:
                raise PICacheError(
                    f"{chunk!r} at place {index} was compiled with another model, dtype or "
                    "weights: compile it with this PIC"
                )
            bos = index > 0 and self.sinks == "drop" and chunk.ids[0] in self._bos
            if bos and chunk.num_tokens == 1:
                raise PICacheError(
                    f"{chunk!r} at place {index} is only a BOS, which sinks='drop' leaves out"
                )
            skips.append(int(bos))
        tokens = self._tokens(query, "the query", special=self.sinks == "keep")
        if self.sinks == "drop" and tokens[0] in self._bos:
            tokens = tokens[1:]
        if not tokens:
            raise PICacheError("the query is only a BOS: give at least one token to answer")
        return list(chunks), skips, tokens

    def _batch(
        self, rows: list[tuple[Tensor, list[KV], Tensor, LinkReport]], begun: float
    ) -> LinkedPrompt:
        """Left-pad the rows; the last token of each is left for `generate` to feed."""
        from picache.hf import LinkedCache

        width = max(len(ids) for ids, *_ in rows)
        device = self._model.device
        pad_id = (*self._special("pad_token_id"), *self._special("eos_token_id"), 0)[0]
        input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
        mask = torch.zeros(len(rows), width, dtype=torch.int64)
        for index, (ids, *_) in enumerate(rows):
            input_ids[index, width - len(ids) :] = ids
            mask[index, width - len(ids) :] = 1

        def stacked(tensors: list[Tensor]) -> Tensor:
            kept = [tensor[:, :, :-1] for tensor in tensors]
            if len(kept) == 1:
                return kept[0]
            pad = torch.nn.functional.pad
            return torch.cat([pad(t, (0, 0, width - 1 - t.shape[2], 0)) for t in kept])

        kv = [
            (stacked([keys for keys, _ in layer]), stacked([values for _, values in layer]))
            for layer in zip(*(row[1] for row in rows), strict=True)
        ]
        return LinkedPrompt(
            input_ids.to(device),
            mask.to(device),
            LinkedCache(kv),
            torch.cat([logits for _, _, logits, _ in rows]),
            tuple(report for *_, report in rows),
            time.perf_counter() - begun,
        )
