"""The independent cells of a sweep, one after the other, over processes, or on a Ray cluster.

The packages do not import each other, so this file stands in each of them, the same but for the
error; `tests/test_sweep.py` holds the copies together.
"""

import gc
import os
import pickle
import sys
import threading
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from picache.errors import PICacheError

Item = TypeVar("Item")
Result = TypeVar("Result")

RAY = "ray"
ADDRESS = "ray://"

ROUND = 8
"""Cells a worker before a Ray cluster's results are handed on: joblib gives them all together."""

IDLE = 10.0
"""Seconds without a cell after which a worker lets go of its task, which may hold a model."""


def checked_workers(workers: object) -> int | str:
    """What `spread` takes as its workers; text that is a number, as from a command line, too.

    Raises:
        PICacheError: anything else.
    """
    if isinstance(workers, str):
        if workers == RAY or (workers.startswith(ADDRESS) and len(workers) > len(ADDRESS)):
            return workers
        if workers.strip().isdecimal():
            workers = int(workers)
    if isinstance(workers, int) and not isinstance(workers, bool) and workers >= 1:
        return workers
    raise PICacheError(
        f"workers is {workers!r:.200}; expected how many processes, such as 4, or a Ray cluster: "
        'its address, such as "ray://127.0.0.1:10001", or "ray" for the one that this process is '
        "connected to"
    )


def spread(
    task: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int | str = 1,
    *,
    named: Callable[[Item], str] = repr,
    what: str = "cells",
    progress: bool = True,
) -> Generator[Result, None, None]:
    """What `task` gives for each item, in the order of the items, whoever works on them.

    Whatever is drawn has to be drawn by a seed that stands in the item: then the results are those
    of one process, however many there are. `task` goes to each worker once, an item when it is its
    turn. Processes on this machine are joblib's and see what this one imported; they stay for a few
    minutes for the next sweep. The machines of a Ray cluster need the same packages, of the same
    versions, and folders that this process imports from at the same paths, if there are any.

    Args:
        task: a function of an item. It and what it gives back can be pickled; functions of a
            notebook can.
        items: the cells.
        workers: 1 for this process, which needs no joblib; how many others; or a Ray cluster, as
            "ray://HOST:PORT" (of its client server). The connection stays, since making one takes
            seconds, until `ray.shutdown()`. "ray" takes the one that `ray.init` has made, with the
            runtime environment that it was given.
        named: what an item is called in an error.
        what: the cells are, in front of the bar.
        progress: whether to show a bar of the cells that are done, where tqdm is installed.

    Raises:
        PICacheError: workers that are none, no joblib or Ray where they are needed, a cluster that
            cannot be reached.
        Exception: what a cell raised, with a note that names it; what else was to do is dropped.
            The same goes for Ctrl-C, which ends the workers.
    """
    workers = checked_workers(workers)
    if workers == 1 or _WORKER.in_cell:  # of another sweep, whose workers are at work
        with bar(len(items), what, progress) as advance:
            for item in items:
                yield _noted(task, named(item), item)
                advance()
        return
    if not items:
        return
    joblib, settings, send, at_once = _workers(workers, len(items))
    sent = send(task)
    token = uuid.uuid4().hex
    done = 0
    with bar(len(items), what, progress) as advance:

        class Shown(joblib.Parallel):  # type: ignore[name-defined]
            """Tells the bar, which joblib would print itself."""

            shown = 0

            def print_progress(self) -> None:
                advance(self.n_completed_tasks - self.shown)
                self.shown = self.n_completed_tasks

        try:
            with Shown(**settings) as pool:
                for first in range(0, len(items), at_once):
                    part = items[first : first + at_once]
                    pool.shown = 0
                    found = pool(joblib.delayed(_cell)(token, sent, named(i), i) for i in part)
                    with (
                        nullcontext(found) if isinstance(found, list) else closing(found) as results
                    ):
                        for result in results:
                            done += 1
                            yield result
        except _CellError as failed:
            raise failed.original() from failed.__cause__  # where it was raised, in the worker
        except Exception as error:  # of a worker that was killed, not of a cell
            if done < len(items):
                error.add_note(f"the first cell without a result is {named(items[done])}")
            raise
        finally:
            _WORKER.let_go()  # where joblib ran the cells in this process


def _workers(
    workers: int | str, cells: int
) -> tuple[Any, dict[str, Any], Callable[[Any], Any], int]:
    """The module joblib, its settings, how a task is handed over, and how many cells at once."""
    try:
        import cloudpickle
        import joblib
    except ImportError as error:
        raise PICacheError(
            f"workers={workers!r} needs joblib and cloudpickle, which are not both installed: pip "
            "install joblib cloudpickle"
        ) from error
    pickled = partial(_pickled, cloudpickle.dumps)
    if isinstance(workers, int):  # results come as they are there
        # Named, since threads, which `joblib.parallel_config` may ask for, would share a model.
        settings = dict(n_jobs=workers, backend="loky", return_as="generator")
        return joblib, settings, pickled, cells
    ray = _connected(workers)
    count = int(ray.cluster_resources()["CPU"])
    return joblib, dict(n_jobs=count, backend=RAY), lambda t: ray.put(pickled(t)), ROUND * count


