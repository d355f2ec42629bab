"""What does AFBS-BO find as it was published? Strategy `afbs-bo-paper` (arXiv 2603.18417).

Its recipe: Bayesian optimisation of each head on short sequences, binary search of the best
regions on long ones, then validation. What we know of the paper does not tell the variables'
mapping, kernel, acquisition, first points, numbers of evaluations, lengths, width of a region, or
what happens where a region holds no feasible point. Ours: a Gaussian process of a head's own over
(u, level), Matérn-5/2, log constrained expected improvement, 5 points of a Latin hypercube and 11
more at low fidelity; the two best levels, u within 0.4 of the process's answer, bisected at high
fidelity; a head that is feasible in neither is bisected with lambda off, on up to U_MAX.
"""

from dataclasses import dataclass, field

import numpy as np
from scipy.stats import qmc

from afbs_compile.tuner.acquisition import log_cei
from afbs_compile.tuner.arrays import Bools, Floats, Ints
from afbs_compile.tuner.curves import GRID
from afbs_compile.tuner.gp import GP
from afbs_compile.tuner.incumbent import Evaluate, Incumbent
from afbs_compile.tuner.objective import U_MAX, Evaluator, Measured, lambdas_of, measure
from afbs_compile.tuner.one_target import OneTarget
from afbs_compile.tuner.prior import FLOOR, points
from afbs_compile.tuner.rootfind import solve
from afbs_compile.tuner.strategy import Found, SitePlan

DESIGN, CALLS = 5, 16
LARGEST_U = 3.0  # of the design: beyond it a head is as good as dense
REGIONS = 2
HALF_WIDTH = 0.4  # of a region, in u


@dataclass(frozen=True, slots=True)
class AfbsBoPaper(OneTarget):
    """16 evaluations at low fidelity and about 10 at high fidelity; validation as the others."""

    def refine(self, evaluator: Evaluator, plan: SitePlan) -> Found:
        """Explore each head, then bisect its best regions."""
        levels, target = len(lambdas_of(evaluator)), plan.target
        cold = _Cold(target, levels, FLOOR * self.goal.max_error)
        for u, level in self._design(evaluator.heads, levels):
            cold.add(u, level, measure(evaluator, u, self.low, level))
        for _ in range(CALLS - DESIGN):
            u, level = cold.next()
            cold.add(u, level, measure(evaluator, u, self.low, level))
        best = Incumbent.none(target)

        def evaluate(u: Floats, level: Ints) -> Measured:
            measured = measure(evaluator, u, self.high, level)
            best.see(u, level, measured)
            return measured

        regions = cold.regions()
        for center, level in regions:
            low = np.clip(center - HALF_WIDTH, 0.0, U_MAX - 2 * HALF_WIDTH)
            bisect(evaluate, low, low + 2 * HALF_WIDTH, level, target)
        missing = ~best.found.feasible & (target > 0.0)
        if missing.any():
            further(evaluate, best.found, missing, regions[0][0], target)
        return best.found

    def _design(self, heads: int, levels: int) -> list[tuple[Floats, Ints]]:
        """A Latin hypercube over (u, level), the same for all heads."""
        sample = qmc.LatinHypercube(2, rng=np.random.default_rng(self.goal.seed)).random(DESIGN)
        return [
            (np.full(heads, LARGEST_U * u), np.full(heads, min(int(z * levels), levels - 1)))
            for u, z in sample
        ]


def further(
    evaluate: Evaluate, found: Found, missing: Bools, center: Floats, target: Floats
) -> None:
    """Bisect from a region to U_MAX, lambda off, where none was feasible; others stand still."""
    low = np.where(missing, np.clip(center - HALF_WIDTH, 0.0, U_MAX - 1.0), found.u)
    high = np.where(missing, U_MAX, found.u)
    bisect(evaluate, low, high, np.where(missing, 0, found.level), target)


def bisect(evaluate: Evaluate, low: Floats, high: Floats, level: Ints, target: Floats) -> None:
    """Measure where a bisection of each head's [low, high] leads; 1/32 of it is close enough."""
    solve(
        lambda share: evaluate(low + share * (high - low), level),
        target, lo=0.0, hi=1.0, tolerance=1.0 / 32.0, method="bisect",
    )  # fmt: skip


@dataclass(slots=True, eq=False)
class _Cold:
    """What each head's own Gaussian processes make of its evaluations at low fidelity."""

    target: Floats
    levels: int
    floor: float
    x: list[Floats] = field(default_factory=list)  # [H, 2] each
    error: list[Floats] = field(default_factory=list)
    density: list[Floats] = field(default_factory=list)

    def add(self, u: Floats, level: Ints, measured: Measured) -> None:
        self.x.append(np.stack([u / U_MAX, level / max(self.levels - 1, 1)], axis=-1))
        self.error.append(measured.error)
        self.density.append(measured.density)

    def posterior(self, head: int) -> tuple[Floats, Floats, Floats, Floats]:
        """Mean and variance of log(error + floor), then of density, at all points."""
        x = np.stack([row[head] for row in self.x])
        at = points(self.levels)
        log_error = np.log(np.array([row[head] for row in self.error]) + self.floor)
        density = np.array([row[head] for row in self.density])
        return *GP().fit(x, log_error).predict(at), *GP().fit(x, density).predict(at)

    def next(self) -> tuple[Floats, Ints]:
        """Each head's point of largest constrained expected improvement."""
        chosen = np.array([self.scored(head) for head in range(len(self.target))])
        return GRID[chosen % len(GRID)], chosen // len(GRID)

    def scored(self, head: int) -> int:
        log_error, error_var, density, density_var = self.posterior(head)
        errors, densities = (np.array([r[head] for r in v]) for v in (self.error, self.density))
        feasible = errors <= self.target[head]
        best = -densities[feasible].min() if feasible.any() else -np.inf
        limit = np.log(self.target[head] + self.floor)
        return int(np.argmax(log_cei(-density, density_var, best, log_error, error_var, limit)))

    def regions(self) -> list[tuple[Floats, Ints]]:
        """U [H] and level [H] of the best levels, by the posterior means; the best one first."""
        per_head = [self._best_levels(head) for head in range(len(self.target))]
        u, level = (np.array([[p[k] for p in head] for head in per_head]) for k in (0, 1))
        return [(u[:, r], level[:, r].astype(np.int64)) for r in range(u.shape[1])]

    def _best_levels(self, head: int) -> list[tuple[float, int]]:
        log_error, _, density, _ = self.posterior(head)
        feasible = log_error <= np.log(self.target[head] + self.floor)
        cost = np.where(feasible, density, 2.0 - density).reshape(self.levels, -1)
        order = np.argsort(cost.min(1), kind="stable")[:REGIONS]
        return [(float(GRID[cost[z].argmin()]), int(z)) for z in order]
