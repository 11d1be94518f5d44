"""What the tests of `continuous_batching` share: a model that no engine runs, and how to serve."""

from functools import cache

from demand import FCFS
from demand.integrations.transformers import continuous_batching
from tests.demand import continuous
from tests.demand.continuous import KNOWN, config
from tests.helpers import tiny_model

SECONDS = 60.0


@cache
def _idle_model():
    """One that no engine runs: two threads in a forward at once spoil `config.is_causal`."""
    return tiny_model("llama", num_hidden_layers=2)


def generated(ids: list[int], new: int) -> list[int]:
    return continuous.generated(_idle_model(), ids, new)


def serve(model, policy=FCFS(), **settings):  # noqa: B008  # frozen
    settings = dict(distributions=KNOWN, config=config()) | settings
    return continuous_batching(model, policy, **settings)
