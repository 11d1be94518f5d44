"""The example and the code of the documentation, against the small server."""

import asyncio
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.demand.openai_server import Answer, FakeServer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = ROOT / "examples" / "experiments" / "vllm_admission.py"
    spec = importlib.util.spec_from_file_location("vllm_admission", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(url: str) -> list[str]:
    return ["--url", url, "--model", "m", "--applications", "6", "--in-flight", "2", "--tokens=2"]


def test_every_policy_serves_the_same_calls(
    example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    async def served() -> tuple[dict[str, list[float]], list[str]]:
        async with FakeServer() as server:
            found = await asyncio.to_thread(example.main, options(server.url))
            return found, server.prompts

    found, prompts = asyncio.run(served())
    assert list(found) == ["FCFS", "ClassMean", "Gittins"]
    assert all(len(seconds) == 6 and min(seconds) > 0.0 for seconds in found.values())
    third = len(prompts) // 3
    first, second = sorted(prompts[:third]), sorted(prompts[third : 2 * third])
    assert first == second == sorted(prompts[2 * third :])
    assert "Gittins" in capsys.readouterr().out


def test_a_server_that_refuses_is_named(example: ModuleType) -> None:
    async def refused() -> None:
        async with FakeServer(lambda r: Answer(status=404, error_body="no such model")) as server:
            await asyncio.to_thread(example.main, options(server.url))

    with pytest.raises(SystemExit, match=r"does not serve.*no such model"):
        asyncio.run(refused())


def test_the_code_in_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "vllm.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]

    async def run() -> None:
        async with FakeServer() as server:
            here = code.replace("http://127.0.0.1:8000/v1", server.url)
            assert here != code
            body = "\n".join("    " + line for line in here.splitlines())
            names: dict[str, Any] = {}
            exec(f"async def main():\n{body}", names)
            await names["main"]()

    asyncio.run(run())
    assert "'text': 'Summarise: ....0 '" in capsys.readouterr().out
