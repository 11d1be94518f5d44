"""Register the scheduler with transformers for a while, and check that a manager runs it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING

from demand.arguments import check_instance
from demand.errors import DemandError
from demand.integrations.transformers.jobs import JobTable
from demand.integrations.transformers.scheduler import RankScheduler


@contextmanager
def install(jobs: JobTable, name: str = "demand") -> Iterator[str]:
    """Register `RankScheduler` with transformers under `name` while the context is open.

    A manager finds its scheduler by that name as it starts, in its own thread, and only warns if
    there is none. So start it inside the context, and call `check_installed` before leaving.

    Args:
        jobs: the table that the scheduler ranks by.
        name: what to put into `ContinuousBatchingConfig.scheduler_type`; also what the context
            gives.

    Raises:
        DemandError: the name is taken, or `jobs` is no `JobTable`.
    """
    check_instance("jobs", jobs, JobTable, "a JobTable")
    if name in SCHEDULER_MAPPING:
        raise DemandError(
            f"a scheduler named {name!r} is installed already; choose another name, or leave the "
            "context that installed it first"
        )
    SCHEDULER_MAPPING[name] = partial(RankScheduler, jobs=jobs)  # type: ignore[assignment]
    try:
        yield name
    finally:
        del SCHEDULER_MAPPING[name]


def check_installed(
    manager: ContinuousBatchingManager, jobs: JobTable, timeout_seconds: float = 60.0
) -> RankScheduler:
    """Check that a started manager serves in the order of `jobs`; give its scheduler.

    Args:
        manager: of transformers, started inside `install`.
        jobs: the table given to `install`.
        timeout_seconds: how long to wait for the manager to come up.

    Raises:
        DemandError: the manager was not started, did not come up in time, runs another
            scheduler, batches asynchronously, with which this scheduler was never run, or splits
            its model over processes, each of which would rank by a clock of its own.
    """
    check_instance("jobs", jobs, JobTable, "a JobTable")
    give_up = time.monotonic() + timeout_seconds
    while manager.batch_processor is None and manager.is_running():
        if time.monotonic() > give_up:
            raise DemandError(f"the manager is not up after {timeout_seconds} s; allow it more")
        time.sleep(0.001)
    if manager.batch_processor is None:
        cause = manager.background_thread_status.fatal_error
        raise DemandError(f"the manager is not running ({cause}); start it first") from cause
    scheduler = manager.batch_processor.scheduler
    if not isinstance(scheduler, RankScheduler) or scheduler.jobs is not jobs:
        raise DemandError(
            f"the manager runs {type(scheduler).__name__}, not the order of {jobs!r}; start it "
            "inside install(), with scheduler_type set to the name that gives, and after "
            "model.destroy_cached_continuous_batching_manager() if one was kept"
        )
    if manager.batch_processor.use_async_batching:
        raise DemandError(
            "the manager batches asynchronously, in which the scheduler knows tokens a step late; "
            "that was never run: set use_async_batching=False"
        )
    if manager.distributed_helper.tp_size > 1:
        raise DemandError(
            f"the model is split over {manager.distributed_helper.tp_size} processes, each with a "
            "scheduler and a clock of its own, whose batches would differ; use one process"
        )
    return scheduler
