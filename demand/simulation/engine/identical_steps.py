"""For how many steps a batch that decodes stays the same: where the next thing can happen."""

import math

from demand.simulation.engine.batcher import Batcher
from demand.simulation.engine.running_first import RunningFirst

AnyBatcher = Batcher | RunningFirst


def identical_steps(batcher: AnyBatcher, now: float, until: float) -> int:
    """Number of steps, from second `now` on, for which forming the batch anew changes nothing.

    That is until a call is over, second `until` is reached, an alarm goes off, the blocks run
    out, or the order of the jobs may have changed so that another call comes in. Where the rank of
    a job changed as it was left out of the batch, that is the next step already.
    """
    if not batcher.batch.steady or batcher.moved:
        return 1
    steps = batcher.until - batcher.batch.step
    if steps > 1 and until < math.inf:
        steps = steps_of_time(batcher, now, until, steps)
    if steps > 1:
        steps = _steps_of_blocks(batcher, steps)
    if steps > 1:
        steps = batcher.steps_in_order(now, steps)
    return steps


def steps_of_time(batcher: AnyBatcher, now: float, until: float, most: int) -> int:
    """Least number of steps that reaches `until`, at most `most`."""
    seconds = batcher.batch.seconds
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        if now + seconds(middle) >= until:
            high = middle
        else:
            low = middle + 1
    return low


def _steps_of_blocks(batcher: AnyBatcher, most: int) -> int:
    """Largest number of steps for which there are blocks, at most `most`; the first has its own."""
    batch, blocks, second = batcher.batch, batcher.batch.blocks, batcher.batch.step + 1
    if batch.size * batch.engine.blocks_for(most - 1) <= blocks.free:
        return most
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        if blocks.growth(second, middle - 1) <= blocks.free:
            low = middle
        else:
            high = middle - 1
    return low
