"""One call to a server, as its reader holds it from submission to the end."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self, final

from demand.integrations.job_ledger import TokenMeter
from demand.integrations.vllm.chunks import Chunk, Repetition, TokenCount, text_of
from demand.integrations.vllm.failures import CallError, StreamBrokenError
from demand.policies.job import Job

Status = Literal["waiting", "in flight", "finished", "failed", "cancelled"]
Restart = Literal["raise", "skip"]


@final
class Call:
    """A call submitted to an `AdmissionController`: iterate over it, or await its `text`.

    Iterating hands each chunk over as it arrives. `text` and `chunks` wait for the end, which
    leaves the controller free to try again: whatever a failed attempt had sent is dropped. Once a
    chunk has been handed over, a stream that breaks can no longer be retried behind the reader's
    back; `restart` says what happens then:

    - "raise": iterating raises `StreamBrokenError`, and the call counts as failed.
    - "skip": the call is made again, and what the reader has already is skipped for as long as the
      new stream repeats it letter by letter; where the text differs, `StreamBrokenError`. Meant
      for plain text of one choice that the server generates deterministically.

    No reader sees a token twice. Cancelling the asyncio task of a reader that waits for the call
    cancels the call.

    Attributes:
        number: position in order of submission, from 0 on.
        job: the run of an application that it belongs to.
        path: of the endpoint, such as "completions".
        body: of the request, as submitted.
        status: "waiting", "in flight", "finished", "failed" or "cancelled".
        attempts: how often it was sent to the server.
        given_up: whether it was asked to be cancelled, even if it had ended by then.
        not_before: second on the event loop's clock before which it is not sent again.
        sent_at: second on that clock at which the latest attempt was sent.
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
        self.not_before = 0.0
        self.sent_at = 0.0
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
        """Wait until the call has finished, and give all its chunks.

        Raises:
            CallError: it failed or was cancelled.
        """
        await self._wait_for(self._ended)
        if self._error is not None:
            raise self._error
        return tuple(self._chunks)

    async def text(self) -> str:
        """Wait until the call has finished, and give the text of its first choice.

        Raises:
            CallError: it failed or was cancelled.
        """
        return "".join(map(text_of, await self.chunks()))

    @property
    def service_seconds(self) -> float:
        """Seconds of service that it has had so far, over all attempts."""
        return self._meter.seconds

    @property
    def over(self) -> bool:
        """Whether the call has ended: finished, failed or cancelled."""
        return self._ended.is_set()

    def cancel(self) -> None:
        """Cancel the call and close its connection. No effect once it has ended."""
        self._cancel(self)

    async def _wait_for(self, event: asyncio.Event) -> None:
        try:
            await event.wait()
        except asyncio.CancelledError:
            self.cancel()
            raise

    # What follows is for the controller.

    def start_over(self) -> None:
        """Prepare for another attempt: drop the chunks that were not handed over.

        Raises:
            AttemptError: what was handed over cannot be compared with a new stream, since it is
                more than the text of one choice.
        """
        self._tokens = TokenCount()
        self._repetition = Repetition(self._chunks[: self._handed_over])
        del self._chunks[self._handed_over :]

    def take(self, chunk: Chunk) -> float:
        """Take in a chunk of the present attempt; give the seconds of service it stands for.

        Raises:
            AttemptError: the chunk differs from what was handed over of an earlier attempt.
        """
        self._tokens.add(chunk)
        beyond = self._repetition.beyond(chunk)
        if beyond is not None:
            self._chunks.append(beyond)
            self._news.set()
        return self._meter.gained(self._tokens.input_tokens, self._tokens.output_tokens)

    @property
    def tokens(self) -> tuple[int, int]:
        """Input and output tokens of the present attempt so far, as `TokenCount` counts them."""
        return self._tokens.input_tokens, self._tokens.output_tokens

    def check_complete(self) -> None:
        """Check, at the end of an attempt, that it repeated all that was handed over before.

        Raises:
            AttemptError: it ended too early for that.
        """
        self._repetition.check_over()

    @property
    def may_restart(self) -> bool:
        """Whether another attempt can be made without the reader noticing."""
        return self._handed_over == 0 or self._restart == "skip"

    def end(self, status: Status, reason: str = "", cause: BaseException | None = None) -> None:
        """End the call: its readers get the rest of it, or the error.

        Args:
            status: "finished", "failed" or "cancelled".
            reason: what was seen, if it did not finish.
            cause: the error behind that, if there was one.
        """
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