class _Worker:
    """What this process has as a worker: the task of its last cell, until it has been idle.

    Attributes:
        in_cell: whether it is in a cell just now.
    """

    def __init__(self) -> None:
        self.in_cell = False
        self._kept: tuple[str, Any] = "", None  # the token of a sweep, and its task
        self._turn = threading.Lock()  # of this thread and of the timer's
        self._idle = threading.Timer(IDLE, self._ran_out)

    @contextmanager
    def cell(self, token: str, sent: Any) -> Iterator[Any]:
        """The task of a sweep, for one of its cells."""
        with self._turn:
            self._idle.cancel()
            self.in_cell = True
        try:
            if self._kept[0] != token:
                self._forget()  # the last sweep's, before this one's takes memory
                self._kept = token, _received(sent)
            yield self._kept[1]
        finally:
            with self._turn:
                self.in_cell = False
                self._idle = threading.Timer(IDLE, self._ran_out)
                self._idle.daemon = True
                self._idle.start()

    def let_go(self) -> None:
        """Forget the task, and free what it holds."""
        with self._turn:
            self._idle.cancel()
            self._forget()

    def _ran_out(self) -> None:
        with self._turn:
            if not self.in_cell:  # the next one may have come just now
                self._forget()

    def _forget(self) -> None:
        if self._kept[0]:
            self._kept = "", None
            gc.collect()  # models refer to themselves


_WORKER = _Worker()


def _cell(token: str, sent: Any, name: str, item: Any) -> Any:
    """In a worker: the task of one item."""
    with _WORKER.cell(token, sent) as task:
        try:
            return task(item)
        except Exception as error:
            raise _CellError(name, *_packed(name, error)) from error


def _received(sent: Any) -> Any:
    """In a worker: a task as it was sent."""
    if not isinstance(sent, np.ndarray):
        import ray

        sent = ray.get(sent)
    return pickle.loads(sent)


class _CellError(Exception):
    """What a cell raised, on its way out of a worker: as bytes, which arrive whatever it is.

    Args:
        name: of the cell.
        notes: of the error; one that says itself how it is pickled loses them.
        packed: the error.
    """

    def __init__(self, name: str, notes: list[str], packed: bytes) -> None:
        super().__init__(name, notes, packed)
        self.name, self.notes, self.packed = name, notes, packed

    def original(self) -> Exception:
        """The error, with a note that names the cell."""
        error: Exception = pickle.loads(self.packed)
        error.__dict__.pop("__notes__", None)
        for note in (*self.notes, f"the cell is {self.name}"):
            error.add_note(note)
        return error


def _packed(name: str, error: Exception) -> tuple[list[str], bytes]:
    """The notes of an error, and itself; one that cannot be sent is told in another's words."""
    import cloudpickle  # which sends a class of __main__, too

    notes = list(getattr(error, "__notes__", ()))
    try:
        packed = cloudpickle.dumps(error)
        pickle.loads(packed)
    except Exception:
        packed = pickle.dumps(PICacheError(f"{name}: {type(error).__name__}: {error}"))
    return notes, packed


def _noted(task: Callable[[Item], Result], name: str, item: Item) -> Result:
    """The task of one item; its error says of which."""
    try:
        return task(item)
    except Exception as error:
        error.add_note(f"the cell is {name}")
        raise


def _pickled(dumps: Callable[[Any], bytes], task: Any) -> Any:
    """As an array of bytes, which joblib puts into memory that all its workers map."""
    try:
        return np.frombuffer(dumps(task), np.uint8)
    except Exception as error:
        raise PICacheError(
            f"what every worker is given cannot be pickled ({type(error).__name__}: {error}): give "
            "what can be, or workers=1"
        ) from error


def _connected(workers: str) -> Any:
    """The module ray, connected to a cluster, and known to joblib."""
    try:
        import ray
        from ray.util.joblib import register_ray
    except ImportError as error:
        raise PICacheError(
            f"workers={workers!r} needs Ray, which is not installed: pip install 'ray[client]'"
        ) from error
    if workers == RAY and not ray.is_initialized():
        raise PICacheError(
            'workers="ray" takes the cluster that this process is connected to, and it is to none: '
            'call ray.init(...), or give the address, such as "ray://127.0.0.1:10001"'
        )
    if workers != RAY:
        _connect(ray, workers)
    register_ray()
    return ray


def _connect(ray: Any, address: str) -> None:
    """Connect this process, unless it is connected to the address already."""
    # A connection is told by its namespace: those of two clusters may be jobs of the same number.
    namespace = f"sweeps at {address}"
    if ray.is_initialized():
        if ray.get_runtime_context().namespace == namespace:
            return
        raise PICacheError(
            f"workers={address!r}, and this process is connected to a Ray cluster already: give "
            'workers="ray" to use that one, or call ray.shutdown() before'
        )
    shown = os.pathsep.join(_own_folders(sys.path, (sys.prefix, sys.base_prefix)))
    # A worker would see every GPU of its machine, and all of them the first.
    env_vars = {"PYTHONPATH": shown, "CUDA_VISIBLE_DEVICES": ""}
    try:
        ray.init(address, namespace=namespace, runtime_env={"env_vars": env_vars})
    except ConnectionError as error:
        raise PICacheError(
            f"workers={address!r} cannot be reached ({error}); expected the client server of a Ray "
            "cluster, which `ray start --head` starts at port 10001"
        ) from error


def _own_folders(paths: Sequence[str], environments: Sequence[str]) -> list[str]:
    """Folders outside of environments, whose own packages are each machine's."""
    found = [Path(path).absolute() for path in paths]
    return [str(path) for path in found if not any(map(path.is_relative_to, environments))]


@contextmanager
def bar(total: int, what: str, progress: bool) -> Iterator[Callable[..., Any]]:
    """What to call when one of `total` parts is done, or with how many are; it moves the bar."""
    if progress:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            progress = False
    if not progress:
        yield lambda parts=1: None
        return
    with tqdm(total=total, desc=what) as shown:
        yield shown.update
