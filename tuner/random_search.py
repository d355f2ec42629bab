"""What does chance find? Strategy `random`: points drawn evenly over u and the levels."""

from dataclasses import dataclass

import numpy as np

from afbs_compile.tuner.incumbent import best_of
from afbs_compile.tuner.objective import Evaluator, lambdas_of, measure
from afbs_compile.tuner.one_target import OneTarget
from afbs_compile.tuner.strategy import Found, SitePlan

DRAWS = 40
LARGEST_U = 3.0  # tau = 0.999: beyond it a head is as good as dense


@dataclass(frozen=True, slots=True)
class RandomSearch(OneTarget):
    """Forty evaluations a head, each head its own."""

    def refine(self, evaluator: Evaluator, plan: SitePlan) -> Found:
        """Measure points drawn by the seed; a head without a feasible one is not feasible."""
        random = np.random.default_rng(self.goal.seed)
        shape = (DRAWS, evaluator.heads)
        u = random.uniform(0.0, LARGEST_U, shape)
        level = random.integers(len(lambdas_of(evaluator)), size=shape)
        points = zip(u, level, strict=True)
        return best_of(lambda u, z: measure(evaluator, u, self.high, z), points, plan.target)
