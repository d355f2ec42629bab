"""Which hyperparameters fit the data best? MAP of the log marginal likelihood, by L-BFGS-B.

Log marginal likelihood: Rasmussen & Williams 2006 (R&W), eq. 2.30; its gradient: eq. 5.9.
theta = log [lengthscale (d), amplitude, noise]; without its last entry if the noise is fixed.
Several data sets ("heads") may share theta: their log likelihoods add up.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from afbs_compile.tuner.arrays import Floats
from afbs_compile.tuner.cholesky import inverse_factor, jittered_cholesky
from afbs_compile.tuner.matern import matern52_with_slope

LENGTHSCALE_BOUNDS = (0.02, 20.0)
AMPLITUDE_BOUNDS = (0.01, 100.0)
NOISE_BOUNDS = (1e-6, 1e-1)
LOG_2PI = float(np.log(2.0 * np.pi))

Noise = float | tuple[float, float]
"""A fixed noise variance, or the bounds between which it is fitted (of standardised y)."""


@dataclass(frozen=True, slots=True, eq=False)
class Hyper:
    """Hyperparameters: lengthscale [d]; amplitude and noise are variances of standardised y."""

    lengthscale: Floats
    amplitude: float
    noise: float


@dataclass(frozen=True, slots=True)
class Prior:
    """Log-normal prior of each lengthscale: its median, and its standard deviation in log."""

    median: float = 0.5
    spread: float = 1.0

    def log_density(self, log_lengthscale: Floats) -> tuple[float, Floats]:
        """Log density over log ℓ [d], without its constant, and the gradient [d]."""
        z = (log_lengthscale - np.log(self.median)) / self.spread
        return -0.5 * float(z @ z), -z / self.spread


def checked_noise(noise: Noise) -> Noise:
    """`noise`, if it is one.

    Raises:
        ValueError: a negative variance, or bounds that are not 0 < low ≤ high.
    """
    if isinstance(noise, tuple):
        if not 0.0 < noise[0] <= noise[1] < np.inf:
            raise ValueError(f"bounds of the noise variance need 0 < low ≤ high, got {noise}")
    elif not 0.0 <= noise < np.inf:
        raise ValueError(f"a fixed noise variance is finite and ≥ 0, got {noise}")
    return noise


def hyper_of(theta: Floats, noise: Noise) -> Hyper:
    """The hyperparameters that theta stands for."""
    free = isinstance(noise, tuple)
    natural = np.exp(theta)
    return Hyper(
        lengthscale=natural[:-2] if free else natural[:-1],
        amplitude=float(natural[-2] if free else natural[-1]),
        noise=float(natural[-1]) if isinstance(noise, tuple) else noise,
    )


def log_evidence(theta: Floats, squares: Floats, y: Floats, noise: Noise) -> tuple[float, Floats]:
    """Log marginal likelihood summed over the heads, and its gradient [len(theta)].

    Args:
        theta: see above.
        squares: (x_i − x_j)² for each head and dimension, [H, d, n, n].
        y: standardised outputs [H, n].
        noise: fixed variance, or bounds if it is the last entry of theta.
    """
    hyper = hyper_of(theta, noise)
    scaled = squares / np.square(hyper.lengthscale)[:, None, None]
    squared = scaled.sum(1)
    gram, slope = matern52_with_slope(squared, hyper.amplitude)
    chol, _ = jittered_cholesky(gram + hyper.noise * np.eye(y.shape[1]))  # Alg. 2.1, line 2
    half = inverse_factor(chol)
    inverse = half.transpose(0, 2, 1) @ half
    weights = (inverse @ y[..., None])[..., 0]  # line 3
    diagonal = np.diagonal(chol, axis1=1, axis2=2)
    value = -0.5 * np.sum(y * weights) - np.sum(np.log(diagonal)) - 0.5 * y.size * LOG_2PI
    core = weights[:, :, None] * weights[:, None, :] - inverse  # ααᵀ − K⁻¹ of eq. 5.9
    gradient = [0.5 * np.einsum("hij,hkij->k", core * slope, scaled), [0.5 * np.sum(core * gram)]]
    if isinstance(noise, tuple):
        gradient.append([0.5 * hyper.noise * np.trace(core, axis1=1, axis2=2).sum()])
    return float(value), np.concatenate(gradient)


def pairwise_squares(x: Floats) -> Floats:
    """(x_i − x_j)² of x [H, n, d] for each head and dimension, [H, d, n, n]."""
    columns = x.transpose(0, 2, 1)
    return np.asarray(np.square(columns[..., :, None] - columns[..., None, :]))


def default_theta(dimensions: int, noise: Noise) -> Floats:
    """Where a fit starts: lengthscales 0.5, amplitude 1, noise 1e-4 (clipped to its bounds)."""
    start = [0.5] * dimensions + [1.0]
    if isinstance(noise, tuple):
        start.append(float(np.clip(1e-4, *noise)))
    return np.log(start)


def fit_theta(x: Floats, y: Floats, noise: Noise, prior: Prior | None, start: Floats) -> Floats:
    """Most probable theta a posteriori, climbing from `start`; x [H, n, d], y [H, n]."""
    bounds = [LENGTHSCALE_BOUNDS] * x.shape[2] + [AMPLITUDE_BOUNDS]
    if isinstance(noise, tuple):
        bounds.append(noise)
    log_bounds = np.log(bounds)
    loss = _loss(pairwise_squares(x), y, noise, prior)
    found = minimize(
        loss,
        np.clip(start, log_bounds[:, 0], log_bounds[:, 1]),
        jac=True,
        method="L-BFGS-B",
        bounds=log_bounds,
        options={"maxiter": 60},
    )
    return np.asarray(found.x, dtype=np.float64)


def _loss(
    squares: Floats, y: Floats, noise: Noise, prior: Prior | None
) -> Callable[[Floats], tuple[float, Floats]]:
    dimensions = squares.shape[1]

    def loss(theta: Floats) -> tuple[float, Floats]:
        value, gradient = log_evidence(theta, squares, y, noise)
        if prior is not None:
            density, slope = prior.log_density(theta[:dimensions])
            value += density
            gradient[:dimensions] += slope
        return -value, -gradient

    return loss
