"""How good is a choice of heads beside those of rankings, in every task? One number.

A mean of costs lets a search buy one task with another. So a task's cost is taken in units of the
least that any ranking's own choice costs there, and the power mean over the tasks minds the worst
one most. A choice that is below 1 in all tasks betters every ranking in every task.
"""

import numpy as np

from afbs_compile.tuner.arrays import Floats

POWER = 4.0
FLOOR = 1e-4  # of what all heads together cost: less is noise, and must not buy a loss elsewhere


def geometric(costs: Floats) -> Floats:
    """The geometric mean over tasks of costs [T, …], `FLOOR` included."""
    return np.asarray(np.exp(np.log(np.maximum(costs, 0.0) + FLOOR).mean(0)), dtype=np.float64)


def relative(costs: Floats, references: Floats) -> Floats:
    """The power mean over tasks of costs [T, …] in units of references [T]."""
    units = np.maximum(references, 0.0) + FLOOR
    ratios = ((np.maximum(costs, 0.0) + FLOOR).T / units).T
    return np.asarray(np.mean(ratios**POWER, 0) ** (1 / POWER), dtype=np.float64)
