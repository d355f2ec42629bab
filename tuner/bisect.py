"""How good is no search at all? Strategy `bisect`: one target for every head, plain bisection."""

from dataclasses import dataclass

from afbs_compile.tuner.objective import Evaluator
from afbs_compile.tuner.one_target import OneTarget
from afbs_compile.tuner.rootfind import solve
from afbs_compile.tuner.strategy import Found, SitePlan


@dataclass(frozen=True, slots=True)
class Bisect(OneTarget):
    """The anchor of every comparison: about eight evaluations a head, lambda off."""

    def refine(self, evaluator: Evaluator, plan: SitePlan) -> Found:
        """Lock-step bisection; the start is not used."""
        return Found.of(solve(lambda u: evaluator(u, self.high), plan.target, method="bisect"))
