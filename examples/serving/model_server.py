"""One call on the model: linked or prefilled in full, decoded densely or under a policy."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from serving.applications import Call
from serving.prompts import document_ids, pieces
from transformers.generation import BaseStreamer

from picache import PIC, LinkMethod
from sparsity import Policy, SparseCache


@dataclass(frozen=True)
class Served:
    """What a call brought and what it took.

    Args:
        text: written by the model.
        prompt_tokens: of the prompt.
        computed_tokens: of the prompt, those that went through the model.
        new_tokens: written.
        first_token_seconds: from the beginning of the call to its first token, by the server's
            timer.
        seconds: that it took in all, by that timer.
        wall_seconds: the same on the wall.
        processor_seconds: the same in processor time of this process.
        kv_bytes: of the keys and values, and of what a policy needs, as the call ends.
        in_memory: of its documents, how many were in memory as it began; of none without link.
        compiled: of its documents, how many the store did not have.
        damaged: chunks that were found damaged meanwhile, and compiled again.
        on_disk: of its documents, how many had to be read from disk.
    """

    text: str
    prompt_tokens: int
    computed_tokens: int
    new_tokens: int
    first_token_seconds: float
    seconds: float
    wall_seconds: float
    processor_seconds: float
    kv_bytes: int
    in_memory: int = 0
    on_disk: int = 0
    compiled: int = 0
    damaged: int = 0


class ModelServer:
    """Serves calls one at a time.

    Args:
        pic: the model with its tokenizer, and the store where chunks live.
        method: how prompts are linked; None to prefill them in full.
        policy: which tokens are kept while decoding; None for all.
        documents: that will be asked for; compiled here, unless the store has them.
        timer: gives seconds, as `time.perf_counter` or `time.process_time`.
    """

    def __init__(
        self,
        pic: PIC,
        method: LinkMethod | None = None,
        policy: Policy | None = None,
        documents: Sequence[str] = (),
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.pic, self.model, self.tokenizer, self.store = pic, pic.model, pic.tokenizer, pic.store
        self.method, self.policy, self._timer = method, policy, timer
        self._keys: dict[str, str] = {}
        for document in documents if method is not None else ():
            self._keys[document] = pic.compile(document_ids(document, self.tokenizer)).key

    def prefetch(self, document: str) -> bool:
        """Bring a document's chunk from disk to memory; from any thread.

        Returns:
            Whether it was brought.

        Raises:
            CorruptChunk: its file is damaged; the store has dropped it.
        """
        key = self._keys.get(document)
        if key is None:
            return False
        found = self.store.get(key)
        if found is None or found.tier == "device":
            return False
        return self.store.promote(key, self.model.device)

    def serve(self, call: Call, at_token: Callable[[], None] = lambda: None) -> Served:
        """Serve a call; `at_token` is called at each token that the model writes."""
        begun, wall, processor = self._timer(), time.perf_counter(), time.process_time()
        first, documents, query = pieces(call, self.tokenizer)
        tokens = len(first) + sum(map(len, documents)) + len(query)
        tiers: list[str] = []
        damaged = self.store.stats().corrupt
        whole = [*first, *chain.from_iterable(documents), *query]
        ids = torch.tensor([whole], device=self.model.device)
        past, computed = None, tokens
        if self.method is not None:
            tiers = [self._tier(document) for document in call.documents]
            chunks = [self.pic.compile(first, first=True)]
            chunks += [self.pic.compile(document) for document in documents]
            for document, chunk in zip(call.documents, chunks[1:], strict=True):
                self._keys[document] = chunk.key
            # A policy has to see the whole question: then no more than its first token is linked,
            # and generate computes the question behind the linked pages under the policy.
            linked = query if self.policy is None else query[:1]
            prompt = self.pic.link(chunks, linked, self.method)
            past = prompt.past_key_values
            computed = prompt.report.tokens_recomputed + len(query) - len(linked)
        if self.policy is not None:
            past = SparseCache(self.model, self.policy, past=past, static=False)
        told = _Told(self._timer, begun, at_token)
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=past,
            max_new_tokens=call.new_tokens,
            do_sample=False,
            disable_compile=True,  # answers are short, and only some of the ways would be compiled
            streamer=told,
        )
        written = out[0, tokens:]
        held = tokens + len(written) - 1
        return Served(
            text=self.tokenizer.decode(written, skip_special_tokens=True).strip(),
            prompt_tokens=tokens,
            computed_tokens=computed,
            new_tokens=len(written),
            first_token_seconds=told.first_token_seconds,
            seconds=self._timer() - begun,
            wall_seconds=time.perf_counter() - wall,
            processor_seconds=time.process_time() - processor,
            kv_bytes=held * self.pic.hf.bytes_per_token
            if self.policy is None
            else past.report().num_bytes,
            in_memory=tiers.count("device"),
            on_disk=tiers.count("disk"),
            compiled=tiers.count("nowhere"),
            damaged=self.store.stats().corrupt - damaged,
        )

    def _tier(self, document: str) -> str:
        """Where the chunk of a document is."""
        key = self._keys.get(document)
        found = None if key is None else self.store.get(key)
        return "nowhere" if found is None else found.tier


class _Told(BaseStreamer):
    """Notes the first token, and passes on that there is a token."""

    def __init__(
        self, timer: Callable[[], float], begun: float, at_token: Callable[[], None]
    ) -> None:
        self.timer, self.begun, self.at_token = timer, begun, at_token
        self.first_token_seconds = 0.0
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:  # generate puts the prompt first
            self._prompt_seen = True
            return
        if not self.first_token_seconds:
            self.first_token_seconds = self.timer() - self.begun
        self.at_token()

    def end(self) -> None:
        pass
