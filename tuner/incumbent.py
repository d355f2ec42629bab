"""Which of the points measured so far is best for each head? Least density among the feasible."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np

from afbs_compile.tuner.arrays import Floats, Ints
from afbs_compile.tuner.objective import U_MAX, Measured
from afbs_compile.tuner.strategy import Found

Evaluate = Callable[[Floats, Ints], Measured]
"""Error and density at u [H] and level [H]; the fidelity is settled."""


@dataclass(slots=True, eq=False)
class Incumbent:
    """The best of what was measured; until a point is feasible, u = U_MAX and a density of 1.

    Attributes:
        target: largest error allowed [H].
        found: the best so far.
    """

    target: Floats
    found: Found

    @classmethod
    def none(cls, target: Floats) -> Self:
        """Nothing was measured: a head without a feasible point is to be dense."""
        n = len(target)
        no = np.zeros(n, dtype=bool)
        dense = Found(np.full(n, U_MAX), np.zeros(n, dtype=np.int64), np.zeros(n), np.ones(n), no)
        return cls(target, dense)

    def see(self, u: Floats, level: Ints, measured: Measured) -> None:
        """Take the heads over for which this point is feasible, and better."""
        old = self.found
        feasible = (measured.error <= self.target) & (self.target > 0.0)
        better = feasible & (~old.feasible | (measured.density < old.density))
        new = (u, level, measured.error, measured.density, feasible)
        self.found = Found(*(np.where(better, n, o) for n, o in zip(new, old, strict=True)))


def best_of(evaluate: Evaluate, points: Iterable[tuple[Floats, Ints]], target: Floats) -> Found:
    """Measure all points, (u [H], level [H]) each, and take the best for each head."""
    best = Incumbent.none(target)
    for u, level in points:
        best.see(u, level, evaluate(u, level))
    return best.found
