"""What is a strategy? Four phases, so that a caller can hold one site's tensors at a time."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

import numpy as np

from afbs_compile.tuner.arrays import Bools, Floats, Ints
from afbs_compile.tuner.curves import Curves
from afbs_compile.tuner.objective import Evaluator, Fidelity, Measured
from afbs_compile.tuner.rootfind import Root

MARGINS = {1: 0.75, 2: 0.85}  # of max_error, by calibration inputs
MARGIN = 0.9  # with more of them


def margin_of(inputs: int) -> float:
    """Share of max_error that a search on so many inputs may use.

    About one head in twenty is then above max_error on an unseen input of the same kind: measured,
    `docs/benchmarks.md`, "How sure is the bound?".
    """
    return MARGINS.get(inputs, MARGIN)


@dataclass(frozen=True, slots=True)
class Goal:
    """What a policy must hold.

    Attributes:
        max_error: largest relative L1 error of a head, ≥ 0; 0 makes everything dense.
        mean_error: largest mean of the errors over all heads of all sites; None: any.
        margin: share of max_error that the search itself allows; the rest is for unseen inputs.
        seed: of everything random.

    Raises:
        ValueError: a value out of range.
    """

    max_error: float
    mean_error: float | None = None
    margin: float = MARGIN
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.max_error < math.inf:
            raise ValueError(f"max_error must be finite and ≥ 0, got {self.max_error}")
        if self.mean_error is not None and not self.mean_error >= 0.0:
            raise ValueError(f"mean_error must be ≥ 0 or None, got {self.mean_error}")
        if not 0.0 < self.margin <= 1.0:
            raise ValueError(f"margin must lie in (0, 1], got {self.margin}")

    @property
    def cap(self) -> float:
        """Largest error of a head that the search allows."""
        return self.margin * self.max_error

    @property
    def budget(self) -> float:
        """Largest mean error that can matter: no head goes beyond the cap."""
        return self.cap if self.mean_error is None else min(self.cap, self.mean_error)


@dataclass(frozen=True, slots=True, eq=False)
class SitePlan:
    """What the heads of a site should reach.

    Attributes:
        target: error [H]; 0: dense.
        start: u where the search begins [H].
        level: level of lambda where it begins [H].
    """

    target: Floats
    start: Floats
    level: Ints

    @classmethod
    def at_zero(cls, target: Floats) -> Self:
        """A plan that knows no better place to begin than u = 0, lambda off."""
        return cls(target, np.zeros(len(target)), np.zeros(len(target), dtype=np.int64))


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What all sites should reach; price is the density that one unit of error is worth."""

    sites: Mapping[str, SitePlan]
    price: float | None = None


class Found(NamedTuple):
    """Thresholds u and level [H], what was measured there, and whether it meets the target [H]."""

    u: Floats
    level: Ints
    error: Floats
    density: Floats
    feasible: Bools

    @classmethod
    def of(cls, root: Root, level: Ints | None = None) -> Self:
        """A root, found at `level` (None: 0)."""
        level = np.zeros(len(root.u), dtype=np.int64) if level is None else level
        return cls(root.u, level, root.error, root.density, root.feasible)


class Validated(NamedTuple):
    """Thresholds [H] after validation, what was measured there, and heads to make dense [H]."""

    u: Floats
    measured: Measured
    dense: Bools


class Strategy(Protocol):
    """A way to find thresholds; it knows its goal and its fidelities."""

    def explore(self, evaluator: Evaluator, earlier: Sequence[Curves] = ()) -> Curves:
        """What can be said of a site at low fidelity, after the curves of earlier sites."""
        ...

    def allocate(self, curves: Mapping[str, Curves]) -> Plan:
        """The target of every head, out of the curves of all sites."""
        ...

    def refine(self, evaluator: Evaluator, plan: SitePlan) -> Found:
        """Thresholds of each head that meet its target at high fidelity, of low density."""
        ...

    def validate(
        self, evaluator: Evaluator, u: Floats, level: Ints, cap: Floats | float
    ) -> Validated:
        """Thresholds u [H] at `level`, backed off until errors on unseen inputs are ≤ cap."""
        ...


class Priced(Protocol):
    """A strategy that can also be told the price of error, instead of a budget."""

    def allocate(
        self, curves: Mapping[str, Curves], price: float | None = None, alike: float = 0.5
    ) -> Plan:
        """The target of every head at a price; `alike` is the share of one tau for all."""
        ...


Factory = Callable[[Goal, Fidelity, Fidelity], Strategy]
"""Makes a strategy of a goal, a low and a high fidelity."""
