"""What the code of docs is given: by the names that a page's comments ask for, all of it tiny.

A name with a dot is a file, which is written to the working directory.
"""

import asyncio
import gzip
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

from demand import CostModel, Distribution, Execution, PDGraph, PendingCall, Progress, Unit
from demand.workloads import poisson_workload, recorded_applications

ROOT = Path(__file__).parents[1]
LLM, SEARCH = Unit("plan", "llm"), Unit("search", "search")
RUN = [
    Execution(LLM, 60, 8),
    Execution(SEARCH, seconds=1.4),
    Execution(Unit("answer", "llm"), 80, 9),
]
RUNS = [RUN, RUN[:2], RUN, [RUN[0]]]
SYSTEM = "<bos> Read the documents and complete the questions ."
DOCUMENTS = (
    "Document : Belford . Belford paints maps . It teaches hats .",
    "Document : Corvale . It paints bells . The town teaches songs .",
)
QUESTION = "Questions : Corvale paints"


def model() -> Any:
    """The reference model, which is in the repository."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(ROOT / "examples" / "reference_model").eval()


def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "examples" / "reference_model")


def text(values: int = 5, seed: int = 3) -> str:
    """A problem of the reference model."""
    told = [f"a{i} = a{max(1, i - 2)} + a{i - 1} ;" for i in range(3, values + 1)]
    return (
        "<bos> Work out every value modulo ten . Definitions : "
        f"a1 = 4 ; a2 = {seed} ; {' '.join(told)} Question : a{values} ;"
    )


def inputs() -> Any:
    return tokenizer()(text(), return_tensors="pt", return_token_type_ids=False)


def texts() -> tuple[str, ...]:
    """A little longer than the budget of 128 that the pages set."""
    return text(21, 3), text(21, 7)


def problems() -> Any:
    from picache import Problem

    return [
        Problem(DOCUMENTS, "Questions :", ("bells",), lead="Corvale paints"),
        Problem(DOCUMENTS, "Questions :", ("maps",), lead="Belford paints"),
    ]


def pic() -> Any:
    from picache import PIC

    return PIC(model(), tokenizer())


def config() -> Any:
    """Of an engine that serves two requests at a time."""
    from tests.demand.continuous import config as tiny

    return tiny()


def store() -> Any:
    from picache import ChunkStore

    return ChunkStore()


def server() -> Any:
    """One that nobody calls."""
    from demand.integrations.vllm import Server

    return Server("http://127.0.0.1:9/v1")


def url() -> str:
    """Of a server that speaks the OpenAI protocol, in a thread that ends with the process."""
    from tests.demand.openai_server import FakeServer

    found: Queue[str] = Queue()

    async def serve() -> None:
        async with FakeServer() as fake:
            found.put(fake.url)
            await asyncio.Event().wait()

    threading.Thread(target=asyncio.run, args=(serve(),), daemon=True).start()
    return found.get(timeout=30.0)


class ByLength:
    """A predictor that knows nothing but how many calls have been."""

    def predict(self, call: PendingCall) -> Distribution:
        return Distribution([1.0 + len(call.progress.executed)])


def sessions(path: str = "sessions.jsonl.gz", many: int = 12) -> None:
    """Recorded coding agents, in the form of `demand.traces.read_agent_sessions`."""
    with gzip.open(path, "wt") as file:
        for session in range(many):
            calls = [
                {"t": 20.0 * k, "in": 900 + 700 * k, "out": 40, "api_s": 2.0 + session}
                | {"think_s": 10.0 * (k > 0)}
                for k in range(1 + session % 4)
            ]
            file.write(json.dumps({"session": str(session), "calls": calls}) + "\n")


def requests(path: str = "conversation_trace.jsonl.gz", many: int = 3000) -> None:
    """Recorded requests, in the form of `demand.traces.read_mooncake`."""
    with gzip.open(path, "wt") as file:
        for k in range(many):
            fields = {"timestamp": 500 * k, "input_length": 10, "output_length": 2, "hash_ids": [k]}
            file.write(json.dumps(fields) + "\n")


def graph() -> PDGraph:
    return PDGraph.fit(RUNS, name="report")


def ids(length: int = 9) -> list[int]:
    return list(range(5, 5 + length))


GIVEN: dict[str, Any] = {
    "config": config,
    "conversation_trace.jsonl.gz": requests,
    "distributions": lambda: {"report": graph().remaining()},
    "documents": lambda: DOCUMENTS,
    "executor": lambda: ThreadPoolExecutor(1),
    "graph": graph,
    "ids": ids,
    "input_ids": ids,
    "inputs": inputs,
    "keys_of": lambda: {"job-1": ["a key of a chunk"]},
    "mine": ByLength,
    "model": model,
    "more_ids": lambda: ids(14),
    "pic": pic,
    "problems": problems,
    "progress": lambda: Progress(executed=(RUN[0],)),
    "question": lambda: QUESTION,
    "runs": lambda: RUNS,
    "server": server,
    "sessions.jsonl.gz": sessions,
    "store": store,
    "system": lambda: SYSTEM,
    "text": text,
    "texts": texts,
    "tokenizer": tokenizer,
    "tool_seconds": lambda: 1.4,
    "url": url,
    "workload": lambda: poisson_workload(
        recorded_applications({"agent": RUNS * 3}, cost=CostModel()), load=0.8, jobs=40
    ),
}
"""How each name is made."""
