"""What a request to an engine says of its application, in the fields that engines pass through."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self, final

from demand.errors import DemandError

UNANNOTATED = "unannotated"
"""Application of the requests that name none."""

_PREFIX = "demand_"
_NUMBERS = ("deadline_seconds", "weight", "priority", "demand_seconds")


@final
@dataclass(frozen=True)
class Annotation:
    """Which run of which application a request belongs to.

    Args:
        application: its name.
        run: identifies the run among those of the application; the requests of one run are ranked
            together. Empty: the request is a run of its own.
        last: whether it is the last request of the run.
        known: `deadline_seconds`, `tenant`, `weight`, `priority`, `demand_seconds`, as for
            `Ledger.open`; those of the first request of a run hold.
    """

    application: str = UNANNOTATED
    run: str = ""
    last: bool = False
    known: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """Read what `annotation` wrote among other fields.

        Raises:
            DemandError: an unknown field of ours, or a value of the wrong kind.
        """
        ours = {
            name.removeprefix(_PREFIX): value
            for name, value in fields.items()
            if name.startswith(_PREFIX)
        }
        application = _text(ours, "application", UNANNOTATED)
        run, last = _text(ours, "run", ""), ours.pop("last", 0)
        known: dict[str, Any] = {}
        for name, value in ours.items():
            number = isinstance(value, int | float) and not math.isnan(value)
            if not (isinstance(value, str) if name == "tenant" else name in _NUMBERS and number):
                raise DemandError(f"{_PREFIX}{name} is {value!r}; expected what `annotation` makes")
            known[name] = value
        return cls(application, run, bool(last), known)


def annotation(
    application: str, run: str = "", *, last: bool = False, **known: str | float
) -> dict[str, str | int | float]:
    """Fields that tell a `make_scheduler` class what a request belongs to.

    Hand them to vLLM as `SamplingParams(extra_args=...)`, or over HTTP as `vllm_xargs` in the
    body; it passes both through to the scheduler unread. See `Annotation` for the arguments.

    Raises:
        DemandError: an unknown field, or a value of the wrong kind.
    """
    fields: dict[str, str | int | float] = {
        f"{_PREFIX}application": application,
        f"{_PREFIX}run": run,
        f"{_PREFIX}last": int(last),
        **{_PREFIX + name: value for name, value in known.items()},
    }
    Annotation.of(fields)
    return fields


def _text(ours: dict[str, Any], name: str, default: str) -> str:
    text = ours.pop(name, default)
    if not isinstance(text, str) or (name == "application" and not text):
        raise DemandError(f"{_PREFIX}{name} is {text!r}; expected a string, and not an empty name")
    return text
