"""The arms, and one run of an arm: a stream of applications served on the clock."""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from serving.applications import Task, contents, is_right, stream
from serving.knowledge import Knowledge
from serving.library import Page, pages
from serving.loop import CLOCKS, Running, serve_stream
from serving.model_server import ModelServer, Served
from serving.prewarming import ChunkPrewarming
from serving.prompts import document_ids

from demand import FCFS, ClassMean, CostModel, Execution, Gittins
from picache import PIC, Arm, DummySinks, LegoLink
from sparsity import Policy, SnapKV, detach

LINK = Arm(LegoLink(4), DummySinks(4))
"""How pages are linked: the arm with the most right answers in README's table of linking."""
ORDERS = {"FCFS": FCFS(), "class mean": ClassMean(), "Gittins": Gittins()}


@dataclass(frozen=True)
class Setting:
    """What is served, and how.

    Args:
        pages: in the library.
        sentences: of a page that tell no fact; five more do.
        applications: in a stream.
        training: in the stream that the graphs are learnt from.
        seconds_between: mean seconds from one arrival to the next.
        budget: tokens that are kept while decoding, for each KV head.
        memory_pages: that memory has room for; the others are read from disk.
        prefill_seconds: of a token computed, as demand is counted.
        decode_seconds: of a token written, as demand is counted.
        warm_seconds: that the planner takes bringing the chunks of a call to memory for.
        replayed: applications of a stream that is replayed.
        clock: of `CLOCKS`: that arrivals and completions go by.
        seed: of everything that is drawn.
    """

    pages: int = 16
    sentences: int = 2
    applications: int = 4
    training: int = 4
    seconds_between: float = 1.0
    budget: int = 256
    memory_pages: int = 8
    prefill_seconds: float = 0.002
    decode_seconds: float = 0.06
    warm_seconds: float = 0.05
    replayed: int = 100
    clock: str = "wall"
    seed: int = 0

    @property
    def cost(self) -> CostModel:
        """Seconds of a call by its tokens, as demand is counted."""
        return CostModel(self.prefill_seconds, self.decode_seconds)

    @property
    def policy(self) -> Policy:
        """SnapKV asked again while decoding, with four sinks: what docs/retention.md says of it."""
        part = max(1, self.budget // 4)
        return SnapKV(self.budget, sinks=4, window=part, evict_every=part)

    def library(self) -> list[Page]:
        """The pages."""
        return pages(self.pages, self.sentences, self.seed)

    def arrivals(self, repeat: int) -> list[tuple[float, Task]]:
        """The stream of a repeat, with Poisson arrivals; the first comes at once."""
        tasks = stream(self.library(), self.applications, f"{self.seed} {repeat}")
        draw = random.Random(f"arrivals {self.seed} {repeat}")
        second, arrivals = 0.0, []
        for task in tasks:
            arrivals.append((second, task))
            second += draw.expovariate(1.0 / self.seconds_between)
        return arrivals


@dataclass(frozen=True)
class Way:
    """An arm: what is on.

    Args:
        link: link compiled pages, or prefill every prompt in full.
        retention: decode under a policy, or densely.
        order: of `ORDERS`.
        prewarming: prefetch what the graph says will be needed; only with `link`.
    """

    link: bool = True
    retention: bool = True
    order: str = "Gittins"
    prewarming: bool = True

    @property
    def serving(self) -> str:
        """How a call is served, whatever the order: the name of the arm that serves it by FCFS."""
        return Way(self.link, self.retention, "FCFS").name

    @property
    def name(self) -> str:
        """As tables call it."""
        on = [name for name, is_on in (("link", self.link), ("retention", self.retention)) if is_on]
        if self.order != "FCFS":
            on.append(self.order)
        if self.link and not self.prewarming:
            on.append("no prewarming")
        return " + ".join(on) or "none"


EIGHT = [
    Way(link, retention, order)
    for link in (False, True)
    for retention in (False, True)
    for order in ("FCFS", "Gittins")
]
"""Every combination of the three parts; pages are prefetched wherever they are linked."""
BESIDE = [Way(retention=False, order="class mean"), Way(prewarming=False)]
"""Two more arms: link in an order without a distribution, and all three without prefetching."""
SERVINGS = [way for way in EIGHT if way.order == "FCFS"]
"""Every way to serve a call: an arm each of link and retention."""


def documents_of(library: Sequence[Page]) -> list[str]:
    """Every text that is a chunk: the list of pages, and the pages."""
    return [contents(library), *(page.text for page in library)]


def compile_library(pic: PIC, setting: Setting) -> dict:
    """Compile what calls will link, and say what it took.

    Returns:
        `documents`, `tokens` computed (those of the sinks with them) and `seconds` by the clock of
        the setting.
    """
    documents = documents_of(setting.library())
    ids = [document_ids(document, pic.tokenizer) for document in documents]
    pic.compile(ids[0][:-1])  # the first forward of a process takes longer than others
    timer = CLOCKS[setting.clock].timer
    begun = timer()
    for each in ids:
        pic.compile(each)
    seconds = timer() - begun
    tokens = sum(len(each) + LINK.sinks.count for each in ids)
    return {"documents": len(ids), "tokens": tokens, "seconds": seconds}


def learn(
    pic: PIC, setting: Setting, ended: Callable[[Running], None], way: Way = SERVINGS[-1]
) -> Knowledge:
    """Graphs of the applications, from a training stream that no arm is tested on.

    It is served as the arms served that the graphs are for, since link and retention change how
    much is computed and written; first come, first served, all at once.
    """
    library = setting.library()
    clock = CLOCKS[setting.clock]()
    server = _server(way, pic, setting)
    tasks = [(0.0, task) for task in stream(library, setting.training, f"{setting.seed} training")]
    finished = serve_stream(
        tasks,
        library,
        lambda running, at_token: server.serve(running.call, at_token),
        FCFS(),
        Knowledge({}, setting.cost),
        clock,
        progress=ended,
    )
    detach(pic.model)
    whole = [one for one in finished if not one.error]
    runs: dict[str, list[tuple[Execution, ...]]] = {}
    for one in whole:
        runs.setdefault(one.task.application, []).append(one.executed)
    return Knowledge(runs, setting.cost)


def run(
    way: Way,
    pic: PIC,
    knowledge: Knowledge,
    setting: Setting,
    repeat: int,
    ended: Callable[[Running], None],
) -> dict:
    """Serve the stream of a repeat under an arm; the record of it."""
    library = setting.library()
    server = _server(way, pic, setting)
    warms = way.link and way.prewarming
    prewarming = (
        ChunkPrewarming(knowledge, server.prefetch, setting.warm_seconds) if warms else None
    )
    try:
        finished = serve_stream(
            setting.arrivals(repeat),
            library,
            lambda running, at_token: server.serve(running.call, at_token),
            ORDERS[way.order],
            knowledge,
            CLOCKS[setting.clock](),
            seed=setting.seed,
            watcher=prewarming,
            progress=ended,
        )
    finally:
        if prewarming is not None:
            prewarming.close()
        detach(pic.model)
    counts = (
        {name: getattr(prewarming, name) for name in ("begun", "brought", "damaged", "errors")}
        if prewarming is not None
        else {}
    )
    return {
        "arm": way.name,
        **asdict(way),
        "repeat": repeat,
        "prewarming_counts": counts,
        "applications": [record_of(one) for one in finished],
    }


def _server(way: Way, pic: PIC, setting: Setting) -> ModelServer:
    """What serves the calls of an arm."""
    return ModelServer(
        pic,
        LINK.method if way.link else None,
        setting.policy if way.retention else None,
        documents_of(setting.library()),
        CLOCKS[setting.clock].timer,
    )


def record_of(running: Running) -> dict:
    """What became of an application, as JSON keeps it."""
    task = running.task
    return {
        "number": task.number,
        "application": task.application,
        "arrival": running.job.arrival,
        "completion": running.completion,
        "error": running.error,
        "expected": task.expected,
        "answers": running.answers,
        "right": [
            is_right(answer, expected)
            for answer, expected in zip(running.answers, task.expected, strict=False)
        ],
        "calls": [
            {**asdict(served), "unit": execution.unit.name, "begun": begun, "waited": waited}
            for (served, begun, waited), execution in zip(
                running.served, running.executed, strict=True
            )
        ],
    }


def served_of(call: dict) -> Served:
    """A call of a record, as it was served."""
    return Served(**{name: call[name] for name in Served.__dataclass_fields__})


def tasks_of(setting: Setting, repeat: int) -> Sequence[Task]:
    """The tasks of a repeat."""
    return [task for _, task in setting.arrivals(repeat)]
