"""Which u does each head get at a price? Between equal marginal error and one tau for all.

Equal marginal error (`tuner.allocate`) minimises the sum of the heads' relative errors, but moves
heads far from each other; one tau for all trusts the selector's own estimate of the mass that is
lost. At equal density the mean of the two u does less damage (KL) than either. A head that then
exceeds the cap goes to the first u that keeps it.
"""

from dataclasses import dataclass

import numpy as np

from afbs_compile.tuner.allocate import allocate_at_price
from afbs_compile.tuner.arrays import Bools, Floats, Ints

LOG_PRICES = (-6.0, 12.0)
STEPS = 50  # of bisection


@dataclass(frozen=True, slots=True, eq=False)
class Mix:
    """Curves of N heads over a grid of u, and how they are shared out.

    Attributes:
        error: error [N, U], non-increasing.
        density: density [N, U], non-decreasing.
        weight: what a unit of error counts [N].
        cap: largest error of a head.
        alike: weight of the one u for all, in [0, 1].
    """

    error: Floats
    density: Floats
    weight: Floats
    cap: float
    alike: float

    @property
    def hopeless(self) -> Bools:
        """Heads that no grid point brings below the cap: they are dense [N]."""
        return np.asarray(~(self.error <= self.cap).any(1))

    def at(self, price: float) -> Ints:
        """Grid point of each head at a price of weighted error [N]; −1 where it is dense."""
        weight, hopeless = self.weight, self.hopeless
        given = allocate_at_price(
            weight[:, None] * self.error, self.density, weight * self.cap, price
        )
        top = self.error.shape[1] - 1
        own = np.where(given.dense, top, given.index)
        mean = np.take_along_axis(self.density, own[:, None], 1)[~hopeless].mean()
        one = first_reaching(self.density[~hopeless], float(mean)) if not hopeless.all() else top
        mixed = np.rint((1.0 - self.alike) * own + self.alike * one).astype(np.int64)
        within = (self.error <= self.cap).argmax(1)
        return np.where(hopeless, -1, np.maximum(mixed, within))

    def mean_error(self, index: Ints) -> float:
        """Mean error over all heads; a dense one makes none."""
        found = np.take_along_axis(self.error, np.maximum(index, 0)[:, None], 1)[:, 0]
        return float(np.where(index < 0, 0.0, found).mean())

    def least_price(self, budget: float) -> float:
        """The least price at which the mean error is within the budget, else the largest one."""
        low, high = LOG_PRICES
        for _ in range(STEPS):
            middle = 0.5 * (low + high)
            holds = self.mean_error(self.at(10.0**middle)) <= budget
            low, high = (low, middle) if holds else (middle, high)
        return float(10.0**high)


def first_reaching(density: Floats, mean: float) -> int:
    """The first grid point at which the mean over the heads reaches `mean`, else the last."""
    reached = np.flatnonzero(density.mean(0) >= mean)
    return int(reached[0]) if len(reached) else density.shape[1] - 1
