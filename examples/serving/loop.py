"""A loop that serves applications call by call, in the order of a policy of `demand`.

Why not transformers' continuous batching: its requests are token ids and nothing else. The engine
computes their KV itself, into pages of its own that are shared by what stands before them in the
prompt, so that a linked prompt, whose KV depends on where its chunks were compiled, has no way in;
and it attends by paged attention, which knows no `SparseCache`. docs/together.md says it at length.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from serving.applications import Call, Steps, Task, steps
from serving.knowledge import Knowledge
from serving.library import Page
from serving.model_server import Served

from demand import Execution, Job, Policy, Unit


class Clock(Protocol):
    """Seconds since the loop began."""

    def now(self) -> float: ...

    def wait_until(self, second: float) -> None:
        """Until the next application arrives."""

    def served(self, seconds: float) -> None:
        """A call was served that took so long."""


class WallClock:
    """The clock on the wall."""

    timer = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self._begun = self.timer()

    def now(self) -> float:
        return self.timer() - self._begun

    def wait_until(self, second: float) -> None:
        time.sleep(max(0.0, second - self.now()))

    def served(self, seconds: float) -> None:
        """It has passed by itself."""


class ProcessorClock:
    """Processor time of this process, and no time while nothing is there to serve.

    On one thread that is what a machine of one's own would take, whoever else is busy on this one.
    """

    timer = staticmethod(time.process_time)

    def __init__(self) -> None:
        self._begun = self.timer()

    def now(self) -> float:
        return self.timer() - self._begun

    def wait_until(self, second: float) -> None:
        self._begun -= max(0.0, second - self.now())

    def served(self, seconds: float) -> None:
        """It has passed by itself."""


CLOCKS = {"wall": WallClock, "processor": ProcessorClock}


class VirtualClock:
    """A clock that goes by what is said to have passed, to replay what was recorded."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def wait_until(self, second: float) -> None:
        self._now = max(self._now, second)

    def served(self, seconds: float) -> None:
        self._now += seconds


class Watcher(Protocol):
    """Is told what applications do, as `serving.prewarming` wants to know."""

    def started(self, running: "Running", now: float) -> None: ...

    def at_token(self, now: float) -> None: ...

    def finished(self, running: "Running", following: str) -> None: ...


@dataclass
class Running:
    """An application in the loop, and in the end what became of it.

    Args:
        task: what it does.
        job: the same as a policy sees it.
        steps: the application.
        call: the next; None once it has ended.
        ready: second since which that call has been waiting.
        executed: units that are over, as the demand graph counts them.
        served: each call, with the second at which it began and the seconds it had waited.
        answers: once it has ended.
        completion: seconds from its arrival to its end.
        error: what it failed with; empty if it did not.
    """

    task: Task
    job: Job
    steps: Steps
    call: Call | None
    ready: float
    executed: tuple[Execution, ...] = ()
    served: list[tuple[Served, float, float]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    completion: float = 0.0
    error: str = ""


def serve_stream(
    tasks: Sequence[tuple[float, Task]],
    library: Sequence[Page],
    serve: Callable[[Running, Callable[[], None]], Served],
    policy: Policy,
    knowledge: Knowledge,
    clock: Clock,
    *,
    seed: int = 0,
    demands: Mapping[int, float] | None = None,
    watcher: Watcher | None = None,
    progress: Callable[[Running], None] = lambda running: None,
) -> list[Running]:
    """Serve applications that arrive one after the other; each call is one decision.

    Args:
        tasks: each with the second of its arrival, in order of arrival.
        library: the pages they search.
        serve: serves the next call of an application, and is given what to call at each token.
            Whatever it raises ends that application, is noted as its error, and no other's.
        policy: whose next call is served: that of the smallest rank, of equals the one that came
            first.
        knowledge: what is known of the demand of an application on arrival and at its progress.
        clock: goes on while calls are served.
        seed: of the numbers that a random order is drawn by.
        demands: true seconds of each task by its number, for an oracle.
        watcher: is told which units begin and end.
        progress: is told of each application that has ended.

    Returns:
        The applications, in order of arrival.
    """
    draw = Random(seed)
    present: list[Running] = []
    everyone: list[Running] = []
    to_come = list(enumerate(tasks))
    while to_come or present:
        if not present:
            clock.wait_until(to_come[0][1][0])
        while to_come and to_come[0][1][0] <= clock.now():
            index, (arrival, task) = to_come.pop(0)
            known = knowledge.on_arrival(task.application)
            job = Job(
                index,
                task.application,
                arrival,
                known,
                demand=float("nan") if demands is None else demands[task.number],
                lottery=draw.random(),
                table=knowledge.table(policy, known),
            )
            application = steps(task, library)
            running = Running(task, job, application, next(application), arrival)
            policy.arrived(job, clock.now())
            present.append(running)
            everyone.append(running)
        now = clock.now()
        chosen = min(present, key=lambda one: (policy.rank(one.job, now), one.job.index))
        _serve_call(chosen, serve, policy, knowledge, clock, watcher)
        if chosen.call is None:
            present.remove(chosen)
            policy.departed(chosen.job, clock.now())
            chosen.completion = clock.now() - chosen.job.arrival
            progress(chosen)
    return everyone


def _serve_call(
    running: Running,
    serve: Callable[[Running, Callable[[], None]], Served],
    policy: Policy,
    knowledge: Knowledge,
    clock: Clock,
    watcher: Watcher | None,
) -> None:
    """Serve one call, and let its application go on to the next."""
    call, begun = running.call, clock.now()
    assert call is not None
    if watcher is not None:
        watcher.started(running, begun)
    with _failing_alone(running):
        served = serve(running, lambda: watcher.at_token(clock.now()) if watcher else None)
        clock.served(served.seconds)
        running.served.append((served, begun, begun - running.ready))
        execution = Execution(Unit(call.unit, "llm"), served.computed_tokens, served.new_tokens)
        running.executed += (execution,)
        seconds = knowledge.cost.seconds(execution)
        running.job.attained_service += seconds
        policy.served(running.job, seconds, clock.now())
        try:
            running.call = running.steps.send(served.text)
        except StopIteration as ended:
            running.call, running.answers = None, ended.value
        else:
            running.ready = clock.now()
            left = knowledge.remaining(running.task.application, running.executed, running.call)
            running.job.expect(left, knowledge.table(policy, left))
    if watcher is not None:
        watcher.finished(running, "end" if running.call is None else running.call.unit)


@contextmanager
def _failing_alone(running: Running) -> Iterator[None]:
    """What is raised inside ends this application, with the error noted, and the loop goes on."""
    try:
        yield
    except Exception as error:
        running.error = f"{type(error).__name__}: {error}"
        running.call = None
        running.steps.close()
