"""How good is a choice of heads beside those of rankings, in every task? One number.

A mean of costs lets a search buy one task with another. So a task's cost is taken in units of the
least that any ranking's own choice costs there, and what exceeds it counts several times. Where
nothing does, the geometric mean decides.
"""

import numpy as np

from afbs_compile.tuner.arrays import Floats

SEVERITY = 8.0  # what exceeds a ranking counts so much more
MARGIN = 0.03  # of a ranking's cost: as far as documents that are not searched may differ
FLOOR = 1e-4  # of what all heads together cost: less is noise, and must not buy a loss elsewhere


def geometric(costs: Floats) -> Floats:
    """The geometric mean over tasks of costs [T, …], `FLOOR` included."""
    return np.asarray(np.exp(np.log(np.maximum(costs, 0.0) + FLOOR).mean(0)), dtype=np.float64)


def relative(costs: Floats, references: Floats) -> Floats:
    """One loss of costs [T, …] in units of references [T]."""
    units = np.log(np.maximum(references, 0.0) + FLOOR)
    logs = (np.log(np.maximum(costs, 0.0) + FLOOR).T - units).T
    excess = np.maximum(logs + MARGIN, 0.0)
    return np.asarray(np.exp((logs + SEVERITY * excess).mean(0)), dtype=np.float64)
