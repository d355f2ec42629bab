"""What do a few evaluations of many heads say about each? One posterior a head, shared theta.

Rasmussen & Williams 2006 (R&W), Alg. 2.1 on a stack of Gram matrices; sharing (the sum of the
heads' log likelihoods is maximised) makes three points a head enough to learn a lengthscale.
"""

from typing import Self

import numpy as np

from afbs_compile.tuner.arrays import Floats
from afbs_compile.tuner.cholesky import inverse_factor, jittered_cholesky
from afbs_compile.tuner.evidence import (
    NOISE_BOUNDS,
    Hyper,
    Noise,
    Prior,
    checked_noise,
    default_theta,
    fit_theta,
    hyper_of,
)
from afbs_compile.tuner.gp import VARIANCE_FLOOR, check_data
from afbs_compile.tuner.matern import matern52, squared_distance


class BatchedGP:
    """Gaussian processes of H heads with the same hyperparameters and each its own data.

    Each head is shifted by its own mean and all are scaled by one standard deviation, that of
    the shifted values of all heads: noise is the same for every head in the units of y.
    """

    def __init__(self, noise: Noise = NOISE_BOUNDS, prior: Prior | None = Prior()) -> None:  # noqa: B008
        """Noise: bounds of the noise variance, or its fixed value; prior: of the lengthscales."""
        self.noise = checked_noise(noise)
        self.prior = prior

    def fit(self, x: Floats, y: Floats, hyper: Hyper | None = None) -> Self:
        """Condition on y [H, n] at x [H, n, d]; hyperparameters are fitted (MAP) unless given.

        Raises:
            ValueError: shapes that do not match, or values that are not finite.
        """
        x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
        check_data(x, y)
        self.x, self.shift = x, y.mean(1, keepdims=True)
        spread = float((y - self.shift).std())
        self.scale = spread if spread > 0.0 else 1.0
        self.y = (y - self.shift) / self.scale
        if hyper is None:
            start = default_theta(x.shape[2], self.noise)
            theta = fit_theta(x, self.y, self.noise, self.prior, start)
            hyper = hyper_of(theta, self.noise)
        self.hyper = hyper
        gram = self._covariance(x, x) + hyper.noise * np.eye(y.shape[1])
        chol, _ = jittered_cholesky(gram)  # R&W Alg. 2.1, line 2
        self.half = inverse_factor(chol)  # NumPy solves no triangular stacks
        self.weights = self.half.transpose(0, 2, 1) @ (self.half @ self.y[..., None])  # line 3
        return self

    def predict(self, at: Floats) -> tuple[Floats, Floats]:
        """Mean and variance [H, m], noise not included, at `at` [m, d] or one a head [H, m, d]."""
        cross = self._covariance(np.asarray(at, dtype=np.float64), self.x)  # [H, m, n]
        mean = (cross @ self.weights)[..., 0]  # R&W Alg. 2.1, line 4
        half = cross @ self.half.transpose(0, 2, 1)  # line 5
        amplitude = self.hyper.amplitude
        explained = np.einsum("hmn,hmn->hm", half, half)
        var = np.maximum(amplitude - explained, VARIANCE_FLOOR * amplitude)  # line 6
        return self.shift + self.scale * mean, self.scale**2 * var

    def _covariance(self, x: Floats, y: Floats) -> Floats:
        return matern52(squared_distance(x, y, self.hyper.lengthscale), self.hyper.amplitude)
