"""One attempt at one call: the `openai` client posts it, and its stream is read to the end."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, suppress
from typing import Any, Self, final

import httpx2
import openai
from typing_extensions import override

from demand.integrations.vllm.chunks import Chunk
from demand.integrations.vllm.failures import AttemptError, retry_after_seconds
from demand.integrations.vllm.server import Server

_SHED = (429, 503)
"""Statuses by which a server says that it has more calls than it can take."""

_AGAIN = (408, 425, 500, 502, 504, *_SHED)
"""Statuses after which the same call may fare better."""

_SHOWN_CHARACTERS = 500


class _Events(openai.AsyncStream[object]):
    """A stream of JSON objects that remembers whether the server marked its end with `[DONE]`.

    The client takes that mark as an end and says nothing of it, so that a stream that was cut off
    would look the same as one that is complete.
    """

    marked = False

    @override
    async def _iter_events(self) -> AsyncIterator[Any]:
        async for event in super()._iter_events():
            self.marked = self.marked or event.data.startswith("[DONE]")
            yield event


@final
class Client:
    """Connections to one server, open within `async with`, inside one event loop.

    Args:
        server: where the calls go. What the `openai` client would read from the environment for
            want of arguments, a key, an organisation and a project, is not sent.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        key = server.api_key
        self._headers: Mapping[str, str | openai.Omit] = {
            "Accept": "text/event-stream",
            "Authorization": openai.omit if key is None else f"Bearer {key}",
            "OpenAI-Organization": openai.omit,
            "OpenAI-Project": openai.omit,
        }

    async def __aenter__(self) -> Self:
        server = self._server
        self._openai = openai.AsyncOpenAI(
            base_url=server.url,
            api_key="given by the headers of each request",
            max_retries=0,  # which calls are made again, and when, is the controller's to decide
            timeout=openai.Timeout(server.silence_seconds, connect=server.connect_seconds),
            http_client=httpx2.AsyncClient(
                # The number of calls in flight is bounded by the controller, not by a pool.
                limits=httpx2.Limits(max_connections=None),
                # Asked before openai looks: it would read an error page to its end, however long.
                event_hooks={"response": [self._check_answer]},
            ),
        )
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._openai.close()

    async def attempt(
        self, path: str, body: Mapping[str, Any], take: Callable[[Chunk], None]
    ) -> None:
        """Make the call once: `take` gets each chunk as it arrives; returns at the complete end.

        Args:
            path: of the endpoint, after the URL of the server, such as "completions".
            body: of the request, as JSON; it asks for a stream.
            take: called with each chunk. What it raises ends the attempt and is passed on.

        Raises:
            AttemptError: no connection, silence, a status other than 200, an answer that is no
                stream of events, or a stream that breaks off, carries an error or is not JSON.
        """
        try:
            async with (
                asyncio.timeout(self._server.attempt_seconds),
                aclosing(self._chunks(path, body)) as chunks,
            ):
                async for chunk in chunks:
                    take(chunk)
        except TimeoutError as error:
            seconds = self._server.attempt_seconds
            raise AttemptError(f"no end after {seconds} seconds", again=True) from error

    async def _chunks(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[Chunk, None]:
        finished: set[Any] = set()
        try:
            stream = await self._openai.post(
                path,
                cast_to=object,
                body=body,
                options={"headers": self._headers},
                stream=True,
                stream_cls=_Events,
            )
            async with stream:
                async for event in stream:
                    chunk = self._with_choices(event)
                    finished |= {c.get("index") for c in chunk["choices"] if c.get("finish_reason")}
                    yield chunk
        except openai.APIConnectionError as error:
            seen = error.__cause__ or error
            failure = AttemptError(self._quoted(f"{type(seen).__name__}: {seen}"), again=True)
        except openai.APIError as error:
            failure = self._error_in_stream(error.body)
        except json.JSONDecodeError as error:
            failure = AttemptError(f"the stream is not JSON: {self._quoted(error.doc)}", again=True)
        except UnicodeDecodeError:
            failure = AttemptError("the stream is not JSON: it is not UTF-8", again=True)
        else:
            # Some servers leave out the closing mark; a reason to finish for every choice will do.
            if stream.marked or len(finished) >= (body.get("n") or 1):
                return
            failure = AttemptError("the stream broke off before its end", again=True)
        raise failure  # here, without a cause: what the server said may repeat the key

    def _with_choices(self, event: object) -> Chunk:
        choices = event.get("choices") if isinstance(event, dict) else None
        if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
            raise AttemptError(f"the stream has no choices: {self._quoted(event)}", again=True)
        assert isinstance(event, dict)
        return event

    def _error_in_stream(self, error: object) -> AttemptError:
        code = error.get("code") if isinstance(error, dict) else None
        # vLLM puts the status into `code`; without one the fault is taken to be the server's.
        again = not isinstance(code, int) or code >= 500 or code in _AGAIN
        return AttemptError(f"the stream says {self._quoted(error)}", again=again)

    async def _check_answer(self, response: httpx2.Response) -> None:
        if response.status_code != 200:
            raise await self._refusal(response)
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "text/event-stream":
            reason = f"the answer is of type {self._quoted(kind)!r}, expected text/event-stream"
            raise AttemptError(reason, again=True)

    async def _refusal(self, response: httpx2.Response) -> AttemptError:
        status = response.status_code
        key = self._server.api_key or ""
        seen, whole = b"", False
        with suppress(httpx2.TransportError):  # the status holds, whatever becomes of the page
            async for piece in response.aiter_bytes():
                seen += piece
                if len(seen) > _SHOWN_CHARACTERS + len(key):
                    break
            else:
                whole = True
        text = self._without_key(seen.decode(errors="replace"))
        if not whole:  # the end may be the beginning of the key
            text = text[: len(text) - len(key)]
        reason = f"status {status}: {self._quoted(text)}"
        if 300 <= status < 400:
            reason = f"status {status}, a redirect, which is not followed: set the final URL"
        header = response.headers.get("retry-after")
        return AttemptError(
            reason,
            again=status in _AGAIN,
            shed=status in _SHED,
            retry_after_seconds=retry_after_seconds(header, time.time()),
        )

    def _quoted(self, said: object) -> str:
        """What a server said, cut short, and without the key that it may have repeated."""
        text = self._without_key(str(said))
        return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " ..."

    def _without_key(self, text: str) -> str:
        key = self._server.api_key
        return text if key is None else text.replace(key, "***")
