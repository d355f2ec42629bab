"""What if every threshold could be looked up? Strategy `one-pass`: the best point of all.

A one-pass profile answers each u of the grid at each level of lambda, so nothing is searched: one
price over all points of all heads, exactly optimal under the cap, near it under a budget. Its cost
is the profile's. With an evaluator that has no profile every look-up is a measurement, and counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from afbs_compile.tuner.allocate import allocate
from afbs_compile.tuner.arrays import Floats, Ints
from afbs_compile.tuner.backoff import back_off
from afbs_compile.tuner.curves import GRID, Curves, stacked
from afbs_compile.tuner.landscape import landscape_of
from afbs_compile.tuner.objective import U_MAX, Evaluator, Fidelity, measure
from afbs_compile.tuner.strategy import Found, Goal, Plan, SitePlan, Validated
from afbs_compile.tuner.trace import look_ups


@dataclass(frozen=True, slots=True)
class OnePass:
    """Looks everything up at high fidelity."""

    goal: Goal
    low: Fidelity
    high: Fidelity

    def explore(self, evaluator: Evaluator, earlier: Sequence[Curves] = ()) -> Curves:
        """Every u of the grid with every level, level by level along the last axis."""
        dense = landscape_of(evaluator, self.high)
        error, density = (table.reshape(len(table), -1) for table in (dense.error, dense.density))
        certain = np.zeros(error.shape)
        return Curves(np.tile(GRID, len(dense.lambdas)), error, density, certain, certain)

    def allocate(self, curves: Mapping[str, Curves]) -> Plan:
        """One price for all heads; a head's target is the error of the point that it takes."""
        error, density = stacked(list(curves.values()))
        given = allocate(error, density, self.goal.cap, self.goal.mean_error)
        ends = np.cumsum([site.heads for site in curves.values()])[:-1]
        parts = zip(curves, np.split(given.error, ends), np.split(given.index, ends), strict=True)
        return Plan({site: planned(target, index) for site, target, index in parts}, given.price)

    def refine(self, evaluator: Evaluator, plan: SitePlan) -> Found:
        """Look the chosen points up once more."""
        measured = measure(look_ups(evaluator), plan.start, self.high, plan.level)
        feasible = measured.error <= plan.target
        return Found(plan.start, plan.level, measured.error, measured.density, feasible)

    def validate(
        self, evaluator: Evaluator, u: Floats, level: Ints, cap: Floats | float
    ) -> Validated:
        """Back off where an unseen input exceeds the cap."""
        return back_off(evaluator, u, cap, self.high, level)


def planned(target: Floats, index: Ints) -> SitePlan:
    """The plan of a site whose heads were given these columns; −1 is dense."""
    dense = index < 0
    u = np.where(dense, U_MAX, GRID[index % len(GRID)])
    return SitePlan(target, u, np.where(dense, 0, index // len(GRID)))
