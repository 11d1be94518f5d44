"""One attempt at one call: a POST to an OpenAI-compatible server, answered by a stream."""

import asyncio
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, final
from urllib.parse import SplitResult, urlsplit

from demand.errors import DemandError
from demand.integrations.vllm.chunks import Chunk
from demand.integrations.vllm.failures import AttemptError, retry_after_seconds

_SHED = (429, 503)
_AGAIN = (408, 425, 500, 502, 504, *_SHED)
_SHOWN_BYTES = 500


@final
@dataclass(frozen=True)
class Server:
    """Where calls go. Redirects are not followed, and TLS certificates are verified.

    Args:
        url: base URL of the API, such as "http://127.0.0.1:8000/v1".
        api_key: sent as a bearer token; never printed, logged or put into an error.
        connect_seconds: given to a connection to come up.
        silence_seconds: longest wait for the next bytes, the first included: it covers the time
            that the server keeps a request in its own queue.
        attempt_seconds: longest duration of one attempt in all.

    Raises:
        DemandError: a URL that is not plain http or https, a key that is not printable ASCII, or
            a time that is not positive.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    connect_seconds: float = 5.0
    silence_seconds: float = 120.0
    attempt_seconds: float = 1800.0

    def __post_init__(self) -> None:
        # `urlsplit` would drop white space unseen. A key or a URL may be secret: neither is quoted.
        if not isinstance(self.url, str) or not re.fullmatch(r"[^\s\x00-\x1f\x7f]+", self.url):
            raise DemandError(
                "the url is no string, is empty, or contains white space or a control character; "
                "expected something like http://127.0.0.1:8000/v1"
            )
        try:
            parts = urlsplit(self.url)
        except ValueError:
            raise DemandError(
                "the host of the url cannot be read; expected something like "
                "http://127.0.0.1:8000/v1 or http://[::1]:8000/v1"
            ) from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise DemandError(
                f"url begins with {parts.scheme!r} and names host {parts.hostname!r}; expected "
                "something like http://127.0.0.1:8000/v1"
            )
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise DemandError(
                f"the url to {parts.hostname} carries a user, a query or a fragment; give the "
                "base URL alone, and the key as api_key"
            )
        if not _has_port_or_none(parts):
            raise DemandError(
                f"the url to {parts.hostname} has a port that is no number from 1 to 65535; "
                "give the port that the server listens on"
            )
        if self.api_key is not None and not _is_printable_ascii(self.api_key):
            raise DemandError(
                "api_key is empty, or has a space, a line break or a character outside of ASCII; "
                "expected printable ASCII alone: strip what was read from a file, or give None to "
                "send no key"
            )
        for name in ("connect_seconds", "silence_seconds", "attempt_seconds"):
            if not getattr(self, name) > 0.0:
                raise DemandError(f"{name} is {getattr(self, name)}; expected a positive number")


def _is_printable_ascii(key: object) -> bool:
    return isinstance(key, str) and re.fullmatch(r"[!-~]+", key) is not None


def _has_port_or_none(parts: SplitResult) -> bool:
    try:
        return parts.port != 0
    except ValueError:
        return False


@final
class Client:
    """Connections to one server; an asynchronous context manager.

    Raises:
        DemandError: httpx2 is not installed.
    """

    def __init__(self, server: Server) -> None:
        try:
            import httpx2
        except ImportError as error:
            raise DemandError(
                "calls over HTTP need httpx2; pip install 'picache[integrations]'"
            ) from error
        self._server = server
        self._httpx = httpx2
        headers = {"Accept": "text/event-stream"}
        if server.api_key is not None:
            headers["Authorization"] = f"Bearer {server.api_key}"
        self._http = httpx2.AsyncClient(
            base_url=server.url.rstrip("/") + "/",
            headers=headers,
            timeout=httpx2.Timeout(server.silence_seconds, connect=server.connect_seconds),
            # The number of calls in flight is bounded by the caller, not by a pool they wait in.
            limits=httpx2.Limits(max_connections=None),
            follow_redirects=False,
        )

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._http.aclose()

    async def attempt(
        self, path: str, body: Mapping[str, Any], take: Callable[[Chunk], None]
    ) -> None:
        """Make the call once: `take` gets each chunk as it arrives; returns at the complete end.

        Raises:
            AttemptError: no connection, silence, a status other than 200, a stream that is not
                one, breaks off, carries an error or is not JSON.
        """
        try:
            async with (
                asyncio.timeout(self._server.attempt_seconds),
                self._http.stream("POST", path, json=body) as response,
            ):
                if response.status_code != 200:
                    raise await self._refusal(response)
                await self._read(response, take, body.get("n") or 1)
        except TimeoutError as error:
            seconds = self._server.attempt_seconds
            raise AttemptError(f"no end after {seconds} seconds", again=True) from error
        except self._httpx.HTTPError as error:
            seen = self._told(f"{type(error).__name__}: {error}")
            raise AttemptError(seen, again=True) from error

    async def _read(self, response: Any, take: Callable[[Chunk], None], choices: int) -> None:
        finished: set[Any] = set()
        async for event in self._httpx.EventSource(response):
            if event.data == "[DONE]":
                return
            chunk = self._parsed(event.data)
            finished |= {c.get("index") for c in chunk["choices"] if c.get("finish_reason")}
            take(chunk)
        # Some servers leave out the closing mark; a reason to finish for every choice will do.
        if len(finished) < choices:
            raise AttemptError("the stream broke off before its end", again=True)

    def _parsed(self, data: str) -> Chunk:
        try:
            chunk = json.loads(data)
        except ValueError as error:
            raise AttemptError(f"the stream is not JSON: {self._told(data)}", again=True) from error
        told = chunk.get("error") if isinstance(chunk, dict) else None
        if told is not None:
            code = told.get("code") if isinstance(told, dict) else None
            # vLLM puts the status into `code`; without one the fault is taken to be the server's.
            again = not isinstance(code, int) or code >= 500 or code in _AGAIN
            raise AttemptError(f"the stream says {self._told(told)}", again=again)
        choices = chunk.get("choices") if isinstance(chunk, dict) else None
        if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
            raise AttemptError(f"the stream has no choices: {self._told(data)}", again=True)
        return chunk

    async def _refusal(self, response: Any) -> AttemptError:
        status = response.status_code
        key = self._server.api_key or ""
        seen, whole = b"", True
        async for piece in response.aiter_bytes():
            seen += piece
            if len(seen) > _SHOWN_BYTES + len(key):
                whole = False
                break
        text = self._redacted(seen.decode(errors="replace"))
        if not whole:  # the end may be the beginning of the key
            text = text[: len(text) - len(key)]
        reason = f"status {status}: {self._told(text)}"
        if 300 <= status < 400:
            reason = f"status {status}, a redirect, which is not followed: set the final URL"
        header = response.headers.get("retry-after")
        return AttemptError(
            reason,
            again=status in _AGAIN,
            shed=status in _SHED,
            retry_after_seconds=retry_after_seconds(header, time.time()),
        )

    def _told(self, said: object) -> str:
        """What a server said, short, and without the key that it may have repeated."""
        text = self._redacted(str(said))
        return text if len(text) <= _SHOWN_BYTES else text[:_SHOWN_BYTES] + " ..."

    def _redacted(self, text: str) -> str:
        key = self._server.api_key
        return text if key is None else text.replace(key, "***")
