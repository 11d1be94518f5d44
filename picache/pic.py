"""`PIC`: compile chunks once, link them in any order."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from picache.arguments import whole_number
from picache.chunk import Chunk, Form, Header, chunk_key
from picache.entrance import as_flops_per_byte, as_sinks, as_store, as_tokenizer, spelled
from picache.errors import CorruptChunk, PICacheError
from picache.linking.compiled_together import compile_together
from picache.linking.fetched_chunk import FetchedChunk
from picache.linking.link import Link, ModelChanged
from picache.linking.narrowing import why_never_captured
from picache.linking.prompt import LinkedPrompt
from picache.linking.questions import questions_of
from picache.linking.row import Row
from picache.linking.stopwatch import Stopwatch
from picache.methods import LegoLink
from picache.methods.base import LinkMethod
from picache.seams import Seams, cut_at_seams, ends_of
from picache.sinks import DummySinks, SharedPrefix, Sinks
from picache.store import ChunkStore
from picache.text_ids import TextIds, as_ids, ids_as_given, ids_of_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Document = str | Sequence[int] | Tensor | Mapping[str, Any]


class PIC:
    """Position-independent caching on a HuggingFace causal language model.

    `compile` prefills a text chunk alone and keeps its keys and values (KV); `link` moves the KV of
    several chunks to their positions in a prompt and recomputes the tokens that a link method
    chooses, after EPIC (arXiv 2410.15332). The first chunk of a prompt is an exact prefix and is
    reused as it is; the query behind the last chunk is recomputed in full. The chunks between are
    approximate unless they are recomputed.

    Args:
        model: a causal language model of transformers with rotary positions, in evaluation mode and
            wholly in memory. A short prompt is linked at once, to see that the result is that of
            the model's own prefill.
        tokenizer: needed to compile and link text; not for token ids.
        store: where compiled chunks are kept; by default a `ChunkStore` without a bound.
        sinks: the tokens that a chunk is compiled behind where it does not stand first, so that
            they and not its own first tokens become attention sinks. "drop": what the tokenizer
            adds in front of it, such as a BOS, which is left out of the prompt. "keep": the same,
            but left in, as in EPIC's code. `DummySinks` or `SharedPrefix`: those, which are left
            out.
        flops_per_byte: what copying and rotating a byte of compiled KV costs, in floating-point
            operations of a prefill. Where recomputing the chosen tokens and loading the KV would
            cost as much as a full prefill by this estimate, the prompt is prefilled in full, which
            is exact, and the report says so. On a GPU, KV in its own memory costs about 200 and KV
            from the host or a disk more; the default is lower, so that only clear cases are
            prefilled in full. None links whatever it costs. Methods that choose again in each
            layer, as `CacheBlend` does, always link.

    Attributes:
        model: the transformers model that was handed in.
        hf: the same model as linking sees it, a `picache.hf.model.HFModel`: how each layer rotates
            its keys, the bytes of a token, a prefill of token ids.
        passes: the sparse passes that were captured, and the arena that prompts are linked in;
            a `picache.hf.captured_pass.CapturedPasses`.
        tokenizer: as handed in.
        store: where compiled chunks live.
        sinks: as handed in.
        flops_per_byte: as handed in.

    Raises:
        PICacheError: when the model cannot be linked exactly; says why.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        store: ChunkStore | None = None,
        sinks: Sinks = "drop",
        flops_per_byte: float | None = 25.0,
    ) -> None:
        self.tokenizer = as_tokenizer(tokenizer)
        self.store = as_store(store)
        self.sinks = as_sinks(sinks)
        self.flops_per_byte = as_flops_per_byte(flops_per_byte)
        # transformers is loaded when a model is handed in
        from picache.hf.captured_pass import CapturedPasses
        from picache.hf.model import HFModel
        from picache.hf.self_check import check

        self.hf = HFModel(model)
        self.passes = CapturedPasses(self.hf)
        self._check = check
        self._seen: Header | None = None
        self._prove()
        self.model = model
        self._bos = self._special("bos_token_id")
        self._lead = self._leading(sinks)
        self._seams = Seams(self.tokenizer)

    def __repr__(self) -> str:
        tokenizer = "no tokenizer" if self.tokenizer is None else type(self.tokenizer).__name__
        return (
            f"PIC({type(self.model).__name__}, {len(self.hf.rotations)} layers, "
            f"{self.model.dtype}, {tokenizer}, sinks={self.sinks!r}, {self.store!r})"
        )

    def behind(self, sinks: Sinks) -> "PIC":
        """The same model, tokenizer and store, with chunks compiled behind something else.

        Cheaper than another `PIC`: the model is not measured again, its weights are hashed once.

        Args:
            sinks: as for `PIC`.
        """
        other = copy(self)
        other.sinks = as_sinks(sinks)
        other._lead = self._leading(other.sinks)  # noqa: SLF001 - one of ours
        return other

    def _leading(self, sinks: Sinks) -> tuple[int, ...]:
        """The dummies or the prefix that chunks are compiled behind; empty for their own BOS."""
        if isinstance(sinks, SharedPrefix):
            return self._text_ids(sinks.text, "the shared prefix").ids
        if isinstance(sinks, DummySinks):
            token = (sinks.token,) if sinks.token is not None else self._bos[:1]
            if not token:
                raise PICacheError(
                    "the model has no BOS to take as a dummy: name one, DummySinks(token=...)"
                )
            return as_ids(list(token * sinks.count), self.hf.vocab_size, "DummySinks")
        return ()

    def _prove(self) -> None:
        """Link a prompt to see that the model reproduces its own prefill; PICacheError if not."""
        self._check(self.hf)
        self._proven = self.hf.settings

    def _header(self) -> Header:
        """What the KV of chunks in this store depends on besides the text and its sinks.

        A model whose configuration was changed is measured and checked anew: its chunks have other
        keys, and whether it can be linked exactly is not known any more.
        """
        if self.hf.moved:
            self.hf.header(self.store.namespace, self.store.storage)  # or its weights are nowhere
            self.passes.forget()
        # The model may have been measured with other settings by a copy of this (`behind`).
        if self.hf.moved or not self.hf.settings_now() == self.hf.settings == self._proven:
            self.hf.measure()
            self._prove()
        self._seen = self.hf.header(namespace=self.store.namespace, storage=self.store.storage)
        return self._seen

    def _form(self, text: TextIds | Chunk, header: Header, first: bool = False) -> Form:
        """The form a text is prefilled in: as the first chunk of a prompt, or behind sinks."""
        ids, lead, dropped = text.ids, text.lead, text.dropped
        skip, sinks = 0, ""  # only what the KV depends on is part of the key
        if not first and self.sinks != "keep":
            skip, dropped = lead, (*ids[:lead], *dropped)
            if self._lead:
                ids, skip, sinks = (*self._lead, *ids[lead:]), len(self._lead), repr(self.sinks)
        header = replace(header, sinks=sinks, tokens=len(ids))
        return Form(ids, skip, chunk_key(ids, header), header, dropped)

    def _form_of(self, chunk: Chunk, header: Header, first: bool) -> Form:
        """The form of a chunk, which keeps those that it was asked for before."""
        of = (header, self.sinks, self._lead, first)
        return chunk.form(of, lambda: self._form(chunk, header, first))

    def _special(self, name: str) -> tuple[int, ...]:
        """Ids of a special token, from the tokenizer or else from the model's configurations."""
        for source in (self.tokenizer, self.model.generation_config, self.hf.config):
            found = None if source is None else getattr(source, name, None)
            if found is not None:
                return tuple(found) if isinstance(found, list | tuple) else (found,)
        return ()

    def _text_ids(self, document: object, what: str) -> TextIds:
        """Token ids of a text, or what was given as ids; `what` names the argument in errors."""
        size = self.hf.vocab_size
        if isinstance(document, str):
            return ids_of_text(document, self.tokenizer, size, what)
        return ids_as_given(document, self.tokenizer, self._bos, size, what)

    def compile(self, document: Document, first: bool = False) -> Chunk:
        """Prefill one chunk alone and keep its KV; the same tokens again are found in the store.

        Compile and link one model in one thread, or let other threads that run it wait meanwhile.

        Args:
            document: text, or token ids: a list, an array, a 1-D or ``[1, tokens]`` tensor, or
                what the tokenizer returned for one text. Special tokens that the tokenizer adds to
                a text are the chunk's own sink, as is a BOS that token ids begin with (what the
                tokenizer adds, where there is one). What the text itself contains always stays.
            first: whether the chunk will stand first in prompts, where it is an exact prefix and is
                compiled behind nothing. It makes a difference only with `DummySinks` and
                `SharedPrefix`. A chunk that is linked in another place than it was compiled for is
                compiled again for that place, once.

        Raises:
            StoreFull: when the store has no room; the store is unchanged.
            PICacheError: when the document is empty, out of the vocabulary, or longer than the
                model's positions, or when the model would make other KV than its key stands for (in
                training mode, under autocast, in another dtype than before); the store is
                unchanged.
        """
        return self._compile(document, self._header(), first)

    def compile_all(self, documents: Sequence[Document], first: bool = False) -> list[Chunk]:
        """`compile` of several documents; those that the store lacks go through the model together.

        Documents of about one length are one batch, the shorter ones padded at the end, which no
        token of theirs attends to. On a GPU, where a short prefill takes as long
        as a longer one, that takes a fraction of the time. What a token's KV is differs by rounding
        from that of its document compiled alone. A model whose rotary frequencies follow the length
        of the text prefills one document after the other.

        Args:
            documents: each as for `compile`.
            first: as for `compile`, of all of them.

        Returns:
            A chunk for each document.

        Raises:
            StoreFull: as `compile`; some of the documents may be in the store.
            PICacheError: as `compile`, before anything is compiled; or for a single text.
        """
        if isinstance(documents, str):
            raise PICacheError(
                f"compile_all needs documents, got one text of {len(documents)} characters: give "
                "[text], or call compile"
            )
        documents = list(documents)
        header = self._header()
        texts = [self._text_ids(one, f"document {index}") for index, one in enumerate(documents)]
        forms = [self._form(text, header, first) for text in texts]
        for form in forms:
            self._refuse_too_long_to_compile(form)
        together = not self.hf.rotary.follows_length
        new = compile_together(self.hf, self.store, forms) if together else set()
        for form in forms:
            if form.key not in new:
                self._bring(form)
        return [self._chunk(*one) for one in zip(documents, texts, forms, strict=True)]

    def _refuse_too_long_to_compile(self, form: Form) -> None:
        """Raise PICacheError for a chunk that needs more positions than the model has."""
        limit = self.hf.max_length
        if limit is not None and len(form.ids) > limit:
            raise PICacheError(
                f"a document of {len(form.ids)} tokens is longer than the model's {limit} "
                "positions: split it into chunks"
            )

    def _compile(self, document: Document, header: Header, first: bool) -> Chunk:
        """`compile` with the model as it was just seen."""
        text = self._text_ids(document, "a document")
        form = self._form(text, header, first)
        self._refuse_too_long_to_compile(form)
        self._bring(form)
        return self._chunk(document, text, form)

    def _bring(self, form: Form) -> None:
        """Compile a chunk, unless the store has it; bring it to the device if it has room."""
        if self._fetch(form).tier != "device":
            try:
                self.store.promote(form.key, self.hf.device)
            except CorruptChunk:  # the store has dropped it
                if self.hf.shards is not None:
                    raise  # the other processes have what is theirs, and would not compile it
                self._fetch(form)

    def _chunk(self, document: Document, text: TextIds, form: Form) -> Chunk:
        """What `compile` gives for a document."""
        nbytes = self.hf.bytes_per_token * len(form.ids)
        ends = ends_of(document) if isinstance(document, str) else None
        return Chunk(form.key, text.ids, nbytes, text.lead, text.dropped, ends)

    def cut(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize texts as one, and cut the ids where the texts meet.

        Texts that are compiled one by one have other tokens where they meet than the joined text:
        the report of a link counts such seams. Compile and link what this returns to have the
        tokens of the joined text instead. A chunk's ids, and with them its key, then depend on what
        stands beside it: the same text beside another is compiled again where the seam changes it.

        Args:
            texts: in prompt order, the query last: ``*documents, question``.

        Returns:
            The token ids of each text. A token that straddles a seam goes to the text in which it
            begins. Special tokens that the tokenizer adds in front of texts stand in front of each,
            as they do when it is compiled as text.

        Raises:
            PICacheError: without a fast tokenizer, or on a text that is empty, or left without a
                token of its own.
        """
        return cut_at_seams(texts, self.tokenizer, self.hf.vocab_size)

    def _fetch(self, form: Form) -> FetchedChunk:
        """Find a chunk in the store or compile it; `StoreFull` when the store has no room."""
        return FetchedChunk(self.hf, self.store, form, Stopwatch(), must_store=True)

    def link(
        self,
        chunks: Sequence[Chunk] | Sequence[Sequence[Chunk]],
        query: Document | Sequence[Document],
        method: LinkMethod | None = None,
    ) -> LinkedPrompt:
        """Link compiled chunks and a query into a prompt that `generate` can go on from.

        Args:
            chunks: compiled chunks in prompt order; or a list of such lists, for a batch.
            query: what follows the last chunk, text or token ids as for `compile`; or a list with
                one query for each prompt, for a batch.
            method: says which tokens of the chunks behind the first to recompute; by default
                ``LegoLink(k=16)``, the first 16 of each.

        Returns:
            The arguments of ``model.generate(**prompt)``. It holds the KV of every token but the
            last, the logits of the first new token, and a report of what was reused, recomputed and
            left out. It may be used any number of times.

        Raises:
            PICacheError: on an empty list, an empty query, a chunk of another model, a prompt
                longer than the model's positions, or a model in a state that `compile` refuses; the
                store is unchanged.
        """
        watch = Stopwatch()
        method = _as_method(method)
        seen = self._seen
        if (rows := self._rows_as_seen(seen, chunks, query)) is not None:
            with suppress(ModelChanged):
                return self._link(rows, method, watch, partial(self._look_again, seen))
        rows = self._as_rows(chunks, query, self._header())
        self._refuse_too_long(rows)  # before anything is loaded or compiled
        return self._link(rows, method, watch)

    def _rows_as_seen(self, seen: Header | None, chunks: Any, query: Any) -> list[Row] | None:
        """The rows for the model as it was seen last; None where it is to be looked at first.

        To look at it takes a few milliseconds, in which the device would stand idle. Where a
        captured pass is ready for replay, the link looks while the device computes.
        """
        if seen is None or not self.passes.replays or not self.hf.in_place:
            return None
        try:
            rows = self._as_rows(chunks, query, seen)
            self._refuse_too_long(rows)
        except PICacheError:  # of the model as it is now, perhaps not
            return None
        return rows

    def _look_again(self, seen: Header | None) -> None:
        """Raise `ModelChanged` where the model is not as it was seen then."""
        if self.hf.moved or self.hf.settings_now() != self._proven or self._header() != seen:
            raise ModelChanged
        if self.passes.outdated:  # another module over the same weights, say
            raise ModelChanged

    def _link(
        self,
        rows: list[Row],
        method: LinkMethod,
        watch: Stopwatch,
        look_again: Callable[[], None] | None = None,
    ) -> LinkedPrompt:
        pad_id = (*self._special("pad_token_id"), *self._special("eos_token_id"), 0)[0]
        link = Link(
            self.hf,
            self.passes,
            self.store,
            rows,
            method,
            self.flops_per_byte,
            pad_id,
            watch,
            look_again,
        )
        return link()

    def warm_up(
        self,
        tokens: int,
        rows: int,
        batch: int = 1,
        progress: bool = True,
        compile: bool = False,  # noqa: A002 - as torch.compile is called
        method: LinkMethod | None = None,
    ) -> None:
        """Capture the sparse pass ahead, as CUDA graphs that later links replay.

        A link captures what it needs by itself, on the first prompt of each size; its report says
        what that took. Here it is done for all sizes at once, and the memory is allocated that
        prompts are linked in. It stays allocated as long as this object. A method that asks what
        the query attends to, such as `ProphetKV`, runs the query through a pass of its own first:
        give the `method` to have that one captured as well.

        With `compile` the pass is compiled by torch.compile before it is captured, which joins its
        many small kernels. A link does not begin that by itself, since it takes long: once for
        single prompts, and once for `batch` of them where that is more than one. Prompts of more
        rows than were asked for use it as well. Other batches and prompts longer than `tokens` do
        not, nor does any once the model has changed: those passes are captured as they are, until
        `warm_up` is called again. The first result of each size is held against the pass as it is;
        where they differ by more than rounding, compiled passes are no longer used, and the report
        says so.

        Args:
            tokens: of the longest prompt, with what is decoded behind it.
            rows: the most tokens that are recomputed in a prompt, its query included.
            batch: how many prompts are linked at once.
            progress: whether to show a bar, where tqdm is installed.
            compile: whether to compile the pass; if not, what was compiled before is given up.
            method: whose choice is captured, too, for queries of up to `rows` tokens; by default
                `LegoLink`, which asks nothing of the query.

        Raises:
            PICacheError: when passes of the method are never captured, when the model has no
                `tokens` positions, when the device has not the memory (the error names the bytes),
                when passes of this model cannot be captured, as on a CPU, or when compiling them
                fails; says where.
        """
        tokens = whole_number("warm_up needs a whole number of tokens", tokens, least=1)
        rows = whole_number("warm_up needs a whole number of rows", rows, least=1)
        batch = whole_number("warm_up needs a whole number of prompts, batch=", batch, least=1)
        if (limit := self.hf.max_length) is not None and tokens > limit:
            raise PICacheError(
                f"warm_up(tokens={tokens}): the model has positions for {limit}; ask for no more"
            )
        if rows > tokens:
            raise PICacheError(
                f"warm_up(rows={rows}) of prompts of {tokens} tokens: no more than all of them can "
                "be recomputed"
            )
        method = _as_method(method)
        if reason := why_never_captured(method):
            raise PICacheError(
                f"warm_up(method={method!r}): {reason}, so that its passes run eagerly; leave the "
                "method out"
            )
        questions = questions_of(method, len(self.hf.rotations))
        self._header()  # sees whether the model has changed
        self.passes.warm_up(tokens, rows, batch, progress, compile, questions)

    def _as_rows(self, chunks: Any, query: Any, header: Header) -> list[Row]:
        """The arguments of `link` as rows of a batch; one row where `chunks` is a flat list."""
        if not isinstance(chunks, list | tuple):
            raise PICacheError(
                f"chunks must be a list of what PIC.compile returned, got {type(chunks).__name__}"
            )
        if not len(chunks):
            raise PICacheError("link needs at least one chunk: the first is the exact prefix")
        if isinstance(chunks[0], Chunk):
            return [self._as_row(chunks, query, header)]
        if not isinstance(chunks[0], list | tuple):
            raise PICacheError(
                f"link takes chunks that PIC.compile returned, got {type(chunks[0]).__name__} at "
                "place 0: compile the document first"
            )
        if not isinstance(query, list | tuple) or len(query) != len(chunks):
            raise PICacheError(
                f"a batch of {len(chunks)} lists of chunks needs a list of as many queries"
            )
        return [self._as_row(row, q, header) for row, q in zip(chunks, query, strict=True)]

    def _as_row(self, chunks: Any, query: Any, header: Header) -> Row:
        """One row of a batch, every chunk in the form that its place in the prompt asks for."""
        if isinstance(chunks, Chunk) or not isinstance(chunks, list | tuple):
            raise PICacheError(
                "a batch is a list of lists of chunks, one list a prompt; got a list in which one "
                f"entry is a list and another is {spelled(chunks)}: give [[a, b], [c]]"
            )
        if not chunks:
            raise PICacheError("link needs at least one chunk: the first is the exact prefix")
        forms = []
        for index, chunk in enumerate(chunks):
            if not isinstance(chunk, Chunk):
                raise PICacheError(
                    f"link takes chunks that PIC.compile returned, got {type(chunk).__name__} at "
                    f"place {index}: compile the document first; a batch is a list of lists"
                )
            form = self._form_of(chunk, header, first=not index)
            # It may have been compiled for the first place, or for another than the first.
            if chunk.key != form.key and (
                chunk.key != self._form_of(chunk, header, first=bool(index)).key
            ):
                raise PICacheError(
                    f"{chunk!r} at place {index} was compiled with another model, dtype, weights "
                    "or sinks: compile it with this PIC"
                )
            if len(form.ids) == form.skip:
                raise PICacheError(
                    f"{chunk!r} at place {index} is only a BOS, which sinks={self.sinks!r} "
                    "leaves out"
                )
            forms.append(form)
        asked = self._text_ids(query, "the query")
        skip = 0 if self.sinks == "keep" else asked.lead
        if len(asked.ids) == skip:
            raise PICacheError("the query is only a BOS: give at least one token to answer")
        ends = [chunk.ends for chunk in chunks]
        ends.append(ends_of(query) if isinstance(query, str) else None)
        dropped = (*asked.ids[:skip], *asked.dropped)
        return Row(tuple(forms), asked.ids[skip:], dropped, self._seams.between(ends))

    def _refuse_too_long(self, rows: list[Row]) -> None:
        """Raise PICacheError for a row that needs more positions than the model has."""
        for row in rows:
            compiled = [len(form.ids) for form in row.chunks]
            length = max(row.layout(1).total_length, *compiled)
            if (limit := self.hf.max_length) is not None and length > limit:
                raise PICacheError(
                    f"the linked prompt, or a chunk behind its sinks, has {length} tokens, the "
                    f"model has positions for {limit}: link fewer or shorter chunks"
                )
            self.hf.rotary.check(compiled, length)


def _as_method(method: LinkMethod | None) -> LinkMethod:
    """The link method that was given, or the default; PICacheError when it is none."""
    method = LegoLink() if method is None else method
    if isinstance(method, type) or not isinstance(method, LinkMethod):
        raise PICacheError(f"method={method!r} is no link method: give one such as LegoLink(k=16)")
    return method
