"""How much error may each head make? As much as buys the most blocks: one price for all heads.

Minimise Σ density over the heads such that Σ error stays within a budget and every error below
its cap. Everett 1963, "Generalized Lagrange multiplier method": at a price p each head takes the
grid point of least density + p·error; the least p that meets the budget is found by bisection.
A head that no grid point suits is dense (error 0, density 1), a choice open to every head.

Points off the lower convex hull of a head's (error, density) are never chosen by a price, so the
choice is optimal among hull points, and within one head's step of the optimum over all points:
heads that hesitate between two points at the final price go back to the cheaper one, one by one,
as long as the budget holds.
"""

from dataclasses import dataclass

import numpy as np

from afbs_compile.tuner.arrays import Bools, Floats, Ints

PRICES = 2.0 ** np.arange(-20.0, 61.0, 4.0)  # of the first search, before bisection
STEPS = 60  # of bisection: the price is then known to rounding


@dataclass(frozen=True, slots=True, eq=False)
class Allocation:
    """What each of N heads was given.

    Attributes:
        index: chosen grid point [N]; −1 where the head is dense.
        error: error of the curve there, the head's target [N]; 0 where dense.
        density: density of the curve there [N]; 1 where dense.
        price: density that one unit of error is worth; inf if no error at all is allowed.
    """

    index: Ints
    error: Floats
    density: Floats
    price: float

    @property
    def dense(self) -> Bools:
        """Heads without a grid point [N]."""
        return self.index < 0


@dataclass(frozen=True, slots=True, eq=False)
class _Choices:
    """Grid points of every head, and the dense choice as the last column."""

    error: Floats
    density: Floats
    allowed: Bools

    def at(self, price: float) -> Ints:
        """Column of least density + price·error; of equal ones that of the largest u."""
        if np.isinf(price):
            cost = np.where(self.allowed & (self.error == 0.0), self.density, np.inf)
        else:
            cost = np.where(self.allowed, self.density + price * self.error, np.inf)
        return np.asarray(cost.shape[1] - 1 - np.argmin(cost[:, ::-1], axis=1))

    def of(self, column: Ints) -> tuple[Floats, Floats]:
        """Error and density of each head at its column."""
        rows = np.arange(len(column))
        return self.error[rows, column], self.density[rows, column]

    def allocation(self, column: Ints, price: float) -> Allocation:
        dense = column == self.error.shape[1] - 1
        return Allocation(np.where(dense, -1, column), *self.of(column), price)


def allocate_at_price(
    error: Floats, density: Floats, cap: Floats | float, price: float
) -> Allocation:
    """Least density + price·error of each head, error ≤ cap (the dual problem).

    Args:
        error: error [N, U] on a grid of u.
        density: density [N, U].
        cap: largest error of a head, [N] or one for all.
        price: density that one unit of error is worth, ≥ 0.

    Raises:
        ValueError: shapes that differ, values that are not finite, a negative price.
    """
    if not price >= 0.0:
        raise ValueError(f"a price is ≥ 0, got {price}")
    choices = _choices(error, density, cap)
    return choices.allocation(choices.at(price), price)


def allocate(
    error: Floats, density: Floats, cap: Floats | float, mean_error: float | None
) -> Allocation:
    """Least mean density with mean error ≤ mean_error (None: any) and error ≤ cap.

    Args:
        error: error [N, U] on a grid of u.
        density: density [N, U].
        cap: largest error of a head, [N] or one for all.
        mean_error: budget of the mean over the N heads; never exceeded.

    Raises:
        ValueError: shapes that differ, values that are not finite, a negative budget.
    """
    choices = _choices(error, density, cap)
    budget = np.inf if mean_error is None else float(mean_error)
    if not budget >= 0.0:
        raise ValueError(f"mean_error must be ≥ 0 or None, got {mean_error}")

    def holds(column: Ints) -> bool:
        return bool(choices.of(column)[0].mean() <= budget)

    if holds(choices.at(0.0)):
        return choices.allocation(choices.at(0.0), 0.0)
    ladder = [0.0, *PRICES.tolist(), np.inf]
    first = next(k for k, price in enumerate(ladder) if holds(choices.at(price)))
    low, high = ladder[first - 1], ladder[first]
    for _ in range(STEPS if np.isfinite(high) else 0):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if holds(choices.at(middle)) else (middle, high)
    column = _fill(choices, choices.at(high), choices.at(low), budget)
    return choices.allocation(column, high)


def _choices(error: Floats, density: Floats, cap: Floats | float) -> _Choices:
    error, density = np.asarray(error, dtype=np.float64), np.asarray(density, dtype=np.float64)
    if error.ndim != 2 or error.shape != density.shape:
        raise ValueError(f"error is {error.shape}, density {density.shape}: need [heads, grid]")
    if not (np.isfinite(error).all() and np.isfinite(density).all()):
        raise ValueError("curves must be finite: a head that was not measured has no curve")
    heads = len(error)
    column = np.broadcast_to(np.asarray(cap, dtype=np.float64), heads)[:, None]
    return _Choices(
        np.hstack([error, np.zeros((heads, 1))]),
        np.hstack([density, np.ones((heads, 1))]),
        np.hstack([error <= column, np.ones((heads, 1), dtype=bool)]),
    )


def _fill(choices: _Choices, column: Ints, cheaper: Ints, budget: float) -> Ints:
    """`column`, its heads moved to `cheaper`, largest gain first, as long as the budget holds.

    The two columns differ in the heads that are indifferent at the final price.
    """
    error, density = choices.of(column)
    more_error, less_density = choices.of(cheaper)
    gain = density - less_density
    column = column.copy()
    for head in np.argsort(-gain, kind="stable")[: np.count_nonzero(gain > 0.0)]:
        trial = error.copy()
        trial[head] = more_error[head]
        if trial.mean() <= budget:
            column[head], error = cheaper[head], trial
    return column
