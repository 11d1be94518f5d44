"""The policies of `demand` in the continuous batching of transformers, 5.20 up to below 6.

`continuous_batching` is all that most need. With a manager of your own: make a `JobTable`, start
the manager inside `install`, call `check_installed`, and wrap the manager in a `Batching`, or
announce each request to the table yourself. Importing registers nothing with transformers.
"""

import transformers
from transformers.generation import continuous_batching as _engine

from demand.integrations.transformers.compat import check_features, check_version

check_version(transformers.__version__)
check_features(_engine)

from demand.integrations.plans import PlanError, Planned  # noqa: E402
from demand.integrations.transformers.batching import (  # noqa: E402  # they import parts that were checked above
    Batching,
    continuous_batching,
)
from demand.integrations.transformers.install import check_installed, install  # noqa: E402
from demand.integrations.transformers.jobs import JobTable  # noqa: E402
from demand.integrations.transformers.scheduler import RankScheduler  # noqa: E402

__all__ = [
    "Batching",
    "JobTable",
    "PlanError",
    "Planned",
    "RankScheduler",
    "check_installed",
    "continuous_batching",
    "install",
]
