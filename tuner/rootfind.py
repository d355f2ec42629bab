"""Where does each head's error first meet its target? A safeguarded secant, heads in lock-step.

The least u with error(u) ≤ target, by the secant on log(error / target), nearly a straight line
in u, inside a bracket that shrinks with every call; a bisection step whenever the secant has no
answer or has not halved the bracket in two steps (in the spirit of Dekker 1969 and Brent 1973).
One call of the evaluator serves all heads. Left end: u known infeasible, right end: feasible.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from afbs_compile.tuner.arrays import Bools, Floats, Ints
from afbs_compile.tuner.objective import U_MAX, Measured, expect_heads

SLOPE = -1.6  # of log error over u, before a head has two measurements
CLOSE = 1.0 + 1e-9  # a width within rounding of the tolerance has reached it
PATIENCE = 2  # slow steps after which a head only bisects: its error runs in stairs
MAX_CALLS = 16


@dataclass(frozen=True, slots=True, eq=False)
class Root:
    """Where each head's error first meets its target.

    Attributes:
        u: measured feasible, at most `width` above the least feasible u; else `hi` [H].
        error: measured at u [H].
        density: measured at u [H].
        feasible: error ≤ target at u [H].
        width: of the final bracket, 0 where an end of the range is the answer [H].
        evaluations: calls until the head was done [H].
        calls: of the evaluator: the largest of `evaluations`.
    """

    u: Floats
    error: Floats
    density: Floats
    feasible: Bools
    width: Floats
    evaluations: Ints
    calls: int


@dataclass(slots=True, eq=False)
class _Bracket:
    """State of H heads: the ends, whether they were measured, log(error / target) there."""

    lo: float
    hi: float
    tolerance: float
    method: str
    left: Floats
    right: Floats
    left_seen: Bools
    right_seen: Bools  # so there is a feasible u
    left_gap: Floats
    right_gap: Floats
    slope: Floats
    widths: Floats  # of the bracket before the last three calls [3, H]
    error: Floats  # at the right end
    density: Floats
    slow_steps: Ints  # times that the secant did not halve the bracket
    done: Bools

    @classmethod
    def new(cls, heads: int, lo: float, hi: float, tolerance: float, method: str) -> Self:
        unknown, no = np.full(heads, np.nan), np.zeros(heads, dtype=bool)
        return cls(
            lo=lo,
            hi=hi,
            tolerance=tolerance,
            method=method,
            left=np.full(heads, lo),
            right=np.full(heads, hi),
            left_seen=no,
            right_seen=no,
            left_gap=unknown,
            right_gap=unknown,
            slope=np.full(heads, SLOPE),
            widths=np.full((3, heads), np.inf),
            error=unknown,
            density=unknown,
            slow_steps=np.zeros(heads, dtype=np.int64),
            done=no,
        )

    @property
    def width(self) -> Floats:
        return self.right - self.left

    @property
    def narrow(self) -> Bools:
        return self.width <= self.tolerance * CLOSE


def solve(
    evaluate: Callable[[Floats], Measured],
    target: Floats,
    *,
    start: Floats | None = None,
    lo: float = 0.0,
    hi: float = U_MAX,
    tolerance: float = 0.025,
    max_calls: int = MAX_CALLS,
    method: Literal["secant", "bisect"] = "secant",
) -> Root:
    """The least u in [lo, hi] with error(u) ≤ target of every head, to within `tolerance`.

    Error should fall with u. Whatever it does, a u returned as feasible was measured feasible;
    a head for which no such u was found gets `hi`, measured, and feasible=False.

    Args:
        evaluate: error and density of all heads at u [H].
        target: largest error allowed [H], ≥ 0.
        start: where the secant begins [H], else at a quarter of the range.
        lo: least u.
        hi: largest u.
        tolerance: width of the bracket at which a head is done, in u.
        max_calls: of `evaluate`, ≥ 1; heads without a feasible u spend the last one on `hi`.
        method: "bisect" begins in the middle and never uses the secant.

    Raises:
        ValueError: arguments out of range; measurements of another number of heads.
    """
    target = np.asarray(target, dtype=np.float64)
    _check(target, lo, hi, tolerance, max_calls)
    state = _Bracket.new(len(target), lo, hi, tolerance, method)
    return _search(evaluate, target, state, _first(target, start, lo, hi, method), max_calls)


def _search(
    evaluate: Callable[[Floats], Measured],
    target: Floats,
    state: _Bracket,
    first: Floats,
    max_calls: int,
) -> Root:
    evaluations = np.zeros(len(target), dtype=np.int64)
    for call in range(1, max_calls + 1):
        u = first if call == 1 else _next(state)
        if call == max_calls:
            u = np.where(state.right_seen, u, state.hi)
        u = np.where(state.done, state.right, u)
        evaluations += ~state.done
        _update(state, u, expect_heads(evaluate(u), len(target)), target)
        if state.done.all():
            break
    ends = ~state.right_seen | (state.right == state.lo)
    return Root(
        u=state.right,
        error=state.error,
        density=state.density,
        feasible=state.right_seen,
        width=np.where(ends, 0.0, state.width),
        evaluations=evaluations,
        calls=int(evaluations.max()),
    )


def _first(target: Floats, start: Floats | None, lo: float, hi: float, method: str) -> Floats:
    if method == "bisect":
        return np.full(len(target), 0.5 * (lo + hi))
    if method != "secant":
        raise ValueError(f"method is 'secant' or 'bisect', got {method!r}")
    if start is None:
        return np.full(len(target), lo + 0.25 * (hi - lo))
    start = np.asarray(start, dtype=np.float64)
    if start.shape != target.shape or not np.isfinite(start).all():
        raise ValueError(f"start is {start}: need a finite u for each of {len(target)} heads")
    return np.clip(start, lo, hi)


def _check(target: Floats, lo: float, hi: float, tolerance: float, max_calls: int) -> None:
    if target.ndim != 1 or not target.size or not np.all(target >= 0.0):
        raise ValueError(f"target is {target}: need an error ≥ 0 for each head, at least one")
    if not (lo < hi and tolerance > 0.0 and max_calls >= 1):
        raise ValueError(
            f"need lo < hi, tolerance > 0, max_calls ≥ 1; "
            f"got lo={lo}, hi={hi}, tolerance={tolerance}, max_calls={max_calls}"
        )


def _update(state: _Bracket, u: Floats, measured: Measured, target: Floats) -> None:
    """Move the end of the bracket that the measurement at u belongs to."""
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = np.log(measured.error) - np.log(target)  # NaN or ±inf where either is 0
        from_left = (gap - state.left_gap) / (u - state.left)
        from_right = (gap - state.right_gap) / (u - state.right)
    slope = np.where(state.left_seen, from_left, from_right)
    state.slope = np.where(np.isfinite(slope), slope, state.slope)
    state.widths = np.vstack([state.widths[1:], state.width])
    feasible = measured.error <= target
    right, left = feasible & ~state.done, ~feasible & ~state.done
    at_end = right | (left & (u == state.right))  # an infeasible `hi` is measured, too
    state.error = np.where(at_end, measured.error, state.error)
    state.density = np.where(at_end, measured.density, state.density)
    state.right, state.right_gap = np.where(right, (u, gap), (state.right, state.right_gap))
    state.left, state.left_gap = np.where(left, (u, gap), (state.left, state.left_gap))
    state.right_seen, state.left_seen = state.right_seen | right, state.left_seen | left
    lowest = state.right_seen & (state.right == state.lo)
    hopeless = ~state.right_seen & (state.left == state.hi)
    state.done = state.done | (state.right_seen & state.narrow) | lowest | hopeless


def _next(state: _Bracket) -> Floats:
    """Where to measure next [H]."""
    left, right, width, tolerance = state.left, state.right, state.width, state.tolerance
    middle = 0.5 * (left + right)
    at_top = ~state.right_seen & state.narrow
    if state.method == "bisect":
        return np.where(at_top, state.hi, middle)
    root = _secant(state)
    # aim just beyond the root; once one end is next to it, at the other end of a narrow bracket
    step = 0.98 * tolerance
    probe = root + 0.4 * tolerance
    probe = np.where(state.left_seen & (root - left <= 0.5 * step), left + step, probe)
    probe = np.where(state.right_seen & (right - root <= 0.6 * step), right - step, probe)
    probe = np.where(~state.left_seen & (root <= state.lo), state.lo, probe)
    probe = np.where(~state.right_seen & (root >= state.hi), state.hi, probe)
    inside = (probe > left) & (probe < right)
    end = (~state.left_seen & (probe == state.lo)) | (~state.right_seen & (probe == state.hi))
    bracketed = state.left_seen & state.right_seen
    slow = width > 0.5 * np.where(bracketed, state.widths[1], state.widths[0])
    state.slow_steps = state.slow_steps + (slow & bracketed)
    bisect = slow | (state.slow_steps >= PATIENCE) | ~(inside | end) | (width <= 2.0 * tolerance)
    return np.where(at_top, state.hi, np.where(bisect, middle, probe))


def _secant(state: _Bracket) -> Floats:
    """Root of the line through the measured ends, or through one of them with the slope [H].

    Not finite where an error or a target is 0.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        share = state.left_gap / (state.left_gap - state.right_gap)
        from_left = state.left - state.left_gap / state.slope
        from_right = state.right - state.right_gap / state.slope
        between = state.left + state.width * share
    beyond = np.where(state.left_seen, from_left, from_right)
    return np.where(state.left_seen & state.right_seen, between, beyond)
