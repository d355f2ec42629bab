"""Do thresholds hold on inputs that the search did not see? Measure, back off, or go dense."""

import numpy as np

from afbs_compile.tuner.arrays import Floats, Ints
from afbs_compile.tuner.objective import U_MAX, Evaluator, Fidelity, measure
from afbs_compile.tuner.strategy import Validated

STEP = 0.1  # in u: the mass left out shrinks by a fifth
ROUNDS = 4


def back_off(
    evaluator: Evaluator,
    u: Floats,
    cap: Floats | float,
    fidelity: Fidelity,
    level: Ints | None = None,
) -> Validated:
    """Raise u [H] of the heads whose error exceeds cap [H] by 0.1, at most four times.

    Levels [H] stay as they are. Heads that still exceed the cap are to be dense. At most five
    calls; one if all is well.
    """
    u = np.array(u, dtype=np.float64)
    measured = measure(evaluator, u, fidelity, level)
    for _ in range(ROUNDS):
        over = measured.error > cap
        if not over.any():
            break
        u = np.where(over, np.minimum(u + STEP, U_MAX), u)
        measured = measure(evaluator, u, fidelity, level)
    return Validated(u, measured, measured.error > cap)
