"""When was the search at its best? Early stopping, afterwards.

Whoever takes the least of many losses on a few documents takes what fits these documents, too, and
the more so the longer the search. So the choices that were the best one for a while meet again on
held-out documents, with those of the least loss and with what the rankings alone would choose. The
least geometric mean of both losses decides.
"""

from collections.abc import Sequence

import numpy as np

from afbs_compile.tuner.heads import Bits, bits, text
from afbs_compile.tuner.relative import FLOOR
from afbs_compile.tuner.tally import Objective, Tally

FINALISTS = 24


def decided(
    tally: Tally, validate: Objective, count: int, plain: Sequence[Bits] = ()
) -> tuple[Bits, float, int]:
    """The best of a search's choices on what it searched and on held-out inputs.

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
    finalists = finals(tally, count, {text(choice) for choice in plain})
    held = np.maximum(validate([bits(name) for name in finalists]), 0.0)
    both = np.log(held + FLOOR) + np.log(
        [max(tally.losses[name], 0.0) + FLOOR for name in finalists]
    )
    name = finalists[int(np.argmin(both))]
    return bits(name), tally.losses[name], len(finalists)


def finals(tally: Tally, count: int, plain: set[str]) -> list[str]:
    """Rankings' choices first, then the last incumbents, then what has the least loss."""
    ranked = sorted((name for name, _ in tally.finite()), key=tally.losses.__getitem__)
    first = [name for name in ranked if name in plain][: count - 1]
    last = [name for name, _ in tally.incumbents()][::-1][: (count - len(first) + 1) // 2]
    return list(dict.fromkeys([*first, *last, *ranked]))[:count]
