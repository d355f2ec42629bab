"""How far may the budget of a layer move? No further than the score coverage that is guaranteed.

A budget is the share of visible blocks that a layer keeps. Coverage c(k) is the share of the
pooled attention mass that the k best blocks hold: 0 at k = 0, 1 at k = 1, concave. A budget may
shrink to the least k with c(k) ≥ (1 − loss)·c(base) and grow to (1 + growth)·base (SparseBalance,
arXiv 2604.13847, with loss 0.1 recommended; the growth is ours).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from afbs_compile.tuner.arrays import Floats

LOSS = 0.1  # of the coverage of the base budget
GROWTH = 1.0  # as a share of the base budget
FLOOR = 0.5  # a budget is never cut to less than this share of its base


@dataclass(frozen=True, slots=True, eq=False)
class Bounds:
    """Budgets of L layers [L], each a share of the visible blocks in (0, 1].

    Attributes:
        low: Least.
        base: Where nothing is to be balanced.
        high: Largest.
    """

    low: Floats
    base: Floats
    high: Floats

    def __post_init__(self) -> None:
        shapes = {np.shape(x) for x in (self.low, self.base, self.high)}
        if len(shapes) > 1 or len(next(iter(shapes))) != 1:
            raise ValueError(f"bounds have shapes {sorted(shapes)}: need [layers], all the same")
        ordered = (self.low <= self.base) & (self.base <= self.high)
        if not (ordered & (self.low > 0.0) & (self.high <= 1.0)).all():
            raise ValueError(
                "bounds need 0 < low ≤ base ≤ high ≤ 1 in every layer; got "
                f"{self.low.tolist()}, {self.base.tolist()}, {self.high.tolist()}"
            )

    def at(self, pressure: ArrayLike) -> Floats:
        """Budgets [N, L] at pressures [N] in [−1, 1]: −1 is `low`, 0 is `base`, 1 is `high`.

        Every layer gives and takes in proportion to its slack, the least sensitive one the most.
        """
        p = np.asarray(pressure, dtype=np.float64)[..., None]
        up, down = self.high - self.base, self.base - self.low
        return np.asarray(self.base + np.maximum(p, 0.0) * up + np.minimum(p, 0.0) * down)


def around(base: ArrayLike, shrink: float = 0.75, grow: float = 1.5) -> Bounds:
    """Bounds as multiples of the base budgets [L]."""
    if not 0.0 < shrink <= 1.0 <= grow:
        raise ValueError(f"shrink is {shrink}, grow {grow}: need 0 < shrink ≤ 1 ≤ grow")
    b = np.asarray(base, dtype=np.float64)
    return Bounds(shrink * b, b, np.minimum(grow * b, 1.0))


def from_coverage(
    shares: ArrayLike,
    coverage: ArrayLike,
    base: ArrayLike,
    loss: float = LOSS,
    growth: float = GROWTH,
) -> Bounds:
    """Bounds from measured coverage.

    Args:
        shares: Ascending shares of kept blocks in (0, 1] [K].
        coverage: Mean coverage of every layer at them, ascending in [0, 1] [L, K].
        base: Base budgets [L].
        loss: How much of the base's coverage may be lost, in [0, 1).
        growth: How much more than the base may be kept.

    Raises:
        ValueError: Shapes that do not match, or coverage that falls.
    """
    grid, table = np.asarray(shares, float), np.asarray(coverage, float)
    b = np.asarray(base, dtype=np.float64)
    if table.shape != (len(b), len(grid)) or (np.diff(grid) <= 0.0).any():
        raise ValueError(
            f"coverage is {table.shape}, need {(len(b), len(grid))}, shares ascending"
        )
    if (np.diff(table, axis=1) < -1e-9).any() or not np.isfinite(table).all():
        raise ValueError("coverage must rise with the share of blocks")
    if not (0.0 <= loss < 1.0 and growth >= 0.0):
        raise ValueError(f"loss is {loss}, growth {growth}: need loss in [0, 1), growth ≥ 0")
    points = np.concatenate([[0.0], grid])
    low = np.empty_like(b)
    for layer, row in enumerate(np.hstack([np.zeros((len(b), 1)), table])):
        wanted = (1.0 - loss) * np.interp(b[layer], points, row)
        low[layer] = np.interp(wanted, *rising(row, points))
    low = np.minimum(np.maximum(low, FLOOR * b), b)
    return Bounds(low, b, np.maximum(np.minimum((1.0 + growth) * b, 1.0), b))


def rising(values: Floats, at: Floats) -> tuple[Floats, Floats]:
    """The points where a curve has risen, the first of equal values: the curve read backwards."""
    first = np.concatenate([[True], np.diff(values) > 0.0])
    return values[first], at[first]


def from_policy(
    tau: ArrayLike, density: ArrayLike, loss: float = LOSS, growth: float = GROWTH
) -> Bounds:
    """Bounds from what a tuned policy guarantees: mass tau [L] at a measured density [L].

    Between 0, (density, tau) and 1 the coverage is drawn as straight lines, which lie below every
    concave curve through these points. The base is the density.
    """
    d, t = np.asarray(density, dtype=np.float64), np.asarray(tau, dtype=np.float64)
    if not ((d > 0.0) & (d <= 1.0) & (t > 0.0) & (t <= 1.0)).all():
        raise ValueError("tau and density need to lie in (0, 1]")
    grid = np.unique(np.concatenate([d, [1.0]]))
    rows = [np.interp(grid, [0.0, *_knee(x, y)[0]], [0.0, *_knee(x, y)[1]])
            for x, y in zip(d, t, strict=True)]  # fmt: skip
    return from_coverage(grid, np.stack(rows), d, loss, growth)


def _knee(density: float, tau: float) -> tuple[list[float], list[float]]:
    """The points after the origin of a dense or a sparse layer's coverage."""
    return ([1.0], [1.0]) if density >= 1.0 else ([density, 1.0], [tau, 1.0])
