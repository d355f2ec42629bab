"""How dense will a sample be? A prior by length, times what was seen of its source.

The ratio of seen to expected density of a source is an exponential mean over samples, as in
SparseBalance (arXiv 2604.13847). What is seen waits in `pending`, which adds up over ranks, and
counts from the next `commit` on. So all ranks can commit the same sum at the same moment, between
epochs, and draw the same batches from it however far their loaders read ahead.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from afbs_compile.tuner.arrays import Floats, Ints

GAIN = 0.1  # of one sample in the mean of its source


@dataclass(slots=True)
class DensityEstimates:
    """Running estimates for N samples of S sources.

    Attributes:
        prior: Expected density of every sample in (0, 1], before any was seen [N].
        source: Source of every sample, 0 … S − 1 [N]; by default each is its own.
        gain: Weight of one sample in the mean of its source, in (0, 1].
        factor: Seen over expected density of a source [S].
        pending: Sum of ratios and count of samples of a source since the last commit [S, 2].
    """

    prior: Floats
    source: Ints | None = None
    gain: float = GAIN
    factor: Floats = field(init=False)
    pending: Floats = field(init=False)

    def __post_init__(self) -> None:
        """Check, and begin with nothing seen.

        Raises:
            ValueError: A density is out of range, or sources and densities do not match.
        """
        self.prior = np.asarray(self.prior, dtype=np.float64)
        if not ((self.prior > 0.0) & (self.prior <= 1.0)).all():
            raise ValueError("expected densities need to lie in (0, 1]")
        if self.source is None:
            self.source = np.arange(len(self.prior))
        self.source = np.asarray(self.source, dtype=np.int64)
        if self.source.shape != self.prior.shape or (self.source < 0).any():
            raise ValueError(
                f"sources have shape {self.source.shape}, samples {self.prior.shape}: give one "
                "number ≥ 0 for every sample"
            )
        if not 0.0 < self.gain <= 1.0:
            raise ValueError(f"gain is {self.gain}, need a number in (0, 1]")
        sources = int(self.source.max(initial=-1)) + 1
        self.factor, self.pending = np.ones(sources), np.zeros((sources, 2))

    def __call__(self) -> Floats:
        """Density of every sample as it is known now [N]."""
        return self.with_factor(self.factor)

    def with_factor(self, factor: ArrayLike) -> Floats:
        """Density of every sample with the factors [S] of another moment [N]."""
        assert self.source is not None  # set by __post_init__
        density = self.prior * np.asarray(factor, float)[self.source]
        return np.asarray(np.clip(density, 1e-6, 1.0))

    def observe(self, samples: Sequence[int], density: ArrayLike) -> None:
        """Note the density of some samples; what is no number in (0, 1] is left out."""
        assert self.source is not None
        where = np.asarray(samples, dtype=np.int64)
        seen = np.broadcast_to(np.asarray(density, dtype=np.float64), where.shape)
        good = np.isfinite(seen) & (seen > 0.0) & (seen <= 1.0)
        where, seen = where[good], seen[good]
        ratio = seen / self.prior[where]
        np.add.at(self.pending, self.source[where], np.stack([ratio, np.ones_like(ratio)], -1))

    def commit(self, pending: ArrayLike | None = None) -> None:
        """Let count what was seen: here, or `pending` [S, 2], the sum over all ranks.

        Raises:
            ValueError: `pending` has another shape.
        """
        total = self.pending if pending is None else np.asarray(pending, dtype=np.float64)
        if total.shape != self.pending.shape:
            raise ValueError(f"pending has shape {total.shape}, need {self.pending.shape}")
        ratios, count = total.T
        seen = count > 0
        keep = (1.0 - self.gain) ** count[seen]
        mean = ratios[seen] / count[seen]
        self.factor[seen] = keep * self.factor[seen] + (1.0 - keep) * mean
        self.pending = np.zeros_like(self.pending)

    def state_dict(self) -> dict[str, Any]:
        """What was seen, as lists."""
        return {"factor": self.factor.tolist(), "pending": self.pending.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state over.

        Raises:
            ValueError: It is of other sources.
        """
        factor, pending = (np.asarray(state[n], dtype=np.float64) for n in ("factor", "pending"))
        if factor.shape != self.factor.shape or pending.shape != self.pending.shape:
            raise ValueError(
                f"the state knows {len(factor)} sources, there are {len(self.factor)}: "
                "the data set is another"
            )
        self.factor, self.pending = factor, pending
