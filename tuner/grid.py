"""What does grid search find? Strategy `grid`: every lambda with eleven tau, all measured.

The anchor of AFBS-BO (arXiv 2603.18417), whose own grid is not published. Eleven u at equal
distances: closer where tau is near 1 and errors are small, which is kinder to the grid than equal
steps of tau. theta is left out: with the sink forced it has no effect.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from afbs_compile.tuner.arrays import Floats, Ints
from afbs_compile.tuner.incumbent import best_of
from afbs_compile.tuner.objective import Evaluator, lambdas_of, measure
from afbs_compile.tuner.one_target import OneTarget
from afbs_compile.tuner.strategy import Found, SitePlan

TAUS: Floats = np.linspace(0.0, 2.5, 11)  # as u: tau 0, 0.44, 0.68, 0.82, 0.9 … 0.997


@dataclass(frozen=True, slots=True)
class Grid(OneTarget):
    """88 evaluations a head with eight lambdas."""

    def refine(self, evaluator: Evaluator, plan: SitePlan) -> Found:
        """Measure the grid; a head without a feasible point is not feasible."""
        points = grid_points(evaluator.heads, len(lambdas_of(evaluator)))
        return best_of(lambda u, z: measure(evaluator, u, self.high, z), points, plan.target)


def grid_points(heads: int, levels: int) -> Iterator[tuple[Floats, Ints]]:
    """Every tau with every level, the same for all heads."""
    for level in range(levels):
        for u in TAUS:
            yield np.full(heads, u), np.full(heads, level)
