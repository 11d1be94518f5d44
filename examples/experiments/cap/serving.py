"""One request served in one way: the seconds, the bytes, and what the right answer loses.

By the public names of picache, sparsity and transformers alone. On a CPU seconds are those of the
process on one thread, so that what else runs on the machine does not count, and neither does what
the process waits for: what it takes to wait for a disk is in a GPU's rows alone. There seconds are
those of the clock, the device waited for. Tokens come one forward after the other, or, if that is
asked for, from `generate`, which compiles steps on a GPU.

What is prepared before a request comes (chunks compiled, a prompt stored, tokens kept of it) takes
no time of the request, and the memory it takes is a figure of its own.
"""

import hashlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cap.arms import AT_REST, STORE, Arm, sinks_of
from cap.requests import Request
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StaticCache,
)

from picache import PIC, Chunk, ChunkStore
from sparsity import SparseCache, attach, detach

GENERATED = 64
"""Tokens that `generate` is timed over."""


class NotComposedError(ValueError):
    """Two methods that do not go together by what they show of themselves."""


@dataclass
class Begun:
    """A request whose first token is known.

    Attributes:
        cache: to go on with.
        logits: of the first token, `[vocabulary]`.
        resting: bytes in memory between requests: stored chunks, or a stored prompt.
        pending: ids of the prompt that the cache has not seen yet.
        position: of the next token where the cache does not count it itself.
        inside: what to decode in.
    """

    cache: Cache
    logits: Tensor
    resting: int = 0
    pending: Sequence[int] = ()
    position: int | None = None
    inside: AbstractContextManager[None] = field(default_factory=nullcontext)


