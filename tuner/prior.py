"""What do probe layers say about the heads of other layers? A Gaussian process over (u, level).

The dense tables of n probe heads give a mean and n ways of deviating from it (their empirical
covariance, as in functional principal components: Ramsay & Silverman 2005, ch. 8), and an offset
of its own is allowed to every head. What probe heads cannot explain of each other, each left out
once, is a Matérn-5/2 process of shared hyperparameters. A head that resembles some probe heads is
known after a few evaluations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from afbs_compile.tuner.arrays import Floats, Ints
from afbs_compile.tuner.cholesky import inverse_factor, jittered_cholesky
from afbs_compile.tuner.curves import GRID
from afbs_compile.tuner.evidence import (
    NOISE_BOUNDS,
    Hyper,
    default_theta,
    fit_theta,
    hyper_of,
)
from afbs_compile.tuner.evidence import Prior as Lengths
from afbs_compile.tuner.landscape import Landscape
from afbs_compile.tuner.matern import matern52, squared_distance
from afbs_compile.tuner.objective import U_MAX

FLOOR = 0.02  # of max_error: smaller errors are nearly alike
SAMPLE = slice(4, 110, 14)  # of the grid of u: where the unexplained part is learnt
RIDGE = 1e-2  # of the mean square of the deviations
LEAST_VARIANCE = 1e-10
LEAST_HEADS = 3  # one left out, two to explain it


def points(levels: int) -> Floats:
    """All of (u, level), each scaled to [0, 1], level by level [levels·U, 2]."""
    depth = np.arange(levels) / max(levels - 1, 1)
    return np.stack([np.tile(GRID / U_MAX, levels), np.repeat(depth, len(GRID))], axis=1)


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """How one quantity runs over (u, level) in heads of this kind; G points in all.

    Attributes:
        mean: of the probe heads [G].
        factors: their deviations and an offset [K, G]; the covariance is factorsᵀ·factors …
        hyper: … and a Matérn of these hyperparameters,
        scale: in units of this squared.
        levels: number of levels.
    """

    mean: Floats
    factors: Floats
    hyper: Hyper
    scale: float
    levels: int

    @classmethod
    def of(cls, values: Floats) -> Self:
        """Learn from probe heads [n, Z, U]."""
        n, levels = values.shape[:2]
        rows = values.reshape(n, -1)
        deviations = rows - rows.mean(0)
        offset = np.full((1, rows.shape[1]), deviations.mean(1).std())
        at = (np.arange(levels)[:, None] * len(GRID) + np.arange(len(GRID))[SAMPLE]).ravel()
        residual = left_out(rows[:, at])
        scale = max(float(residual.std()), 1e-9)
        x = np.broadcast_to(points(levels)[at], (n, len(at), 2))
        start = default_theta(2, NOISE_BOUNDS)
        theta = fit_theta(x, residual / scale, NOISE_BOUNDS, Lengths(), start)
        factors = np.vstack([deviations / np.sqrt(n - 1), offset])
        return cls(rows.mean(0), factors, hyper_of(theta, NOISE_BOUNDS), scale, levels)

    def posterior(self, u: Floats, level: Ints, y: Floats) -> tuple[Floats, Floats]:
        """Mean and variance [H, G] after y [H, n] at u and level [H, n].

        Where the evaluations of all heads deviate more than they should, variances grow by the
        ratio: a layer that is unlike the probes must not be believed known.
        """
        x = np.stack([u / U_MAX, level / max(self.levels - 1, 1)], axis=-1)
        mean, factors = self._at(self.mean, u, level), self._at(self.factors, u, level)
        factors = np.moveaxis(factors, 0, -1)  # [H, n, K]
        gram = factors @ factors.transpose(0, 2, 1) + self._unexplained(x, x)
        gram += self.scale**2 * self.hyper.noise * np.eye(y.shape[1])
        chol, _ = jittered_cholesky(gram)
        half = inverse_factor(chol)
        white = (half @ (y - mean)[..., None])[..., 0]
        cross = (factors @ self.factors).transpose(0, 2, 1)
        cross = cross + self._unexplained(points(self.levels), x)  # [H, G, n]
        shares = cross @ half.transpose(0, 2, 1)
        own = np.square(self.factors).sum(0) + self.scale**2 * self.hyper.amplitude
        var = np.maximum(own - np.square(shares).sum(-1), LEAST_VARIANCE)
        surprise = max(1.0, float(np.square(white).mean()))
        return self.mean + (shares @ white[..., None])[..., 0], surprise * var

    def _unexplained(self, x: Floats, y: Floats) -> Floats:
        squared = squared_distance(x, y, self.hyper.lengthscale)
        return self.scale**2 * matern52(squared, self.hyper.amplitude)

    def _at(self, table: Floats, u: Floats, level: Ints) -> Floats:
        """Values of a table [..., G] at u and level, between the points of the grid."""
        place = u / U_MAX * (len(GRID) - 1)
        left = np.clip(np.floor(place).astype(np.int64), 0, len(GRID) - 2)
        share = place - left
        first = level * len(GRID) + left
        return np.asarray(table[..., first] * (1.0 - share) + table[..., first + 1] * share)


def left_out(rows: Floats) -> Floats:
    """What is left of each head [n, m] when all others have explained what they can."""
    residual = np.empty_like(rows)
    for head, row in enumerate(rows):
        others = np.delete(rows, head, axis=0)
        deviations = others - others.mean(0)
        ridge = RIDGE * np.square(deviations).mean() * deviations.shape[1] / len(others) + 1e-12
        rest = row - others.mean(0)
        gram = deviations @ deviations.T + ridge * np.eye(len(others))
        residual[head] = rest - np.linalg.solve(gram, deviations @ rest) @ deviations
    return residual


@dataclass(frozen=True, slots=True, eq=False)
class Prior:
    """What probe heads look like.

    Attributes:
        lambdas: of the levels, log2 units.
        floor: added to errors before the logarithm.
        log_error: of log(error + floor).
        density: of density.
    """

    lambdas: tuple[float, ...]
    floor: float
    log_error: Family
    density: Family

    @classmethod
    def of(cls, probes: Sequence[Landscape], max_error: float) -> Self:
        """Learn from probe layers, for goals of about this error.

        Raises:
            ValueError: no probes, other levels in each, fewer than three heads in all, or an error
                that is not positive.
        """
        if not probes or len({probe.lambdas for probe in probes}) != 1:
            raise ValueError("a prior needs one or more probe layers with the same levels")
        error = np.concatenate([probe.error for probe in probes])
        if len(error) < LEAST_HEADS:
            raise ValueError(f"a prior needs {LEAST_HEADS} heads or more, got {len(error)}")
        if not max_error > 0.0:
            raise ValueError(f"max_error must be positive, got {max_error}")
        floor = FLOOR * max_error
        density = np.concatenate([probe.density for probe in probes])
        families = Family.of(np.log(error + floor)), Family.of(density)
        return cls(probes[0].lambdas, floor, *families)

    def expect(self, lambdas: tuple[float, ...]) -> None:
        """Refuse an evaluator of other levels.

        Raises:
            ValueError: its levels are not the prior's.
        """
        if lambdas != self.lambdas:
            raise ValueError(f"the prior is of levels {self.lambdas}, the evaluator of {lambdas}")
