"""Where calls go: URLs, keys, redirects, and what has to be installed."""

import asyncio
import logging
import shutil
import ssl
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest

from demand import FCFS, DemandError, Distribution
from demand.integrations.vllm import AdmissionController, CallError, Retry, Server
from tests.demand.openai_server import Answer, FakeServer, body, run_async

KNOWN = {"short": Distribution([2.0])}


async def failure_at(server: Server) -> CallError:
    """How a call to `server` fails at its first attempt."""
    async with AdmissionController(
        server, FCFS(), KNOWN, in_flight=1, retry=Retry(attempts=1)
    ) as controller:
        call = await controller.start("short").submit("completions", body("a"))
        with pytest.raises(CallError) as error:
            await call.text()
        return error.value


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://example.org/v1", "begins with 'ftp'"),
        ("127.0.0.1:8000", "expected something like"),
        ("http:///v1", "names host None"),
        ("https://me:secret@example.org/v1", "carries a user"),
        ("https://example.org/v1?key=secret", "a query"),
        (" http://127.0.0.1/v1", "white space"),
        ("http://127.0.0.1/v1\n", "white space"),
        ("", "is empty"),
        (None, "is no string"),
        ("http://[::1/v1", "host of the url cannot be read"),
        ("http://127.0.0.1:99999/v1", "port that is no number from 1 to 65535"),
        ("http://127.0.0.1:0/v1", "port that is no number"),
        ("http://127.0.0.1:secret/v1", "port that is no number"),
    ],
)
def test_only_plain_http_urls_are_taken(url: str, said: str) -> None:
    with pytest.raises(DemandError, match=said) as refused:
        Server(url)
    assert "secret" not in str(refused.value)
    with pytest.raises(DemandError, match="silence_seconds is 0"):
        Server("http://127.0.0.1", silence_seconds=0)
    with pytest.raises(DemandError, match="connect_seconds holds text"):
        Server("http://127.0.0.1", connect_seconds="5")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "key", ["", "sk-\n", "sk-\r\nX: 1", "sk-\u00e9", "sk a", "sk-\x00", b"sk-"]
)
def test_a_key_that_no_header_can_carry_is_refused_unquoted(key: Any) -> None:
    with pytest.raises(DemandError, match="expected printable ASCII alone") as refused:
        Server("http://127.0.0.1", api_key=key)
    error = refused.value
    assert "sk" not in "".join(traceback.format_exception(error))
    assert error.__cause__ is None
    assert error.__context__ is None


def test_the_key_is_sent_and_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    key = "sk-very-secret"

    async def refused() -> str:
        def repeat_key(request: Any) -> Answer:
            assert request.headers["authorization"] == f"Bearer {key}"
            return Answer(status=401, error_body=f"bad key {key}")

        async with FakeServer(repeat_key) as fake:
            server = Server(fake.url, api_key=key)
            failed = await failure_at(server)
            return repr(server) + repr(failed) + repr(failed.__cause__)

    with caplog.at_level(logging.DEBUG):
        shown = asyncio.run(refused())
    assert "bad key ***" in shown
    assert key not in shown + caplog.text


def test_a_key_that_a_stream_repeats_is_not_shown() -> None:
    key = "sk-very-secret"

    async def broken() -> CallError:
        answer = Answer(("a",), fault="error", stream_error=f"bad key {key}")
        async with FakeServer(lambda r: answer) as fake:
            return await failure_at(Server(fake.url, api_key=key))

    failed = asyncio.run(broken())
    shown = "".join(traceback.format_exception(failed))
    assert "bad key ***" in shown
    assert key not in shown
    assert failed.__cause__ is not None
    assert failed.__cause__.__cause__ is failed.__cause__.__context__ is None


def test_nothing_of_the_environment_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, f"secret-{name}")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer secret-of-a-header")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")

    async def sent() -> list[dict[str, str]]:
        async with FakeServer() as fake:
            for key in (None, "sk-mine"):
                server = Server(fake.url, api_key=key)
                async with AdmissionController(server, FCFS(), KNOWN, in_flight=1) as controller:
                    await (await controller.start("short").submit("completions", body("a"))).text()
            return [request.headers for request in fake.received]

    without, with_key = asyncio.run(sent())
    assert "authorization" not in without
    assert with_key["authorization"] == "Bearer sk-mine"
    assert "secret" not in f"{without} {with_key}"


def test_a_controller_that_was_never_entered_can_be_closed() -> None:
    controller = AdmissionController(Server("http://127.0.0.1"), FCFS(), KNOWN, in_flight=1)
    asyncio.run(controller.close())
    assert controller.counts.submitted == 0


async def failure_at_one_that_says(said: bytes, **server: Any) -> str:
    """How a call fails whose answer is `said`, then silence."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(said)
        await writer.drain()
        await reader.read()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        return str(await failure_at(Server(f"http://127.0.0.1:{port}", **server)))


@run_async
async def test_a_key_that_was_read_in_part_is_not_shown() -> None:
    key = "sk-very-secret"
    page = key * 40 + key[:13]  # long enough to be the last piece that is read
    said = f"HTTP/1.1 400 Bad\r\nConnection: close\r\n\r\n{page}".encode()
    shown = await failure_at_one_that_says(said, api_key=key, silence_seconds=0.3)
    assert "status 400: ***" in shown
    assert "sk-very" not in shown


@run_async
async def test_a_status_holds_though_its_page_never_ends() -> None:
    key = "sk-very-secret"
    said = f"HTTP/1.1 404 X\r\nContent-Length: 99\r\n\r\nno such model {key[:10]}".encode()
    shown = await failure_at_one_that_says(said, api_key=key, silence_seconds=0.3)
    assert "status 404: no such" in shown
    assert "sk-very" not in shown


@run_async
async def test_redirects_are_not_followed() -> None:
    async with FakeServer() as other:
        location = (("Location", other.url + "/completions"),)
        async with FakeServer(lambda r: Answer(status=307, headers=location)) as server:
            failed = await failure_at(Server(server.url))
        assert "307, a redirect, which is not followed" in str(failed)
        assert not other.received


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_certificate_that_no_authority_signed_is_refused(tmp_path: Path) -> None:
    made = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    subject = "-subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    files = f"-keyout {tmp_path}/key.pem -out {tmp_path}/cert.pem"
    command = ["openssl", *f"{made} {subject} {files}".split()]
    subprocess.run(command, check=True, capture_output=True)
    certificate = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")

    async def refused() -> None:
        async with FakeServer(certificate=certificate) as fake:
            failed = await failure_at(Server(fake.url.replace("http:", "https:")))
            assert "certificate" in str(failed).lower()
            assert not fake.received

    asyncio.run(refused())


def test_without_openai_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(DemandError, match=r"picache\[integrations\]"):
        AdmissionController(Server("http://127.0.0.1"), FCFS(), {}, in_flight=1)


def test_importing_loads_neither_openai_nor_vllm_nor_torch() -> None:
    code = (
        "import sys, demand.integrations.vllm; "
        "print(sorted({'openai', 'httpx2', 'vllm', 'torch', 'transformers'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
