"""What does a whole head look like? Error and density at every u of the grid and every level.

A one-pass profile answers every threshold by a look-up, so such tables cost next to nothing there.
"""

from dataclasses import dataclass

import numpy as np

from afbs_compile.tuner.arrays import Floats
from afbs_compile.tuner.curves import GRID
from afbs_compile.tuner.objective import Evaluator, Fidelity, checked_lambdas, lambdas_of, measure
from afbs_compile.tuner.strategy import Found
from afbs_compile.tuner.trace import look_ups


@dataclass(frozen=True, slots=True, eq=False)
class Landscape:
    """Dense tables of H heads over Z levels and the U points of `GRID`.

    Attributes:
        lambdas: of the levels, log2 units [Z].
        error: relative L1 [H, Z, U].
        density: [H, Z, U].
    """

    lambdas: tuple[float, ...]
    error: Floats
    density: Floats

    def best(self, target: Floats) -> Found:
        """The exhaustive optimum: least density with error ≤ target [H]; of equal ones any."""
        heads = len(target)
        error, density = self.error.reshape(heads, -1), self.density.reshape(heads, -1)
        cost = np.where((error <= target[:, None]) & (target > 0.0)[:, None], density, np.inf)
        at, rows = cost.argmin(1), np.arange(heads)
        level, n = np.divmod(at, len(GRID))
        feasible = np.isfinite(cost[rows, at])
        return Found(GRID[n], level, error[rows, at], density[rows, at], feasible)


def landscape_of(evaluator: Evaluator, fidelity: Fidelity) -> Landscape:
    """Every u of the grid at every level; a traced profile is charged once, as a profile."""
    lambdas, source = checked_lambdas(lambdas_of(evaluator)), look_ups(evaluator)
    shape = (evaluator.heads, len(lambdas), len(GRID))
    error, density = np.empty(shape), np.empty(shape)
    for z in range(len(lambdas)):
        level = np.full(evaluator.heads, z)
        for n, u in enumerate(GRID):
            measured = measure(source, np.full(evaluator.heads, u), fidelity, level)
            error[:, z, n], density[:, z, n] = measured.error, measured.density
    return Landscape(lambdas, error, density)
