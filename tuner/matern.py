"""How alike are two points? Matérn-5/2 with one lengthscale a dimension (R&W 2006, eq. 4.17).

R&W 2006: Rasmussen & Williams, Gaussian Processes for Machine Learning.
"""

import numpy as np

from afbs_compile.tuner.arrays import Floats

SQRT5 = float(np.sqrt(5.0))


def squared_distance(x: Floats, y: Floats, lengthscale: Floats) -> Floats:
    """Squared distances [..., n, m] of x [..., n, d] and y [..., m, d] in lengthscales [d].

    Differences are taken first: |x|² + |y|² − 2xy would cancel for close points.
    """
    a, b = x / lengthscale, y / lengthscale
    total = np.square(a[..., :, None, 0] - b[..., None, :, 0])
    for k in range(1, x.shape[-1]):
        total += np.square(a[..., :, None, k] - b[..., None, :, k])
    return np.asarray(total, dtype=np.float64)


def matern52(squared: Floats, amplitude: float) -> Floats:
    """Covariance amplitude·(1 + √5 r + 5/3 r²)·exp(−√5 r) at squared distances r², any shape."""
    return matern52_with_slope(squared, amplitude)[0]


def matern52_with_slope(squared: Floats, amplitude: float) -> tuple[Floats, Floats]:
    """Covariance k, and the slope s = −2 ∂k/∂r²: ∂k/∂log ℓ_j = s·(x_j − y_j)²/ℓ_j²."""
    r = SQRT5 * np.sqrt(squared)
    decay = amplitude * np.exp(-r)
    slope = 5.0 / 3.0 * (1.0 + r) * decay
    return (1.0 + r + 5.0 / 3.0 * squared) * decay, slope
