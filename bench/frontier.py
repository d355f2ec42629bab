"""What does a sparsity cost? Means over windows, and curves of a family read at one point.

Changes of perplexity are paired: a window's sparse over its own dense perplexity, so that what
makes one window harder than another drops out. Nothing is extrapolated.
"""

import itertools
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Group = tuple[str, str, str, int]  # model, dtype, text, tokens

BUDGET = 1.0  # percent of perplexity
SPARSITY = 0.7  # at which KL is read


@dataclass(frozen=True, slots=True)
class Point:
    """One setting on one text at one length.

    Attributes:
        setting: Its name.
        family: The curve it lies on.
        windows: How many windows were measured.
        sparsity: Share of the visible blocks that were left out.
        change: Of the perplexity, in percent.
        error: Standard error of `change`; None with one window.
        kl: KL(dense ‖ sparse) per token, in nats.
    """

    setting: str
    family: str
    windows: int
    sparsity: float
    change: float
    error: float | None
    kl: float


@dataclass(frozen=True, slots=True)
class Reading:
    """Where a curve is read: at `value`, or somewhere `below` or `above` it, beyond its end."""

    value: float
    where: str = "at"


def groups(rows: Iterable[Row]) -> dict[Group, list[Point]]:
    """The points of every text and length, in the order of the rows."""
    settings: dict[Group, dict[tuple[str, str, str | None], list[Row]]] = {}
    for row in rows:
        group = (row["model"], row["dtype"], row["text"], row["tokens"])
        setting = (row["setting"], row["family"], row["calibration"])
        settings.setdefault(group, {}).setdefault(setting, []).append(row)
    tunings = {row["calibration"] for row in rows} - {None}
    several = len(tunings) > 1
    return {
        group: [
            point(name, told(family, of, several), found)
            for (name, family, of), found in every.items()
        ]
        for group, every in settings.items()
    }


def told(family: str, calibration: str | None, several: bool) -> str:
    """A family's name; tunings on different windows are families of their own."""
    return f"{family} ({calibration})" if several and calibration else family


def point(setting: str, family: str, rows: list[Row]) -> Point:
    """The mean over windows."""
    logs = [math.log(row["perplexity_sparse"] / row["perplexity_dense"]) for row in rows]
    mean = statistics.fmean(logs)
    many = len(rows) > 1
    error = statistics.stdev(logs) / math.sqrt(len(rows)) if many else None
    return Point(
        setting=setting,
        family=family,
        windows=len(rows),
        sparsity=1 - statistics.fmean(row["density"] for row in rows),
        change=100 * math.expm1(mean),
        error=None if error is None else 100 * math.exp(mean) * error,
        kl=statistics.fmean(row["kl"] for row in rows),
    )


def families(points: Iterable[Point]) -> dict[str, list[Point]]:
    """The points of every family, by rising sparsity; dense is no family."""
    found: dict[str, list[Point]] = {}
    for one in sorted(points, key=lambda p: p.sparsity):
        if one.family != "dense":
            found.setdefault(one.family, []).append(one)
    return found


def sparsity_at(curve: list[Point], change: float = BUDGET) -> Reading:
    """The sparsity at which a curve first costs `change` percent of perplexity."""
    if curve[0].change > change:
        return Reading(curve[0].sparsity, "below")
    for left, right in itertools.pairwise(curve):
        if right.change > change:
            share = (change - left.change) / (right.change - left.change)
            return Reading(left.sparsity + share * (right.sparsity - left.sparsity))
    return Reading(curve[-1].sparsity, "above")


def kl_at(curve: list[Point], sparsity: float = SPARSITY) -> Reading:
    """KL at a sparsity, between neighbours on a logarithmic scale; it rises with sparsity."""
    if sparsity < curve[0].sparsity:
        return Reading(curve[0].kl, "below")
    if sparsity > curve[-1].sparsity:
        return Reading(curve[-1].kl, "above")
    left = max((p for p in curve if p.sparsity <= sparsity), key=lambda p: p.sparsity)
    right = min((p for p in curve if p.sparsity >= sparsity), key=lambda p: p.sparsity)
    if left.sparsity == right.sparsity:
        return Reading(left.kl)
    share = (sparsity - left.sparsity) / (right.sparsity - left.sparsity)
    if min(left.kl, right.kl) <= 0:  # rounding: too small for a logarithm
        return Reading(left.kl + share * (right.kl - left.kl))
    return Reading(left.kl * (right.kl / left.kl) ** share)
