"""Which of the best choices is best on inputs that the search did not see?

Whoever takes the least of many losses on a few documents takes what fits these documents, too. So
the best choices meet again on held-out documents, and the mean of both losses decides: a loss on
twice as many documents, paid for a few choices only.
"""

import numpy as np

from afbs_compile.tuner.heads import Bits, bits
from afbs_compile.tuner.tally import Objective, Tally

FINALISTS = 24


def decided(tally: Tally, validate: Objective, count: int) -> tuple[Bits, float, int]:
    """The best of the `count` best choices on both objectives together.

    A choice with a finite loss must have been evaluated. The first one wins among equals.

    Returns:
        The choice [N], its loss on the search's objective, and how many choices were validated.

    Raises:
        Stop: `validate` did.
    """
    meeting = [
        (loss, name)
        for name, loss in tally.losses.items()
        if name.count("1") == tally.count and np.isfinite(loss)
    ]
    finalists = sorted(meeting, key=lambda known: known[0])[:count]
    held = validate([bits(name) for _, name in finalists])
    both = [loss + other for (loss, _), other in zip(finalists, held, strict=True)]
    loss, name = finalists[int(np.argmin(both))]
    return bits(name), loss, len(finalists)
