"""What does SpargeAttn's tuner find? Strategy `sparge`: bisect tau, then bisect lambda.

Re-made from a description of its autotuning (arXiv 2502.18137): tau is bisected in [0, 1], first
guess 0.1, until the bracket is at most 0.001 wide, for an error below l1; then lambda at that tau
for an error below pv_l1, with l1/pv_l1 = 0.07/0.08; a head that keeps more than nine tenths is
dense. All heads go in lock-step here, and of tau and lambda those are kept that passed. Its
thirty-two values of theta are one: with the sink forced theta has no effect.
"""

from dataclasses import dataclass

import numpy as np

from afbs_compile.tuner.arrays import Bools, Floats, Ints
from afbs_compile.tuner.incumbent import Evaluate
from afbs_compile.tuner.objective import Evaluator, Measured, lambdas_of, measure, u_of_tau
from afbs_compile.tuner.one_target import OneTarget
from afbs_compile.tuner.strategy import Found, SitePlan

SHARE = 0.07 / 0.08  # of the error that tau may spend; lambda has the rest
FIRST = 0.1
NARROW = 1e-3
LEAST_SPARSITY = 0.1


@dataclass(frozen=True, slots=True)
class Sparge(OneTarget):
    """About ten evaluations a head for tau and three for lambda."""

    def refine(self, evaluator: Evaluator, plan: SitePlan) -> Found:
        """Tau with lambda off, then lambda."""

        def evaluate(u: Floats, level: Ints) -> Measured:
            return measure(evaluator, u, self.high, level)

        by_tau = bisect_tau(evaluate, SHARE * plan.target)
        found = bisect_lambda(evaluate, by_tau, plan.target, len(lambdas_of(evaluator)))
        worth = found.density <= 1.0 - LEAST_SPARSITY
        return found._replace(feasible=found.feasible & worth)


def bisect_tau(evaluate: Evaluate, target: Floats) -> Found:
    """The least tau whose error is below the target, lambda off."""
    heads = len(target)
    low, high, tau = np.zeros(heads), np.ones(heads), np.full(heads, FIRST)
    level = np.zeros(heads, dtype=np.int64)
    kept = Measured(np.zeros(heads), np.ones(heads))
    passed = np.zeros(heads, dtype=bool)
    while np.any(high - low > NARROW):
        measured = evaluate(u_of_tau(tau), level)
        passes = measured.error < target
        kept = taken(passes, measured, kept)
        passed = passed | passes
        low, high = np.where(passes, low, tau), np.where(passes, tau, high)
        tau = 0.5 * (low + high)
    return Found(u_of_tau(high), level, kept.error, kept.density, passed)


def bisect_lambda(evaluate: Evaluate, found: Found, target: Floats, levels: int) -> Found:
    """The strictest of the levels whose error is below the target, at the tau that was found."""
    low = found.level
    high = np.where(found.feasible, levels, 1)
    kept = Measured(found.error, found.density)
    while np.any(high - low > 1):
        level = (low + high) // 2  # low itself where a head is done
        measured = evaluate(found.u, level)
        passes = (measured.error < target) & (level > low)
        kept = taken(passes, measured, kept)
        low, high = np.where(passes, level, low), np.where(passes | (level == low), high, level)
    return found._replace(level=low, error=kept.error, density=kept.density)


def taken(where: Bools, new: Measured, old: Measured) -> Measured:
    """`new` in some heads, `old` in the others."""
    return Measured(
        np.where(where, new.error, old.error), np.where(where, new.density, old.density)
    )