class Server:
    """A model, and what it keeps between the arms of one request.

    Args:
        model: a causal language model.
        tokenizer: None for random ids.
        generates: whether the seconds between tokens are those of `generate`, in caches of fixed
            size, and not those of single forwards.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        generates: bool = False,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.device = model.device
        self._on_gpu = self.device.type == "cuda"
        self._generates = generates
        # On a GPU the first time graphs are captured and steps compiled, which the next ones find.
        self._passes = [self._forced] * (2 if self._on_gpu and not generates else 1)
        self._passes += [self._generated] * (2 if generates else 0)
        self._token_bytes = self._bytes_a_token()
        self._folder = tempfile.TemporaryDirectory()
        self._stores: dict[tuple[str, bool], ChunkStore] = {}
        self._linkers: dict[tuple[str, bool], PIC] = {}

    @torch.no_grad()
    def _bytes_a_token(self) -> float:
        """Of keys and values as the model computes them; its first forward is behind it, too."""
        cache = DynamicCache()
        self._fed([0] * 64, cache)
        return working_bytes(cache) / 64

    def forget(self) -> None:
        """Drop all that is stored, in memory and on disk."""
        for store in self._stores.values():
            store.clear()

    @torch.no_grad()
    def serve(self, arm: Arm, request: Request) -> dict[str, Any]:
        """What the arm takes of this request, as a row of the record.

        Raises:
            PICacheError: where it cannot be linked so.
            SparsityError: where it cannot be retained so.
            NotComposedError: where what is retained cannot be stored.
        """
        try:
            row: dict[str, Any] = {}
            for after in self._passes:
                given, preparing = self._prepared(arm, request)
                begun_at = self._now()
                begun = self._begin(arm, request, given)
                int(begun.logits.argmax())
                first_token = self._now() - begun_at
                with begun.inside:
                    row |= after(begun, request)
                row |= {
                    "first_token_seconds": first_token,
                    "preparing_bytes": preparing,
                    "resting_bytes": begun.resting,
                    "working_bytes": working_bytes(begun.cache),
                }
                del given, begun  # or their memory would be beside that of the next
            return row
        finally:
            detach(self.model)

    def _now(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def _prepared(self, arm: Arm, request: Request) -> tuple[Any, int]:
        """What is there before the request comes, and the most bytes that preparing it held.

        That is compiled chunks, a stored prompt, or an empty cache. While a chunk is compiled its
        keys and values are there as computed, beside those that are stored already.
        """
        if arm.kind == AT_REST:
            return self._at_rest(arm, request)
        if arm.policy is not None:
            attach(self.model)  # as it is between the requests of a server
        if arm.link is not None:
            pic = self._linker(arm, request)
            whole = arm.kind == STORE
            parts = [request.before_query] if whole else [request.lead, *request.passages]
            chunks, most, stored = [], 0.0, 0
            for place, ids in enumerate(parts):
                most = max(most, stored + len(ids) * self._token_bytes)
                chunks.append(pic.compile(list(ids), first=place == 0))
                stored += 0 if arm.on_disk else self._stored(pic, chunks[-1])
            return (pic, chunks), int(most)
        if arm.policy is not None:
            return self._retaining(arm, request), 0
        if self._generates:
            longest = self._longest(request)
            return StaticCache(config=self.model.config, max_cache_len=longest), 0
        return DynamicCache(), 0

    def _longest(self, request: Request) -> int | None:
        """Tokens that a cache of fixed size has room for; None where caches grow."""
        return len(request.prompt) + GENERATED + 1 if self._generates else None

    def _retaining(self, arm: Arm, request: Request, past: Cache | None = None) -> SparseCache:
        """A cache under the arm's policy; single forwards are faster in memory that grows."""
        most, static = self._longest(request), None if self._generates else False
        return SparseCache(self.model, arm.policy, past, max_tokens=most, static=static)

    def _begin(self, arm: Arm, request: Request, given: Any) -> Begun:
        """The first token; `given` as `_prepared` made it."""
        if arm.kind == AT_REST:
            return self._restored(given, request)
        if arm.link is None:
            return Begun(given, self._fed(request.prompt, given))
        pic, chunks = given
        resting = 0 if arm.on_disk else sum(self._stored(pic, chunk) for chunk in chunks)
        if arm.policy is None:
            prompt = pic.link(chunks, list(request.query), arm.link)
            places = prompt["position_ids"][0, -1].item() if "position_ids" in prompt else None
            cache, last = prompt.past_key_values, request.query[-1:]
            inside = prompt.attached()
            return Begun(cache, prompt.logits[0], resting, last, places, inside)
        # The linked prompt holds all in front of the query, which comes under the policy.
        prompt = pic.link(chunks, list(request.query[:1]), arm.link)
        cache = self._retaining(arm, request, prompt.past_key_values)
        del prompt
        return Begun(cache, self._fed(request.query, cache), resting)

    def _stored(self, pic: PIC, chunk: Chunk) -> int:
        found = pic.store.get(chunk.key)
        return 0 if found is None else found.nbytes

    def _linker(self, arm: Arm, request: Request) -> PIC:
        """One linker for each store, behind the arm's sinks."""
        where = (arm.storage, arm.on_disk)
        if where not in self._linkers:
            path = Path(self._folder.name) / arm.storage if arm.on_disk else None
            memory = 1 if arm.on_disk else None  # a byte: every chunk is on disk alone
            self._stores[where] = ChunkStore(memory, path=path, storage=arm.storage)
            self._linkers[where] = PIC(
                self.model, self.tokenizer, self._stores[where], flops_per_byte=None
            )
        return self._linkers[where].behind(sinks_of(arm, request.lead))

    def _at_rest(self, arm: Arm, request: Request) -> tuple[tuple[ChunkStore, str], int]:
        """What a policy keeps of all in front of the query, stored until the query comes.

        With the most bytes held: the cache's own while the prompt was computed.
        """
        cache = SparseCache(self.model, arm.policy, static=False)
        self._fed(request.before_query, cache)
        kept, layers, most = cache.report().tokens_kept, cache.layers, working_bytes(cache)
        for index, layer in enumerate(layers):
            if layer.keys.shape[2] != kept[index]:
                raise NotComposedError(
                    f"{arm.policy} holds {kept[index]} tokens in {layer.keys.shape[2]} places and "
                    "does not show which are empty: store what it keeps in pages of one token"
                )
        store = ChunkStore(storage=arm.storage)
        key = hashlib.sha256(repr((arm, request)).encode()).hexdigest()
        store.put(key, [(layer.keys, layer.values) for layer in layers])
        detach(self.model)
        return (store, key), most

    def _restored(self, given: tuple[ChunkStore, str], request: Request) -> Begun:
        """The stored tokens in a plain cache; the query and the answer at their own positions."""
        store, key = given
        stored = store.get(key)
        assert stored is not None
        cache = DynamicCache()
        for index, (keys, values) in enumerate(stored):
            cache.update(keys, values, index)
        before = len(request.before_query)
        logits = self._fed(request.query, cache, before)
        return Begun(cache, logits, stored.nbytes, (), before + len(request.query))

    def _fed(self, ids: Sequence[int], cache: Cache, position: int | None = None) -> Tensor:
        """The logits behind ids that go on from a cache, the first of them at `position`."""
        given: dict[str, Any] = {"past_key_values": cache, "logits_to_keep": 1}
        if position is not None:
            given["position_ids"] = torch.arange(position, position + len(ids), device=self.device)[
                None
            ]
        rows = torch.tensor([list(ids)], device=self.device)
        found: Tensor = self.model(input_ids=rows, **given).logits[0, -1]
        return found

    def _generated(self, begun: Begun, request: Request) -> dict[str, Any]:
        """The seconds between tokens that `generate` takes."""
        if begun.position is not None:
            raise NotComposedError(
                "generate counts positions by what a cache holds, and this one holds a part"
            )
        ids = [*request.prompt] if begun.pending else [*request.prompt, int(begun.logits.argmax())]
        rows = torch.tensor([ids], device=self.device)
        begun_at = self._now()
        self.model.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            past_key_values=begun.cache,
            max_new_tokens=GENERATED,
            min_new_tokens=GENERATED,
            do_sample=False,
        )
        return {"between_tokens_seconds": (self._now() - begun_at) / GENERATED}

    def _forced(self, begun: Begun, request: Request) -> dict[str, Any]:
        """Each token of the answer: minus its log likelihood, the likeliest, the seconds."""
        answer = request.answer
        nats, likeliest, seconds = [], [], []
        logits, position = begun.logits, begun.position
        for token in begun.pending:
            took, _ = self._step(token, begun.cache, position)
            seconds.append(took)
            position = None if position is None else position + 1
        for place, token in enumerate(answer):
            nats.append(float(f"{-logits.float().log_softmax(-1)[token].item():.5g}"))
            likeliest.append(int(logits.argmax()))
            if place < len(answer) - 1:
                took, logits = self._step(token, begun.cache, position)
                seconds.append(took)
                position = None if position is None else position + 1
        return {
            "between_tokens_seconds": statistics.median(seconds),
            "nats": nats,
            "likeliest": likeliest,
        }

    def _step(self, token: int, cache: Cache, position: int | None) -> tuple[float, Tensor]:
        begun = self._now()
        logits = self._fed((token,), cache, position)
        return self._now() - begun, logits


def working_bytes(cache: Cache) -> int:
    """The most bytes of keys and values that serving held, and what a policy needs beside them.

    Of a `SparseCache` as it reports them, with those of the cache that it went on from, which are
    there until its first forward is through; else those of all layers at the end, when they are
    most.
    """
    if isinstance(cache, SparseCache):
        report = cache.report()
        return report.peak_bytes + report.past_bytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
