"""Which budgets let units of work that wait for each other end together? One number for each unit.

A unit is what one data-parallel replica does before it waits: a micro-batch or a whole step. Its
pressure p in [−1, 1] moves all its layers between their bounds (`budget_bounds`), so its kept
blocks, and with them its predicted time, are piecewise linear in p and the p of a wanted time has
a closed form. The wanted time is an anchor, the mean, least or largest predicted time
(SparseBalance, arXiv 2604.13847), but not less than the slowest unit can reach: a target below
that would take blocks from the others for nothing. So it can always be met within bounds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from afbs_compile.tuner.arrays import Bools, Floats
from afbs_compile.tuner.budget_bounds import Bounds
from afbs_compile.tuner.step_cost import CostModel

ANCHORS: dict[str, Callable[[Floats], Any]] = {"mean": np.mean, "min": np.min, "max": np.max}
ROUNDING = 1e-12
BUBBLE_ONLY = "max"  # the anchor at which nobody shrinks: bubbles are filled, no step is faster


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What N units have to do, and how long it takes.

    Attributes:
        tokens: Tokens [N].
        visible: Visible blocks of every layer [N, L].
        slowness: Time over predicted time of the unit's replica [N]; 1 is normal.
    """

    tokens: Floats
    visible: Floats
    slowness: Floats

    @staticmethod
    def of(
        tokens: ArrayLike, visible: ArrayLike, layers: int, slowness: ArrayLike = 1.0
    ) -> "Work":
        """Work with `visible` [N, L], or [N] if all layers see the same.

        Raises:
            ValueError: Shapes that do not match, or negative numbers.
        """
        t, v = np.asarray(tokens, float), np.asarray(visible, float)
        v = np.repeat(v[:, None], layers, axis=1) if v.ndim == 1 else v
        if t.ndim != 1 or v.shape != (len(t), layers) or not len(t):
            raise ValueError(
                f"tokens are {t.shape}, visible blocks {v.shape}: need [units] and "
                f"[units, {layers}], one unit or more"
            )
        if not (np.isfinite(t).all() and np.isfinite(v).all() and min(t.min(), v.min()) >= 0.0):
            raise ValueError("tokens and visible blocks need to be finite numbers ≥ 0")
        return Work(t, v, np.broadcast_to(np.asarray(slowness, float), t.shape))

    def blocks(self, budgets: Floats) -> Floats:
        """Kept blocks [N] under budgets [N, L] or [L]."""
        return np.asarray((self.visible * budgets).sum(axis=1))

    def seconds(self, budgets: Floats, cost: CostModel) -> Floats:
        """Predicted time [N] under budgets [N, L] or [L]."""
        return self.slowness * cost.predict(self.tokens, self.blocks(budgets))


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Budgets of N units.

    Attributes:
        work: What the units do.
        budgets: Share of visible blocks to keep [N, L].
        pressure: Where between the bounds [N], in [−1, 1].
        target: Seconds in which all should end; NaN if nothing could be predicted.
        before: Predicted seconds at base budgets [N].
        after: Predicted seconds at these budgets [N].
        reason: Why all budgets are base budgets; empty if they are not for a reason.
    """

    work: Work
    budgets: Floats
    pressure: Floats
    target: float
    before: Floats
    after: Floats
    reason: str = ""

    @property
    def imbalance(self) -> tuple[float, float]:
        """Largest over mean predicted time, before and after."""
        return ratio(self.before), ratio(self.after)


def plan(
    work: Work,
    bounds: Bounds,
    cost: CostModel,
    anchor: str = "mean",
    held: Floats | None = None,
    deadband: float = 0.02,
    margin: float = 0.0,
) -> Plan:
    """Budgets for some units that wait for each other.

    Args:
        work: What they do.
        bounds: Of the layers' budgets.
        cost: Predicts.
        anchor: One of `ANCHORS`; "max" only fills bubbles.
        held: Pressures of the last plan [N]; they are kept while their times are near the target.
        deadband: How near, as a share of the target.
        margin: How far below the target a unit stops to grow, as a share of it: predictions err,
            and of many units that end together one is always late.
    """
    before = work.seconds(bounds.base, cost)
    if not cost.ready or not np.isfinite(before).all():
        return at_base(work, bounds, "no cost is known yet: profile, or observe some steps")
    ends = [work.seconds(bounds.at(p), cost) for p in (-1.0, 1.0)]
    target = max(float(ANCHORS[anchor](before)), float(ends[0].max()))
    if anchor == BUBBLE_ONLY:
        target = float(before.max())
    wanted = np.clip(before, (1.0 - margin) * target, target)
    pressure = pressure_for(wanted, before, *ends)
    pressure[near(before, wanted, deadband / 2)] = 0.0
    if held is not None:
        steady = near(work.seconds(bounds.at(held), cost), wanted, deadband)
        pressure = np.where(steady & (pressure != 0.0), held, pressure)
    budgets = bounds.at(pressure)
    return Plan(work, budgets, pressure, target, before, work.seconds(budgets, cost))


def pressure_for(wanted: Floats, base: Floats, low: Floats, high: Floats) -> Floats:
    """The pressure [N] at which units take `wanted` [N], given their times at −1 (low), 0, 1."""
    slack = np.where(wanted < base, base - low, high - base)
    can = slack > ROUNDING * base  # where bounds are equal there is nothing to move
    share = np.divide(wanted - base, slack, out=np.zeros_like(base), where=can)
    return np.clip(share, -1.0, 1.0)


def at_base(work: Work, bounds: Bounds, reason: str) -> Plan:
    """The plan that changes nothing."""
    units = len(work.tokens)
    unknown = np.full(units, np.nan)
    budgets = np.repeat(bounds.base[None], units, axis=0)
    return Plan(work, budgets, np.zeros(units), float("nan"), unknown, unknown, reason)


def near(seconds: Floats, wanted: Floats, share: float) -> Bools:
    """Which times [N] are within a share of what is wanted [N]."""
    return np.asarray(np.abs(seconds - wanted) <= share * wanted)


def ratio(seconds: Floats) -> float:
    """Largest over mean."""
    return float(seconds.max() / seconds.mean())
