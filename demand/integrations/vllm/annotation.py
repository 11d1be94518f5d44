"""How a request tells a scheduler inside an engine which run of which application it is of."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self, final

from demand.errors import DemandError
from demand.integrations.job_ledger import JobDetails
from demand.integrations.learning import CALL
from demand.units import Unit

UNANNOTATED = "unannotated"
"""Name of the application of all requests that name none."""

_PREFIX = "demand_"
_DETAILS = JobDetails.__annotations__


@final
@dataclass(frozen=True)
class Annotation:
    """Which run of which application a request belongs to, as `annotation` wrote it.

    Args:
        application: as for `annotation`, and so are the others.
        run: see there.
        last: see there.
        details: see there.
        unit: see there.
    """

    application: str = UNANNOTATED
    run: str = ""
    last: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)
    unit: str = CALL

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """Read the fields that `annotation` wrote; those of others are passed over.

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
        unit = _text(ours, "unit", CALL)
        Unit(unit, "llm")
        details: dict[str, Any] = {}
        for name, value in ours.items():
            number = isinstance(value, int | float) and not math.isnan(value)
            good = isinstance(value, str) if name == "tenant" else number
            if name not in _DETAILS or not good:
                raise DemandError(f"{_PREFIX}{name} is {value!r}; expected what `annotation` makes")
            details[name] = value
        return cls(application, run, bool(last), details, unit)


def annotation(
    application: str,
    run: str = "",
    *,
    last: bool = False,
    unit: str = CALL,
    **details: str | float,
) -> dict[str, str | int | float]:
    """Fields that tell a scheduler of `make_scheduler` which run a request belongs to.

    Hand them to vLLM as `SamplingParams(extra_args=...)`, or over HTTP as `vllm_xargs` in the
    body of the request; it passes both on to the scheduler unread.

    Args:
        application: name of the application.
        run: identifies the run among those of the application; the requests of one run are ranked
            together. Empty for a request that is a run of its own.
        last: whether it is the last request of the run.
        unit: name of the unit that it is a call of, for an estimator; requests of one unit that
            overlap in time are one execution of it, and units that overlap went side by side.
        details: of the run, any of `deadline_seconds`, `tenant`, `weight`, `priority` and
            `demand_seconds`, as for `AdmissionController.start`. Those that the first request of
            a run gives hold for all of it.

    Raises:
        DemandError: an unknown field, or a value of the wrong kind.
    """
    fields: dict[str, str | int | float] = {
        f"{_PREFIX}application": application,
        f"{_PREFIX}run": run,
        f"{_PREFIX}last": int(last),
        **({} if unit == CALL else {f"{_PREFIX}unit": unit}),
        **{_PREFIX + name: value for name, value in details.items()},
    }
    Annotation.of(fields)
    return fields


def _text(ours: dict[str, Any], name: str, default: str) -> str:
    text = ours.pop(name, default)
    if not isinstance(text, str) or (name == "application" and not text):
        raise DemandError(f"{_PREFIX}{name} is {text!r}; expected a string, and not an empty name")
    return text
