"""Can lambda do better than tau alone? A few steps of Bayesian optimisation over (u, level).

First the secant in u with lambda off, to a coarse tolerance: a point that is known to be feasible.
Then posteriors of log error and density, given the probe layers' heads (prior.py), choose each
head's next point: largest log expected improvement of density + log probability that the error
meets its target (Ament et al. 2023). The best point measured wins, so no step can do harm.
"""

from dataclasses import dataclass, field
from typing import Self

import numpy as np

from afbs_compile.tuner.acquisition import log_cei
from afbs_compile.tuner.arrays import Bools, Floats, Ints
from afbs_compile.tuner.curves import GRID
from afbs_compile.tuner.incumbent import Evaluate, Incumbent
from afbs_compile.tuner.objective import Measured
from afbs_compile.tuner.prior import Prior
from afbs_compile.tuner.rootfind import solve
from afbs_compile.tuner.strategy import Found

COARSE = 0.1  # in u: the steps that follow look more closely
SECANT_CALLS, STEPS = 5, 4  # nine calls at most
LEAST_GAIN = 1e-3  # of density: below it no evaluation is worth its cost


@dataclass(slots=True, eq=False)
class Search:
    """One site's search; every evaluation so far is kept."""

    evaluate: Evaluate
    target: Floats
    prior: Prior
    best: Incumbent
    u: list[Floats] = field(default_factory=list)
    level: list[Ints] = field(default_factory=list)
    error: list[Floats] = field(default_factory=list)
    density: list[Floats] = field(default_factory=list)

    @classmethod
    def new(cls, evaluate: Evaluate, target: Floats, prior: Prior) -> Self:
        """Nothing is measured yet."""
        return cls(evaluate, target, prior, Incumbent.none(target))

    def run(self, start: Floats) -> Found:
        """The best point of each head; heads whose target is 0 are to be dense."""
        off = np.zeros(len(self.target), dtype=np.int64)
        solve(
            lambda u: self.measure(u, off),
            self.target, start=start, tolerance=COARSE, max_calls=SECANT_CALLS,
        )  # fmt: skip
        for _ in range(STEPS):
            score = self.score()
            worth = (score.max(1) > np.log(LEAST_GAIN)) & (self.target > 0.0)
            if not worth.any():
                break
            self.step(score.argmax(1), worth)
        return self.best.found

    def step(self, chosen: Ints, worth: Bools) -> None:
        """Measure the chosen points; heads with nothing to gain stay where they are."""
        found, points = self.best.found, len(GRID)
        u = np.where(worth, GRID[chosen % points], found.u)
        self.measure(u, np.where(worth, chosen // points, found.level))

    def measure(self, u: Floats, level: Ints) -> Measured:
        """Evaluate, and learn."""
        measured = self.evaluate(u, level)
        self.u.append(u)
        self.level.append(level)
        self.error.append(measured.error)
        self.density.append(measured.density)
        self.best.see(u, level, measured)
        return measured

    def score(self) -> Floats:
        """Log constrained expected improvement of every point [H, levels·U]."""
        u, level = np.stack(self.u, axis=1), np.stack(self.level, axis=1)
        floor = self.prior.floor
        known = np.log(np.stack(self.error, axis=1) + floor)
        log_error = self.prior.log_error.posterior(u, level, known)
        mean, var = self.prior.density.posterior(u, level, np.stack(self.density, axis=1))
        best = -self.best.found.density[:, None]
        return log_cei(-mean, var, best, *log_error, np.log(self.target + floor)[:, None])
