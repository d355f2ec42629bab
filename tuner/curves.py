"""How do a head's error and density run over u? Curves on one grid, made monotone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from afbs_compile.tuner.arrays import Floats
from afbs_compile.tuner.objective import U_MAX

GRID: Floats = np.linspace(0.0, U_MAX, 161)  # steps of 0.025


@dataclass(frozen=True, slots=True, eq=False)
class Curves:
    """What is believed of the H heads of a site on a grid of u [U].

    Attributes:
        u: the grid, ascending [U].
        error: relative L1 error, non-increasing in u [H, U].
        density: visited over visible blocks, non-decreasing in u [H, U].
        log_error_std: posterior standard deviation of log error (+ floor) [H, U].
        density_std: posterior standard deviation of density [H, U].
        weight: what a unit of a head's error counts in the sum over all heads [H]; None: 1.
    """

    u: Floats
    error: Floats
    density: Floats
    log_error_std: Floats
    density_std: Floats
    weight: Floats | None = None

    @property
    def heads(self) -> int:
        """Number of heads H."""
        return len(self.error)

    @classmethod
    def unknown(cls, heads: int) -> Self:
        """Nothing is known of these heads: a grid of no points."""
        none = np.empty((heads, 0))
        return cls(np.empty(0), none, none, none, none)


def non_decreasing(values: Floats) -> Floats:
    """The monotone fit of least maximum deviation along the last axis.

    Midway between the running maximum from the left and the running minimum from the right: the
    L∞ isotonic regression (Robertson, Wright & Dykstra 1988, Order Restricted Inference, §1.5).
    """
    from_left = np.maximum.accumulate(values, axis=-1)
    from_right = np.minimum.accumulate(values[..., ::-1], axis=-1)[..., ::-1]
    return 0.5 * (from_left + from_right)


def stacked(curves: Sequence[Curves]) -> tuple[Floats, Floats]:
    """Error and density of the heads of all sites, in their order, [heads in all, U] each."""
    return (
        np.concatenate([site.error for site in curves]),
        np.concatenate([site.density for site in curves]),
    )


def weights(curves: Sequence[Curves]) -> Floats:
    """What a unit of error counts, of the heads of all sites in their order [heads in all]."""
    return np.concatenate(
        [np.ones(site.heads) if site.weight is None else site.weight for site in curves]
    )
