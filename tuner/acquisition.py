"""Where is the next evaluation worth most? Logarithms of (constrained) expected improvement.

Ament et al. 2023, "Unexpected Improvements to Expected Improvement" (LogEI). Plain expected
improvement underflows to 0 some forty standard deviations below the incumbent; its logarithm,
computed as here, stays finite and ordered for z = (mean − best)/std in [−1e6, 1e6] and is
accurate there to 1e-11·max(1, |log h(z)|).
"""

import numpy as np
from scipy.special import erfcx, log_ndtr, ndtr

from afbs_compile.tuner.arrays import Floats
from afbs_compile.tuner.evidence import LOG_2PI

FAR = -50.0  # left of it the series loses fewer digits than the subtraction


def log_h(z: Floats) -> Floats:
    """log(φ(z) + z·Φ(z)), any shape, φ and Φ the standard normal density and distribution."""
    z = np.asarray(z, dtype=np.float64)
    near, far = np.maximum(z, -1.0), np.minimum(z, FAR)
    middle = np.clip(z, FAR, -1.0)
    direct = np.log(np.exp(-0.5 * near**2 - 0.5 * LOG_2PI) + near * ndtr(near))
    # φ + zΦ = φ·(1 − |z|·Φ/φ), and Φ(z)/φ(z) = √(π/2)·erfcx(|z|/√2)
    ratio = np.sqrt(np.pi / 2.0) * erfcx(-middle / np.sqrt(2.0))
    tail = np.log1p(middle * ratio)
    # the same by the asymptotic series: (1 − 3/z² + 15/z⁴ − 105/z⁶ + 945/z⁸)/z²
    w = 1.0 / far**2
    series = np.log1p(w * (-3.0 + w * (15.0 + w * (-105.0 + w * 945.0)))) + np.log(w)
    below = -0.5 * z**2 - 0.5 * LOG_2PI + np.where(z < FAR, series, tail)
    return np.where(z > -1.0, direct, below)


def log_ei(mean: Floats, var: Floats, best: Floats | float) -> Floats:
    """Log expected improvement over `best` (to be maximised) of N(mean, var), broadcast.

    Raises:
        ValueError: a variance that is not positive.
    """
    if not np.all(np.asarray(var) > 0.0):
        raise ValueError("variances must be positive: give the posterior's, which has a floor")
    std = np.sqrt(var)
    return np.asarray(np.log(std) + log_h((mean - best) / std))


def log_cei(
    mean: Floats,
    var: Floats,
    best: Floats | float,
    constraint_mean: Floats,
    constraint_var: Floats,
    limit: Floats | float,
) -> Floats:
    """Log expected improvement among the feasible: log_ei + log P(constraint ≤ limit).

    Where best is −inf (nothing feasible yet) only the second term counts. Objective and
    constraint are taken as independent normals; all arguments are broadcast.

    Raises:
        ValueError: a variance that is not positive.
    """
    if not np.all(np.asarray(constraint_var) > 0.0):
        raise ValueError("variances must be positive: give the posterior's, which has a floor")
    log_feasible = log_ndtr((limit - constraint_mean) / np.sqrt(constraint_var))
    none = np.isneginf(best)
    improvement = log_ei(mean, var, np.where(none, 0.0, best))
    return np.asarray(log_feasible + np.where(none, 0.0, improvement))
