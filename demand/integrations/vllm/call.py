"""One call: what its reader holds, from submission to the end."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self, final

from demand.integrations.job_ledger import TokenMeter
from demand.integrations.vllm.chunks import Chunk, Repetition, TokenCount, text_of
from demand.integrations.vllm.failures import CallError, StreamBrokenError
from demand.policies.base import Job

Status = Literal["waiting", "in flight", "finished", "failed", "cancelled"]
Restart = Literal["raise", "skip"]


@final
class Call:
    """A request in the hands of an `AdmissionController`; iterate over it, or await its `text`.

    Iterating hands chunks over as they arrive. `text` and `chunks` wait for the end, and so leave
    the controller free to retry: what an attempt that fails had sent is dropped. Once a chunk has
    been handed over, a broken stream cannot be retried unseen; `restart` says what happens then:

    - "raise": `StreamBrokenError`, and the call counts as failed.
    - "skip": the call is made again and what the reader has is skipped, for as long as the new
      stream repeats it letter by letter; where it tells another text, `StreamBrokenError`. For
      plain text of one choice that the server generates deterministically.

    No reader sees a token twice. A reader who is cancelled while waiting cancels the call.

    Attributes:
        number: position in order of submission.
        job: the application it belongs to.
        status: where it stands.
        attempts: how often it was sent to the server.
        given_up: whether somebody cancelled it, in time or not.
    """

    def __init__(
        self,
        number: int,
        job: Job,
        path: str,
        body: Mapping[str, Any],
        restart: Restart,
        meter: TokenMeter,
        cancel: "Callable[[Call], None]",
    ) -> None:
        self.number = number
        self.job = job
        self.path = path
        self.body = body
        self.status: Status = "waiting"
        self.attempts = 0
        self.given_up = False
        self.not_before = 0.0  # second on the event loop's clock until which a retry waits
        self._restart = restart
        self._meter = meter
        self._cancel = cancel
        self._chunks: list[Chunk] = []
        self._handed_over = 0
        self._repetition = Repetition(())
        self._tokens = TokenCount()
        self._error: CallError | None = None
        self._news = asyncio.Event()
        self._ended = asyncio.Event()

    # For the reader.

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        while self._handed_over == len(self._chunks):
            if self.over:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            self._news.clear()
            await self._wait_for(self._news)
        self._handed_over += 1
        return self._chunks[self._handed_over - 1]

    async def chunks(self) -> tuple[Chunk, ...]:
        """All chunks, once the call has finished.

        Raises:
            CallError: it failed or was cancelled.
        """
        await self._wait_for(self._ended)
        if self._error is not None:
            raise self._error
        return tuple(self._chunks)

    async def text(self) -> str:
        """The text of the first choice, once the call has finished.

        Raises:
            CallError: it failed or was cancelled.
        """
        return "".join(map(text_of, await self.chunks()))

    @property
    def over(self) -> bool:
        """Whether it has ended, well or not."""
        return self._ended.is_set()

    def cancel(self) -> None:
        """Give the call up; its connection is closed. No effect once it has ended."""
        self._cancel(self)

    async def _wait_for(self, event: asyncio.Event) -> None:
        try:
            await event.wait()
        except asyncio.CancelledError:
            self.cancel()
            raise

    # For the controller.

    def start_over(self) -> None:
        """A new attempt is made.

        Raises:
            AttemptError: what was handed over cannot be matched with another stream.
        """
        self._tokens = TokenCount()
        self._repetition = Repetition(self._chunks[: self._handed_over])
        del self._chunks[self._handed_over :]

    def take(self, chunk: Chunk) -> float:
        """Take in a chunk of the present attempt; returns the seconds of service it stands for."""
        self._tokens.add(chunk)
        beyond = self._repetition.beyond(chunk)
        if beyond is not None:
            self._chunks.append(beyond)
            self._news.set()
        return self._meter.gained(self._tokens.input_tokens, self._tokens.output_tokens)

    def check_complete(self) -> None:
        """The present attempt has come to its end.

        Raises:
            AttemptError: before it had repeated all that was handed over.
        """
        self._repetition.check_over()

    @property
    def may_restart(self) -> bool:
        """Whether another attempt can be made behind the reader's back."""
        return self._handed_over == 0 or self._restart == "skip"

    def end(self, status: Status, reason: str = "", cause: BaseException | None = None) -> None:
        """It is over, well or not."""
        self.status = status
        if status != "finished":
            kind = StreamBrokenError if self._handed_over and status == "failed" else CallError
            self._error = kind(
                f"call {self.number} of {self.job.application!r} {status} after "
                f"{self.attempts} attempts, {self._handed_over} chunks handed over: {reason}"
            )
            self._error.__cause__ = cause
        self._news.set()
        self._ended.set()
