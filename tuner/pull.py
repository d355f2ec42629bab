"""A loss on a few documents, pulled towards what curvature foresees.

The least of many losses on a few documents is low by luck, too. The quadratic form of the loss
knows less of a choice, but it is estimated once and not chosen among. A search goes by the
geometric mean of both; what is reported are the losses themselves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from afbs_compile.tuner.arrays import Bools, Floats
from afbs_compile.tuner.heads import Bits, text
from afbs_compile.tuner.relative import FLOOR
from afbs_compile.tuner.tally import Objective

PULL = 0.5  # the form's weight

Foreseen = Callable[[Bools], Floats]
"""What choices [n, N] are expected to cost [n] in the objective's units, above 0."""


@dataclass(slots=True)
class Pulled:
    """An objective that is pulled.

    Attributes:
        objective: Losses, 0 for the dense model.
        foreseen: What they are expected to be.
        measured: The losses themselves, by bit string.
    """

    objective: Objective
    foreseen: Foreseen
    measured: dict[str, float] = field(default_factory=dict)

    def __call__(self, batch: Sequence[Bits]) -> list[float]:
        """What a search goes by."""
        losses = np.asarray(self.objective(batch), dtype=np.float64)
        self.measured |= {text(bits): float(x) for bits, x in zip(batch, losses, strict=True)}
        logs = np.log(np.maximum(losses, 0.0) + FLOOR)
        expected = np.log(self.foreseen(np.array(batch)))
        found = np.exp((1 - PULL) * logs + PULL * expected) - FLOOR
        return [float(x) for x in np.where(np.isfinite(losses), found, np.inf)]
