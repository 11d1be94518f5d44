"""Seconds to the end from each node, drawn once: what a random walk finds ahead of it."""

from dataclasses import dataclass, field
from typing import final

import numpy as np

from demand.graph.walks import Draws, WalkArrays
from demand.seconds import Floats
from demand.units import END


@final
@dataclass(frozen=True, eq=False)
class WalkTable:
    """Totals of random walks from each node to the end, which every question shares.

    Walker w of a question draws what is left of the present unit, and its successor, on its own;
    from the successor v on it takes `rest(v)[w]`, the total of a walk from v that was drawn for
    walker w once and for all.

    What a walk does after it has come to v depends on v alone, whatever it has done before and be
    it its second visit: that is so for `WalkArrays`, and the bound below is for them. Where it
    depends on more, as on the first visits of `PearsonFilter`, such totals are only for walks that
    no longer do.

    Error. To the walkers of one question nothing is shared: what walker w takes depends on draws
    that no other walker sees, and has the distribution of a walk of its own. So the totals are
    `walks` independent draws of the exact distribution F, as with walks made for the question.
    By the inequality of Dvoretzky, Kiefer and Wolfowitz with Massart's constant, their empirical
    distribution is off from F by more than sqrt(ln(2 / p) / (2 walks)) somewhere with a probability
    of p at most: by 0.043 for a thousand walks and p = 0.05. That is up to the rounding of sums:
    seconds are added in another order than along one walk, so that an atom may stand some units in
    the last place beside its own. The mean is unbiased, of standard error sigma / sqrt(walks),
    sigma being the standard deviation of F. What is shared is shared between questions: their
    errors are alike, so that answers differ by what was seen rather than by chance, and the mean
    over many questions is no better than one.

    A walk from a node is drawn when the first question needs it.

    Args:
        arrays: the samples.
        walks: random walks of each question.
        seed: of all draws.
        steps: units after which a walk is given up.
    """

    arrays: WalkArrays
    walks: int
    seed: int
    steps: int
    _rest: dict[int, Floats] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_rest", {self.arrays.nodes[END]: np.zeros(self.walks)})

    def answers(self, arrays: WalkArrays, walks: int, seed: int, steps: int) -> bool:
        """Whether it is the table for these arguments."""
        return self.arrays is arrays and (self.walks, self.seed, self.steps) == (walks, seed, steps)

    def rest(self, node: int) -> Floats:
        """`[walks]` seconds to the end of an application that has come to `node`.

        Raises:
            DemandError: a walk is not over after `steps` units.
        """
        if node not in self._rest:
            rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(node,)))
            there = Draws(np.zeros(1), np.array([node]), None)
            self._rest[node] = self.arrays.walk(there, rng, self.walks, self.steps)
        return self._rest[node]

    def totals(self, first: Draws) -> Floats:
        """`[walks]` seconds to the end for an application whose next step draws from `first`.

        Raises:
            DemandError: as `rest`.
        """
        total, at = first.draw(np.random.default_rng(self.seed), self.walks)
        for node in np.unique(at).tolist():
            here = at == node
            total[here] += self.rest(node)[here]
        return total
