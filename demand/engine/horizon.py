"""For how many steps a batch that decodes stays the same: where the next thing can happen."""

import math

from demand.engine.batch import Batcher
from demand.engine.tasks import Task
from demand.policies.base import Rank
from demand.policies.thresholds import just_below


def identical_steps(batcher: Batcher, now: float, until: float) -> int:
    """Number of steps, from second `now` on, for which forming the batch anew changes nothing.

    That is until a request is over, second `until` is reached, an alarm goes off, the blocks run
    out, or the ranks of the jobs that are served let another request in.
    """
    if not batcher.decodes:
        return 1
    steps = min(request.output_tokens - request.generated for request in batcher.decoding)
    for limit in (_steps_of_time, _steps_of_alarms, _steps_of_blocks, _steps_of_order):
        if steps > 1:
            steps = limit(batcher, now, until, steps)
    return steps


def _steps_of_time(batcher: Batcher, now: float, until: float, most: int) -> int:
    """Least number of steps that reaches `until`, at most `most`."""
    if until == math.inf:
        return most
    width, kv_tokens, engine = batcher.size, batcher.kv_tokens, batcher.engine
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        if now + engine.decode_seconds(width, kv_tokens, middle) >= until:
            high = middle
        else:
            low = middle + 1
    return low


def _steps_of_alarms(batcher: Batcher, now: float, until: float, most: int) -> int:
    """Least number of steps after which a task has produced what an alarm waits for."""
    for task in batcher.order.running:
        if task.alarms:
            most = min(most, max(1, -(-(task.alarms[-1][0] - task.generated) // task.width)))
    return most


def _steps_of_blocks(batcher: Batcher, now: float, until: float, most: int) -> int:
    """Largest number of steps for which there are blocks, at most `most`."""
    engine, batch, free = batcher.engine, batcher.decoding, batcher.blocks.free
    if len(batch) * engine.blocks_for(most - 1) <= free:
        return most
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        needed = sum(engine.blocks_for(r.computed + middle) - r.blocks for r in batch)
        if needed <= free:
            low = middle
        else:
            high = middle - 1
    return low


def _steps_of_order(batcher: Batcher, now: float, until: float, most: int) -> int:
    """Number of steps after which another request may come before one of the batch."""
    order, partial = batcher.order, batcher.partial
    if order.policy.reranks:  # what is served in a step counts before who arrives in the next
        return 1
    if not order.preemptive or not (order.waiting or partial):
        return most
    if partial:
        return _steps_in_order(batcher, now, most)
    best = order.waiting[0][0]
    if any(order.rank(task, now) > best for task in order.fresh):  # being served may change a rank
        return 1
    for task in order.running:
        threshold = best[1] if task.job.index < best[2] else just_below(best[1])
        most = min(most, _steps_to(batcher, task, threshold, most))
    return most


def _steps_to(batcher: Batcher, task: Task, threshold: Rank, most: int) -> int:
    """Number of steps after which the rank of `task` may exceed `threshold`, at most `most`."""
    attained = batcher.policy.next_above(task.job, threshold)
    width = task.width
    if task.attained(most * width) < attained:
        return most
    rate = width * task.cost.decode_seconds_per_token
    steps = math.ceil((attained - task.job.attained_service) / rate) if rate else 1
    steps = min(max(steps, 1), most)
    while steps > 1 and task.attained((steps - 1) * width) >= attained:
        steps -= 1
    while task.attained(steps * width) < attained:
        steps += 1
    return steps


def _steps_in_order(batcher: Batcher, now: float, most: int) -> int:
    """The same where a task waits with some of its requests and runs with others.

    Both its rank and those of the others move, so each step is looked at.
    """
    order, partial = batcher.order, batcher.partial
    assert partial is not None
    steps = most
    for k in range(1, most):
        for task in order.running:
            task.job.attained_service = task.attained(k * task.width)
            order.rank(task, now)
        last = max(task.place for task in order.running)
        if last > partial.place or (order.waiting and last > order.waiting[0][0]):
            steps = k
            break
    for task in order.running:
        task.job.attained_service = task.attained()
    return steps
