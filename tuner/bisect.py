"""How good is no search at all? Strategy `bisect`: one target for every head, plain bisection."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from afbs_compile.tuner.arrays import Floats
from afbs_compile.tuner.backoff import back_off
from afbs_compile.tuner.curves import Curves
from afbs_compile.tuner.objective import Evaluator, Fidelity
from afbs_compile.tuner.rootfind import Root, solve
from afbs_compile.tuner.strategy import Goal, Plan, SitePlan, Validated


@dataclass(frozen=True, slots=True)
class Bisect:
    """The anchor of every comparison: about eight evaluations a head, all at high fidelity."""

    goal: Goal
    low: Fidelity
    high: Fidelity

    def explore(self, evaluator: Evaluator, earlier: Sequence[Curves] = ()) -> Curves:
        """Nothing is measured."""
        return Curves.unknown(evaluator.heads)

    def allocate(self, curves: Mapping[str, Curves]) -> Plan:
        """The same target for every head: the mean error, or what the cap allows."""
        return Plan(
            {
                site: SitePlan(np.full(known.heads, self.goal.budget), np.zeros(known.heads))
                for site, known in curves.items()
            }
        )

    def refine(self, evaluator: Evaluator, target: Floats, start: Floats) -> Root:
        """Lock-step bisection; the start is not used."""
        return solve(lambda u: evaluator(u, self.high), target, method="bisect")

    def validate(self, evaluator: Evaluator, u: Floats, cap: Floats | float) -> Validated:
        """Back off where an unseen input exceeds the cap."""
        return back_off(evaluator, u, cap, self.high)
