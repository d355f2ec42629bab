"""How is a nearly singular Gram matrix factored? With the least jitter that makes it succeed."""

import numpy as np
from scipy.linalg import lapack

from afbs_compile.tuner.arrays import Floats

JITTERS = (0.0, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4)  # of the mean diagonal


def jittered_cholesky(gram: Floats) -> tuple[Floats, float]:
    """Lower factors of gram + jitter·I for symmetric gram [..., n, n], and the jitter added.

    A stack gets one jitter: the least of the ladder with which every matrix can be factored.

    Raises:
        ValueError: entries that are not finite.
        numpy.linalg.LinAlgError: not positive definite even with 1e-4 of the mean diagonal.
    """
    if not np.isfinite(gram).all():
        raise ValueError("the Gram matrix is not finite: check the points and hyperparameters")
    scale = float(np.mean(np.diagonal(gram, axis1=-2, axis2=-1)))
    identity = np.eye(gram.shape[-1])
    for jitter in JITTERS:
        try:
            chol = np.linalg.cholesky(gram + jitter * scale * identity)
        except np.linalg.LinAlgError:
            continue
        return np.asarray(chol, dtype=np.float64), jitter * scale
    raise np.linalg.LinAlgError(
        f"Gram matrix {gram.shape} is not positive definite, even with a jitter of "
        f"{JITTERS[-1] * scale:.3g}: check the hyperparameters"
    )


def inverse_factor(chol: Floats) -> Floats:
    """Inverses of lower triangular matrices [H, n, n]; NumPy would treat them as full ones."""
    return np.stack([lapack.dtrtri(factor, lower=1)[0] for factor in chol])
