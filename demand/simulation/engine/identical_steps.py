"""For how many steps a batch that decodes stays the same: where the next thing can happen."""

import math

from demand.simulation.engine.batcher import Batcher
from demand.simulation.engine.job_on_engine import FIRST


def identical_steps(batcher: Batcher, now: float, until: float) -> int:
    """Number of steps, from second `now` on, for which forming the batch anew changes nothing.

    That is until a call is over, second `until` is reached, an alarm goes off, the blocks run
    out, or the order of the jobs may have changed so that another call comes in. Where the rank of
    a job changed as it was left out of the batch, that is the next step already.
    """
    if not batcher.batch.steady or batcher.moved:
        return 1
    steps = batcher.until - batcher.batch.step
    if steps > 1 and until < math.inf:
        steps = _steps_of_time(batcher, now, until, steps)
    if steps > 1:
        steps = _steps_of_blocks(batcher, steps)
    if steps > 1:
        steps = _steps_of_order(batcher, now, steps)
    return steps


def _steps_of_time(batcher: Batcher, now: float, until: float, most: int) -> int:
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


def _steps_of_blocks(batcher: Batcher, most: int) -> int:
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


def _steps_of_order(batcher: Batcher, now: float, most: int) -> int:
    """Number of steps after which another call may come before one of the batch, at most `most`.

    The bounds of the jobs in the batch hold for all of them. Only the job that is served in part
    is ranked step by step: it must stay behind the bounds of all others, and before those that
    wait.
    """
    order, partial, step = batcher.order, batcher.partial, batcher.batch.step
    if partial is None or not order.preemptive:
        return most
    best = order.best_waiting
    worst = FIRST
    for job in order.running:
        if job is not partial:
            if job.bound is None:
                return 1
            worst = max(worst, job.bound)
    steps = 0
    while steps < most and worst < partial.place < best:
        steps += 1
        partial.attained_service = partial.attained(step + steps)
        order.place(partial, now)
        partial.exact = False  # that is where it will stand
    partial.attained_service = partial.attained(step)
    return max(steps, 1)
