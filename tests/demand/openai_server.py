"""A small OpenAI-compatible server on 127.0.0.1 that fails in every way it is told to.

Beside it what the tests of calls to a server share.
"""

import asyncio
import json
import socket
import ssl
import struct
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Literal

Fault = Literal["", "hang", "cut", "close", "reset", "garbage", "not an object", "error", "no done"]


@dataclass(frozen=True)
class Answer:
    """How one request is answered.

    After `after` tokens (-1: before the headers) the server waits for `gate_at`, then `fault`
    strikes.
    """

    tokens: tuple[str, ...] = ()
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    fault: Fault = ""
    after: int = 0
    token_seconds: float = 0.0
    gate_at: asyncio.Event | None = None
    usage: bool = True
    content_type: str = "text/event-stream"
    error_body: str = "no"
    stream_error: str = "engine died"


@dataclass
class Received:
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    second: float


def run_async(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test is a coroutine that must be over in a few seconds."""

    @wraps(test)
    def wrapped(**given: Any) -> None:
        asyncio.run(asyncio.wait_for(test(**given), 20.0))

    return wrapped


def body(prompt: str, tokens: int = 3) -> dict[str, Any]:
    """Of a request for a completion of so many tokens."""
    return {"prompt": prompt, "max_tokens": tokens}


def echo(request: Received) -> Answer:
    """`max_tokens` tokens that name the prompt."""
    return Answer(tokens_of(request))


def tokens_of(request: Received) -> tuple[str, ...]:
    prompt = request.body["prompt"]
    return tuple(f"{prompt}.{i} " for i in range(request.body.get("max_tokens", 3)))


@dataclass
class FakeServer:
    answer: Callable[[Received], Answer] = echo
    certificate: ssl.SSLContext | None = None
    received: list[Received] = field(default_factory=list)
    active: int = 0
    most_active: int = 0
    disconnected: int = 0
    tokens_sent: int = 0

    async def __aenter__(self) -> "FakeServer":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.certificate)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._server.close()
        await asyncio.sleep(0)

    @property
    def prompts(self) -> list[str]:
        return [request.body["prompt"] for request in self.received]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            self.disconnected += 1
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        line, *lines = head.decode().strip().split("\r\n")
        headers = {n.lower(): v for n, v in (h.split(": ", 1) for h in lines)}
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        loop = asyncio.get_running_loop()
        request = Received(line.split()[1], headers, body, loop.time())
        self.received.append(request)
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        try:
            return await self._respond(self.answer(request), request, reader, writer)
        finally:
            self.active -= 1

    async def _respond(
        self,
        answer: Answer,
        request: Received,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        if answer.fault and answer.after < 0:
            return await self._strike(answer, reader, writer)
        if answer.status != 200:
            said = answer.error_body.encode()
            extra = "".join(f"{n}: {v}\r\n" for n, v in answer.headers)
            head = f"HTTP/1.1 {answer.status} X\r\nContent-Length: {len(said)}\r\n{extra}\r\n"
            writer.write(head.encode() + said)
            await writer.drain()
            return True
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {answer.content_type}\r\n"
        writer.write(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for i, token in enumerate(answer.tokens):
            if answer.gate_at is not None and answer.after == i:
                await answer.gate_at.wait()
            if answer.fault and answer.after == i:
                return await self._strike(answer, reader, writer)
            if answer.token_seconds:
                await asyncio.sleep(answer.token_seconds)
            last = i == len(answer.tokens) - 1
            self._event(writer, self._chunk(request, token, "length" if last else None))
            await writer.drain()
            self.tokens_sent += 1
        if answer.fault == "no done":
            self._frame(writer, b"")
            return True
        if answer.fault:
            return await self._strike(answer, reader, writer)
        if answer.usage:
            usage = {"prompt_tokens": 10, "completion_tokens": len(answer.tokens)}
            self._event(writer, json.dumps({"choices": [], "usage": usage}))
        self._event(writer, "[DONE]")
        self._frame(writer, b"")
        await writer.drain()
        return True

    async def _strike(
        self, answer: Answer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        fault = answer.fault
        if fault == "hang":
            await reader.read()  # until the client gives up
            self.disconnected += 1
        elif fault == "cut":  # the stream ends properly as HTTP, in the middle as an answer
            self._frame(writer, b"")
        elif fault == "reset":
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        elif fault == "garbage":
            self._event(writer, '{"choices": [')
        elif fault == "not an object":
            self._event(writer, "[1, 2]")
        elif fault == "error":
            error = {"message": answer.stream_error, "code": 500}
            self._event(writer, json.dumps({"error": error}))
        if not writer.transport.is_closing():
            await writer.drain()
        return False  # "close" as well: the connection is dropped

    @staticmethod
    def _chunk(request: Received, token: str, finish_reason: str | None) -> str:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason}
        if request.path.endswith("chat/completions"):
            choice["delta"] = {"content": token}
        else:
            choice["text"] = token
        return json.dumps({"choices": [choice]})

    def _event(self, writer: asyncio.StreamWriter, data: str) -> None:
        self._frame(writer, f"data: {data}\n\n".encode())

    @staticmethod
    def _frame(writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
