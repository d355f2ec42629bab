"""Where is the next evaluation worth most? Logarithms of (constrained) expected improvement.

Ament et al. 2023, "Unexpected Improvements to Expected Improvement" (LogEI). Plain expected
improvement underflows to 0 some forty standard deviations below the incumbent; its logarithm,
computed as here, is finite for z = (mean − best)/std from −1e100 to 1e100 and accurate there
to 1e-13·max(1, |log h(z)|), a few times the rounding of the result.
"""

import numpy as np
from scipy.special import erfcx, log_ndtr, ndtr

from afbs_compile.tuner.arrays import Floats
from afbs_compile.tuner.evidence import LOG_2PI

FAR = -1e5  # left of it 1/z² alone is as exact as the subtraction, and never 0


def log_h(z: Floats) -> Floats:
    """log(φ(z) + z·Φ(z)), any shape, φ and Φ the standard normal density and distribution."""
    z = np.asarray(z, dtype=np.float64)
    near, far = np.maximum(z, -1.0), np.minimum(z, FAR)
    middle = np.clip(z, FAR, -1.0)
    direct = np.log(np.exp(-0.5 * near**2 - 0.5 * LOG_2PI) + near * ndtr(near))
    # φ + zΦ = φ·(1 − |z|·Φ/φ), and Φ(z)/φ(z) = √(π/2)·erfcx(|z|/√2)
    ratio = np.sqrt(np.pi / 2.0) * erfcx(-middle / np.sqrt(2.0))
    tail = np.log1p(middle * ratio)
    tail = np.where(z < FAR, -2.0 * np.log(-far), tail)  # 1 − |z|·Φ/φ = 1/z² − 3/z⁴ + …
    below = -0.5 * z**2 - 0.5 * LOG_2PI + tail
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
