"""For how many steps nobody else may run, where running requests are served first."""

from heapq import nsmallest

from demand.simulation.engine.job_on_engine import FIRST, NEVER, NOBODY, JobOnEngine, Place
from demand.simulation.engine.places import Places


def find_checks(places: Places, displaces: bool, moved: bool, now: float) -> int:
    """Find when each running job is to be checked.

    Args:
        places: of the batch that was formed.
        displaces: whether a better rank takes the place of a running one.
        moved: whether the next batch may be another anyway.
        now: second at which its step begins.

    Returns:
        Steps carried out when the first of the jobs is.
    """
    order, next_step = places.order, places.batch.step + 1
    if order.reranks:
        for job in order.running:
            job.bound, job.exact, job.check_step = None, False, next_step
        return next_step
    if moved or places.batch.prefilling:  # another batch is formed after this step anyway
        for job in order.running:
            if job.exact:
                job.bound, job.exact = None, False
        return next_step
    challenger, until = _challenger(places, displaces), NEVER
    for job in order.running:
        if job.placed == job.requests and (
            job.exact or job.bound is None or job.bound > challenger
        ):
            order.find_bound(job, now, challenger)
            if job.bound is None:
                until = next_step
        elif job.check_step < next_step:
            job.check_step = job.next_check(next_step - 1)
        until = min(until, job.check_step)
    for job in places.partial:
        if not job.exact:
            order.rank(job, now)
    return until


def steps_in_order(places: Places, displaces: bool, now: float, most: int) -> int:
    """Steps after which another call may run because ranks have moved, at most `most`.

    The bounds of the jobs in the batch hold for all of them. Those of which calls wait as well
    are ranked step by step: none may come before the first that waits, and no rank that waits
    below one that runs.
    """
    order, batch, partial = places.order, places.batch, places.partial
    most = _steps_of_cache(places, most)
    if not partial:
        return most
    free = batch.engine.max_requests - batch.size
    if not free and not displaces:
        return most
    if free and displaces and places.present - batch.size > free:
        return 1
    worst = FIRST
    if not free:
        for job in order.running:
            if job.placed == job.requests:
                if job.bound is None:
                    return 1
                worst = max(worst, job.bound)
    first, steps, step = _first_waiting(places), 0, batch.step
    while steps < most:
        if free:
            if _first_waiting(places) is not first:
                break
        else:
            best = min(order.best_waiting, min(job.place for job in partial))
            best = (best[0], best[1], NEVER)
            if worst > best or any(job.place > best for job in partial):
                break
        steps += 1
        for job in partial:
            job.attained_service = job.attained(step + steps)
            order.place(job, now)
            job.exact = False  # that is where it will stand
    for job in partial:
        job.attained_service = job.attained(step)
    return max(steps, 1)


def _steps_of_cache(places: Places, most: int) -> int:
    """Steps before what is given up or held may be something else, at most `most`."""
    cache, batch = places.cache, places.batch
    if cache is None or not cache.retention.moves:
        return most
    if places.present > batch.size and batch.room:  # what is held may lapse
        return 1
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        if batch.blocks.growth(batch.step + 1, middle - 1) + cache.total <= batch.blocks.free:
            low = middle
        else:
            high = middle - 1
    return low


def _first_waiting(places: Places) -> JobOnEngine | None:
    """The first of the jobs with calls that wait, if it is one of which others run."""
    first, best = None, places.order.best_waiting
    for job in places.partial:
        if job.place < best:
            first, best = job, job.place
    return first


def _challenger(places: Places, displaces: bool) -> Place:
    """Before which the running jobs must stay: that of the first that waits for no free place.

    `NOBODY` where there is none, or nobody gives way.
    """
    order, batch = places.order, places.batch
    running = batch.decoding
    free = batch.engine.max_requests - running
    if not displaces or places.present - running <= free:
        return NOBODY
    best = order.best_waiting
    if free:
        for place, job in nsmallest(free + 1, order.waiting):
            best = place
            free -= job.requests
            if free < 0:
                break
    for job in places.partial:
        best = min(best, job.place)
    return best if best is NOBODY else (best[0], best[1], NEVER)
