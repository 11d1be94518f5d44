"""The same work with a model on many items: who works on them, and on which device."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch
from tqdm import tqdm

from picache import PICacheError
from picache.sweep import spread as spread_cells

Item = TypeVar("Item")
Result = TypeVar("Result")


def spread(
    task: Callable[[Item], Result], items: Sequence[Item], workers: int | str, desc: str
) -> Iterator[Result]:
    """The results in the order of the items; several workers take one thread each.

    On several GPUs, one worker of this machine after the other takes the next of them.

    Raises:
        PICacheError: on a machine with a GPU, a Ray cluster, whose workers would see none.
    """
    if workers == 1:
        yield from map(task, tqdm(items, desc=desc))
        return
    if isinstance(workers, str) and torch.cuda.is_available():
        raise PICacheError(
            f"workers={workers!r} and a GPU here: a worker of a Ray cluster sees no GPU "
            "that it did not ask for, and would measure on the CPU; give a number of processes on "
            "each machine"
        )
    task_there = partial(_on_one_device, task)
    yield from spread_cells(task_there, items, workers, named=_short, what=desc)


def _short(item: object) -> str:
    return f"{item!r:.200}"


def _on_one_device(task: Callable[[Item], Result], item: Item) -> Result:
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        _, _, number = multiprocessing.current_process().name.rpartition("-")  # LokyProcess-3
        torch.cuda.set_device(int(number) % torch.cuda.device_count())
    return task(item)
