"""How does AFBS-BO tune? Bayesian optimisation at low fidelity, root finding at high fidelity.

explore: Gaussian processes of log(error + floor) and density over u, hyperparameters shared by
the heads of a site (the floor keeps an error of 0 from spoiling them). Each head's next u
maximises the log of the constrained expected improvement (Ament et al. 2023) of
−(density + price·error) subject to error ≤ margin·max_error.
allocate: one price over the posterior curves of all sites, half taken back towards one tau for
all (blend.py), gives each head its target.
refine: safeguarded secant at high fidelity, started where the curve meets the target; with a prior
from probe layers, lambda is searched on top (improve.py).
validate: back-off on unseen inputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from afbs_compile.tuner.acquisition import log_cei
from afbs_compile.tuner.allocate import Allocation, allocate
from afbs_compile.tuner.arrays import Floats, Ints
from afbs_compile.tuner.backoff import back_off
from afbs_compile.tuner.batched_gp import BatchedGP
from afbs_compile.tuner.blend import Mix
from afbs_compile.tuner.curves import GRID, Curves, non_decreasing, stacked, weights
from afbs_compile.tuner.improve import Search
from afbs_compile.tuner.objective import (
    U_MAX,
    Evaluator,
    Fidelity,
    Measured,
    lambdas_of,
    measure,
    weights_of,
)
from afbs_compile.tuner.prior import Prior
from afbs_compile.tuner.rootfind import solve
from afbs_compile.tuner.strategy import Found, Goal, Plan, SitePlan, Validated

DESIGN = (0.4, 1.2, 2.4)  # u of the first calls
JITTER = 0.1  # of the design, by the seed
MAX_CALLS = 8  # of a site's evaluator in explore
LEAST_GAIN = 1e-3  # of density: below it no call is worth its cost
REFINE_CALLS = 12  # of a site: a head whose error runs in wide stairs must not keep the others
FLOOR = 0.02  # of max_error: smaller errors are nearly alike
LEAST_ERROR = 1e-3  # of the floor: a curve is never 0, a target of 0 stands for dense
FIRST_PRICE = 0.15  # divided by the budget; typical slopes of density and error (research)
LARGEST_PRICE = 1e3
ALIKE = 0.5  # share of one tau for all in what a head is given
AT = GRID[:, None] / U_MAX


@dataclass(frozen=True, slots=True)
class AfbsBo:
    """Strategy `afbs-bo`."""

    goal: Goal
    low: Fidelity
    high: Fidelity
    prior: Prior | None = None

    def explore(self, evaluator: Evaluator, earlier: Sequence[Curves] = ()) -> Curves:
        """Posterior curves of a site, from 3 to 8 calls at low fidelity."""
        seen = _Seen(self.goal, self._price(earlier))
        jitter = np.random.default_rng(self.goal.seed).uniform(-JITTER, JITTER, len(DESIGN))
        for u in DESIGN + jitter:
            point = np.full(evaluator.heads, u)
            seen.add(point, evaluator(point, self.low))
        for _ in range(MAX_CALLS - len(DESIGN)):
            score = seen.score()
            if np.all(score.max(1) < np.log(LEAST_GAIN)):
                break
            point = GRID[score.argmax(1)]
            seen.add(point, evaluator(point, self.low))
        return replace(seen.curves(), weight=weights_of(evaluator))

    def allocate(
        self, curves: Mapping[str, Curves], price: float | None = None, alike: float = ALIKE
    ) -> Plan:
        """Targets of one price for all heads of all sites, each ≤ margin·max_error.

        Where the cap alone can bind, it is everybody's target, whatever the curves say.
        """
        sites = list(curves.values())
        error, _ = stacked(sites)
        if price is None and self.goal.budget == self.goal.cap:
            given = self._allocation(sites)
            index, price = given.index, given.price
            target = np.full(len(error), self.goal.cap)
        else:
            mix = Mix(*stacked(sites), weights(sites), self.goal.cap, alike)
            price = mix.least_price(self.goal.budget) if price is None else price
            index = mix.at(price)
            found = np.take_along_axis(error, np.maximum(index, 0)[:, None], 1)[:, 0]
            target = np.where(index < 0, 0.0, found)
        start = np.where(index < 0, U_MAX, GRID[index])
        ends = np.cumsum([site.heads for site in sites])[:-1]
        parts = zip(curves, np.split(target, ends), np.split(start, ends), strict=True)
        plans = {site: SitePlan(t, u, np.zeros(len(u), dtype=np.int64)) for site, t, u in parts}
        return Plan(plans, price)

    def refine(self, evaluator: Evaluator, plan: SitePlan) -> Found:
        """Secant from the curve's u; a head to be dense starts, and ends, at U_MAX.

        With a prior and an evaluator of several levels, (u, level) may then improve on it.
        """
        if self.prior is None or len(lambdas_of(evaluator)) == 1:
            return Found.of(
                solve(
                    lambda u: evaluator(u, self.high),
                    plan.target,
                    start=plan.start,
                    max_calls=REFINE_CALLS,
                )
            )
        self.prior.expect(lambdas_of(evaluator))
        search = Search.new(
            lambda u, level: measure(evaluator, u, self.high, level), plan.target, self.prior
        )
        return search.run(plan.start)

    def validate(
        self, evaluator: Evaluator, u: Floats, level: Ints, cap: Floats | float
    ) -> Validated:
        """Back off where an unseen input exceeds the cap."""
        return back_off(evaluator, u, cap, self.high, level)

    def _allocation(self, curves: Sequence[Curves]) -> Allocation:
        error, density = stacked(curves)
        return allocate(error, density, self.goal.cap, self.goal.mean_error)

    def _price(self, earlier: Sequence[Curves] = ()) -> float:
        """What the earlier sites' budget makes of the price; without any, a typical one."""
        if self.goal.mean_error is None:
            return 0.0
        if not earlier:
            return FIRST_PRICE / self.goal.budget
        return min(self._allocation(earlier).price, LARGEST_PRICE)


