"""At which price do all heads together do no more damage than allowed? Root finding on whole runs.

Errors of single heads do not add up to the damage that they do end to end. So the price of
`tuner.allocate` is what is searched for: damage falls as the price of error rises, and log damage
is close to a straight line in log price.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from afbs_compile.tuner.arrays import Floats
from afbs_compile.tuner.objective import Measured
from afbs_compile.tuner.rootfind import solve

PRICES = (0.1, 1000.0)  # density that one unit of error is worth, at the ends of the search
START = 3.0  # about what a mean error of 0.05 costs (research)
TOLERANCE = 0.05  # of log10 price
MAX_CALLS = 9
WORST = 1e9  # damage that is not finite counts as this

Candidate = TypeVar("Candidate")


@dataclass(frozen=True, slots=True)
class Limit(Generic[Candidate]):
    """What a whole candidate must keep, measured end to end.

    Attributes:
        most: Largest damage, ≥ 0.
        damage: The damage ≥ 0 that a candidate does.
    """

    most: float
    damage: Callable[[Candidate], float]


def least_price(candidate: Callable[[float], Candidate], limit: Limit[Candidate]) -> float | None:
    """The least price whose candidate is within the limit, to within `TOLERANCE` of its log10.

    The damage of the candidate of a price that is returned was measured to be within the limit.

    Args:
        candidate: Makes the candidate of a price.
        limit: The limit.

    Returns:
        None if not even the highest price keeps the limit.
    """
    low, high = np.log10(PRICES)

    def evaluate(log_price: Floats) -> Measured:
        damage = limit.damage(candidate(10.0 ** float(log_price[0])))
        return Measured(np.array([min(damage, WORST)]), np.zeros(1))

    root = solve(
        evaluate, np.array([limit.most]), start=np.log10([START]), lo=low, hi=high,
        tolerance=TOLERANCE, max_calls=MAX_CALLS,
    )  # fmt: skip
    return 10.0 ** float(root.u[0]) if root.feasible[0] else None
