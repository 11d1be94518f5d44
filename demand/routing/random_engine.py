"""Any engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from typing_extensions import override

from demand.arguments import whole_number
from demand.routing.base import ReadyUnit, Router, SeenEngine


@final
@dataclass(frozen=True)
class RandomEngine(Router):
    """Each unit goes to an engine that is drawn evenly: the baseline of any router.

    Args:
        seed: of the draws, which are the same in every simulation.

    Raises:
        DemandError: a seed that is not a whole number of at least 0.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", whole_number("seed", self.seed, least=0))

    @override
    def new_state(self, engines: int) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    @override
    def choose(
        self, unit: ReadyUnit, engines: Sequence[SeenEngine], state: np.random.Generator
    ) -> int:
        return int(state.integers(len(engines)))