@dataclass(slots=True, eq=False)
class _Seen:
    """Evaluations of one site so far, and what Gaussian processes make of them."""

    goal: Goal
    price: float
    u: list[Floats] = field(default_factory=list)
    error: list[Floats] = field(default_factory=list)
    density: list[Floats] = field(default_factory=list)

    def add(self, u: Floats, measured: Measured) -> None:
        """Learn what was measured at u [H]."""
        self.u.append(u)
        self.error.append(measured.error)
        self.density.append(measured.density)

    @property
    def floor(self) -> float:
        return FLOOR * self.goal.max_error

    def fit(self) -> tuple[Floats, Floats, Floats, Floats]:
        """Mean and variance of log(error + floor), then of density, on the grid [H, U]."""
        x = np.stack(self.u, axis=1)[..., None] / U_MAX
        log_error = np.log(np.stack(self.error, axis=1) + self.floor)
        density = np.stack(self.density, axis=1)
        return (
            *BatchedGP().fit(x, log_error).predict(AT),
            *BatchedGP().fit(x, density).predict(AT),
        )

    def score(self) -> Floats:
        """Log constrained expected improvement on the grid [H, U]."""
        log_error, log_error_var, density, density_var = self.fit()
        error = np.exp(log_error)  # and its variance to first order
        mean = -(density + self.price * (error - self.floor))
        var = density_var + self.price**2 * error**2 * log_error_var
        errors, densities = np.stack(self.error, axis=1), np.stack(self.density, axis=1)
        values = np.where(errors <= self.goal.cap, -(densities + self.price * errors), -np.inf)
        best = values.max(1, keepdims=True)
        limit = np.log(self.goal.cap + self.floor)
        return log_cei(mean, var, best, log_error, log_error_var, limit)

    def curves(self) -> Curves:
        """Posterior means, made monotone."""
        log_error, log_error_var, density, density_var = self.fit()
        error = np.exp(-non_decreasing(-log_error)) - self.floor
        return Curves(
            u=GRID,
            error=np.maximum(error, LEAST_ERROR * self.floor),
            density=np.clip(non_decreasing(density), 0.0, 1.0),
            log_error_std=np.sqrt(log_error_var),
            density_std=np.sqrt(density_var),
        )
