"""The same work on many items, by one process or several."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

import torch
from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")


def spread(
    task: Callable[[Item], Result], items: Sequence[Item], workers: int, desc: str
) -> Iterator[Result]:
    """The results in the order of the items; several workers take one thread each."""
    if workers == 1:
        yield from map(task, tqdm(items, desc=desc))
        return
    with ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        yield from tqdm(pool.map(task, items), total=len(items), desc=desc)
