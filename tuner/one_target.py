"""What do simple strategies have in common? One target for every head, no exploring."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from afbs_compile.tuner.arrays import Floats, Ints
from afbs_compile.tuner.backoff import back_off
from afbs_compile.tuner.curves import Curves
from afbs_compile.tuner.objective import Evaluator, Fidelity
from afbs_compile.tuner.strategy import Goal, Plan, SitePlan, Validated


@dataclass(frozen=True, slots=True)
class OneTarget:
    """A strategy but for its `refine`, where all of its search is."""

    goal: Goal
    low: Fidelity
    high: Fidelity

    def explore(self, evaluator: Evaluator, earlier: Sequence[Curves] = ()) -> Curves:
        """Nothing is measured."""
        return Curves.unknown(evaluator.heads)

    def allocate(self, curves: Mapping[str, Curves]) -> Plan:
        """The same target for every head: the mean error, or what the cap allows."""
        target = self.goal.budget
        plans = {
            site: SitePlan.at_zero(np.full(known.heads, target)) for site, known in curves.items()
        }
        return Plan(plans)

    def validate(
        self, evaluator: Evaluator, u: Floats, level: Ints, cap: Floats | float
    ) -> Validated:
        """Back off where an unseen input exceeds the cap."""
        return back_off(evaluator, u, cap, self.high, level)
