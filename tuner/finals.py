"""Which of the best choices is best on inputs that the search did not see?

Whoever takes the least of many losses on a few documents takes what fits these documents, too. So
the best choices meet again on held-out documents, and the mean of both losses decides: a loss on
twice as many documents, paid for a few choices only. What the rankings alone would choose was not
fitted to the search's documents: it is compared with the search's best on the held-out ones alone.
"""

from collections.abc import Sequence

import numpy as np

from afbs_compile.tuner.heads import Bits, bits, text
from afbs_compile.tuner.tally import Objective, Tally

FINALISTS = 24


def decided(
    tally: Tally, validate: Objective, count: int, plain: Sequence[Bits] = ()
) -> tuple[Bits, float, int]:
    """The best of the `count` best choices on both objectives together.

    A choice with a finite loss must have been evaluated.

    Args:
        tally: What the search evaluated.
        validate: Losses on held-out inputs.
        count: Choices to validate, from 1.
        plain: Choices that no search made; they take part, and the best of them wins where it is
            better on the held-out inputs.

    Returns:
        The choice [N], its loss on the search's objective, and how many choices were validated.

    Raises:
        Stop: `validate` did.
    """
    unfitted = {text(choice) for choice in plain}
    meeting = sorted(
        (loss, name)
        for name, loss in tally.losses.items()
        if name.count("1") == tally.count and np.isfinite(loss)
    )
    fitted = [one for one in meeting if one[1] not in unfitted]
    others = [one for one in meeting if one[1] in unfitted][: count - bool(fitted)]
    finalists = [*fitted[: count - len(others)], *others]
    held = dict(zip(finalists, validate([bits(name) for _, name in finalists]), strict=True))
    best = [
        min(side, key=lambda one: one[0] + held[one])
        for side in (fitted[: count - len(others)], others)
        if side
    ]
    loss, name = min(best, key=held.__getitem__)
    return bits(name), loss, len(finalists)
