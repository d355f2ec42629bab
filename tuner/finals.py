"""When was the search at its best, on inputs that it did not see? Early stopping, afterwards.

Whoever takes the least of many losses on a few documents takes what fits these documents, too, and
the more so the longer the search. So the choices that were the best one for a while meet again on
held-out documents, with what the rankings alone would choose, and the least loss on these decides.
"""

from collections.abc import Sequence

import numpy as np

from afbs_compile.tuner.heads import Bits, bits, text
from afbs_compile.tuner.tally import Objective, Tally

FINALISTS = 24


def decided(
    tally: Tally, validate: Objective, count: int, plain: Sequence[Bits] = ()
) -> tuple[Bits, float, int]:
    """The best of a search's incumbents on held-out inputs.

    A choice with a finite loss must have been evaluated.

    Args:
        tally: What the search evaluated.
        validate: Losses on held-out inputs.
        count: Choices to validate, from 1.
        plain: Choices that no search made, which take part.

    Returns:
        The choice [N], its loss on the search's objective, and how many choices were validated.

    Raises:
        Stop: `validate` did.
    """
    unfitted = {text(choice) for choice in plain}
    others = [(name, loss) for name, loss in tally.finite() if name in unfitted]
    others = sorted(others, key=lambda one: one[1])[: count - 1]
    fitted = [one for one in tally.incumbents() if one not in others]
    finalists = [*fitted[len(others) - count :], *others]
    held = validate([bits(name) for name, _ in finalists])
    name, loss = finalists[int(np.argmin(held))]
    return bits(name), loss, len(finalists)
