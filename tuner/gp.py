"""What do a few evaluations say about the rest of a function? Gaussian-process regression.

Rasmussen & Williams 2006 (R&W), Alg. 2.1; rows appended to the factor as in a bordered Cholesky.
"""

from typing import Self

import numpy as np
from scipy.linalg import cho_solve, solve_triangular

from afbs_compile.tuner.arrays import Floats
from afbs_compile.tuner.cholesky import jittered_cholesky
from afbs_compile.tuner.evidence import (
    NOISE_BOUNDS,
    Hyper,
    Noise,
    Prior,
    checked_noise,
    default_theta,
    fit_theta,
    hyper_of,
    log_evidence,
    pairwise_squares,
)
from afbs_compile.tuner.matern import matern52, squared_distance

VARIANCE_FLOOR = 1e-14  # of the amplitude: rounding must not make a variance negative


def check_data(x: Floats, y: Floats) -> None:
    """Refuse x [..., n, d], y [..., n] that do not match, are empty or are not finite.

    Raises:
        ValueError: says which.
    """
    if x.shape[:-1] != y.shape or y.shape[-1] == 0:
        raise ValueError(f"x is {x.shape}, y is {y.shape}: need x [..., n, d], y [..., n], n ≥ 1")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("x and y must be finite: drop the evaluations that failed first")


class GP:
    """A Gaussian process of one output, Matérn-5/2 ARD, constant mean.

    y is standardised inside: amplitude and noise count in units of the variance of y.

    Attributes:
        x: points [n, d].
        y: values, standardised [n].
        hyper: hyperparameters, given or fitted.
        chol: lower factor of the Gram matrix + (noise + jitter)·I [n, n].
        weights: inverse of that matrix times y [n].
        jitter: what had to be added to factor it.
    """

    x: Floats
    y: Floats
    hyper: Hyper
    chol: Floats
    weights: Floats
    jitter: float

    def __init__(self, noise: Noise = NOISE_BOUNDS, prior: Prior | None = Prior()) -> None:  # noqa: B008
        """Noise: bounds of the noise variance, or its fixed value; prior: of the lengthscales."""
        self.noise = checked_noise(noise)
        self.prior = prior

    def fit(self, x: Floats, y: Floats, hyper: Hyper | None = None) -> Self:
        """Condition on y [n] at x [n, d]; hyperparameters are fitted (MAP) unless given.

        Raises:
            ValueError: shapes that do not match, or values that are not finite.
        """
        x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
        check_data(x, y)
        self.x, self.shift = x, float(y.mean())
        spread = float(y.std())
        self.scale = spread if spread > 0.0 else 1.0
        self.y = (y - self.shift) / self.scale
        if hyper is None:
            start = default_theta(x.shape[1], self.noise)
            theta = fit_theta(x[None], self.y[None], self.noise, self.prior, start)
            hyper = hyper_of(theta, self.noise)
        self.hyper = hyper
        self._factor()
        return self

    def log_marginal_likelihood(self, theta: Floats) -> tuple[float, Floats]:
        """Log likelihood of the data under theta (see evidence.py), no prior; and gradient."""
        return log_evidence(theta, pairwise_squares(self.x[None]), self.y[None], self.noise)

    def append(self, x: Floats, y: float) -> None:
        """Add y at x [d] in O(n²); hyperparameters, shift and scale stay as fitted.

        A point so close to another that the new pivot vanishes costs a whole factor, O(n³).

        Raises:
            ValueError: values that are not finite.
        """
        row = np.asarray(x, dtype=np.float64).reshape(1, -1)
        check_data(row, np.asarray([y], dtype=np.float64))
        cross = self._covariance(self.x, row)[:, 0]
        half = solve_triangular(self.chol, cross, lower=True, check_finite=False)
        own = self.hyper.amplitude + self.hyper.noise + self.jitter
        pivot = own - float(half @ half)
        self.x = np.vstack([self.x, row])
        self.y = np.append(self.y, (y - self.shift) / self.scale)
        if pivot <= 1e-12 * own:
            self._factor()
            return
        n = len(half)
        chol = np.zeros((n + 1, n + 1))
        chol[:n, :n], chol[n, :n], chol[n, n] = self.chol, half, np.sqrt(pivot)
        self.chol = chol
        self.weights = cho_solve((chol, True), self.y, check_finite=False)

    def predict(self, at: Floats) -> tuple[Floats, Floats]:
        """Mean [m] and variance [m] of the function, noise not included, at `at` [m, d]."""
        cross = self._covariance(self.x, np.asarray(at, dtype=np.float64))  # [n, m]
        mean = cross.T @ self.weights  # R&W Alg. 2.1, line 4
        half = solve_triangular(self.chol, cross, lower=True, check_finite=False)  # line 5
        amplitude = self.hyper.amplitude
        var = np.maximum(amplitude - np.square(half).sum(0), VARIANCE_FLOOR * amplitude)  # line 6
        return self.shift + self.scale * mean, self.scale**2 * var

    def _covariance(self, x: Floats, y: Floats) -> Floats:
        return matern52(squared_distance(x, y, self.hyper.lengthscale), self.hyper.amplitude)

    def _factor(self) -> None:
        gram = self._covariance(self.x, self.x) + self.hyper.noise * np.eye(len(self.y))
        self.chol, self.jitter = jittered_cholesky(gram)  # R&W Alg. 2.1, line 2
        self.weights = cho_solve((self.chol, True), self.y, check_finite=False)  # line 3
