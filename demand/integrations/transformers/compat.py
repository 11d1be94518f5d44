"""Which transformers the scheduler works with: versions, and the private parts that it uses."""

import inspect
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from typing import Any

from demand.errors import DemandError

OLDEST, BELOW = (5, 20), (6,)

_SIGNATURES = {
    "scheduler.Scheduler.__init__": "self cache safety_margin max_requests_per_batch",
    "scheduler.Scheduler.schedule_batch": "self token_budget cache_budget",
    "scheduler.Scheduler._process_candidates": (
        "self candidates token_budget cache_budget request_ids_to_remove_from_waiting"
    ),
    "scheduler.Scheduler._cleanup_waiting_queue": "self request_ids_to_remove_from_waiting",
    "scheduler.Scheduler.add_waiting_request": "self state",
    "scheduler.Scheduler.finish_request": "self request_id",
    "scheduler.Scheduler.clear_cancelled_requests": "self",
    "offloading_manager.OffloadingManager.offload_requests": "self",
    "cache.PagedAttentionCache.compute_free_capacity": "self relative",
    "cache.PagedAttentionCache.evict_cached_blocks": "self",
    "cache_allocators.CacheAllocator.needs_new_blocks": "self request_id past_length query_length",
}
_STATE_FIELDS = (
    "request_id initial_tokens generated_tokens remaining_prefill_tokens tokens_to_process "
    "position_offset num_children"
).split()


def check_version(found: str) -> None:
    """Refuse a version of transformers outside the supported range.

    Raises:
        DemandError: `found` is older or newer than the scheduler was written for.
    """
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if not OLDEST <= numbers < BELOW:
        raise DemandError(
            f"transformers is {found}; the continuous-batching scheduler of demand fits 5.20 up to "
            'below 6: install a version in that range, such as pip install "transformers>=5.20,<6"'
        )


def check_features(package: Any) -> None:
    """Refuse a transformers whose continuous batching has other parts than the scheduler uses.

    Those parts are not public, so that even a version in range can differ.

    Args:
        package: `transformers.generation.continuous_batching`.

    Raises:
        DemandError: parts are missing or have another signature; it names each of them.
    """
    wrong = [
        f"{path}({', '.join(expected.split())})"
        for path, expected in _SIGNATURES.items()
        if _parameters(package, path) != expected.split()
    ]
    mapping = _find(package, "scheduler.SCHEDULER_MAPPING")
    if not isinstance(mapping, dict) or "fifo" not in mapping:
        wrong.append('scheduler.SCHEDULER_MAPPING, a dict with "fifo"')
    state = _find(package, "requests.RequestState")
    has = {field.name for field in fields(state)} if is_dataclass(state) else set()
    wrong += [f"requests.RequestState.{name}" for name in _STATE_FIELDS if name not in has]
    if wrong:
        raise DemandError(
            f"continuous batching of transformers {version('transformers')} has no "
            f"{'; '.join(wrong)}, which the scheduler of demand uses: take a version that "
            "docs/transformers_scheduler.md lists as run"
        )


def _find(package: Any, path: str) -> Any:
    for name in path.split("."):
        package = getattr(package, name, None)
    return package


def _parameters(package: Any, path: str) -> list[str] | None:
    function = _find(package, path)
    return list(inspect.signature(function).parameters) if callable(function) else None
