"""The same work on many items, by one process or several."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from typing import TypeVar

import torch
from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")


def spread(
    task: Callable[[Item], Result], items: Sequence[Item], workers: int, desc: str
) -> Iterator[Result]:
    """The results in the order of the items; several workers take one thread each.

    On several GPUs, one worker after the other takes the next of them.
    """
    if workers == 1:
        yield from map(task, tqdm(items, desc=desc))
        return
    context = get_context("spawn")
    numbers = context.SimpleQueue()
    for number in range(workers):
        numbers.put(number)
    with ProcessPoolExecutor(workers, context, _begin, (numbers,)) as pool:
        yield from tqdm(pool.map(task, items), total=len(items), desc=desc)


def _begin(numbers: "SimpleQueue[int]") -> None:
    """Called in each worker before its first item."""
    torch.set_num_threads(1)
    number = numbers.get()
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
