"""Bounds keep the coverage that they promise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbs_compile.tuner.budget_bounds import (
    FLOOR,
    Bounds,
    around,
    from_coverage,
    from_policy,
)

GRID = np.linspace(0.02, 1.0, 50)
bases = st.lists(st.floats(0.05, 1.0), min_size=1, max_size=6).map(np.array)
steepness = st.floats(0.05, 1.0)


@given(bases, steepness, st.floats(0.0, 0.5))
def test_low_keeps_the_coverage(base, power, loss):
    coverage = np.tile(GRID**power, (len(base), 1))
    bounds = from_coverage(GRID, coverage, base, loss)
    points, curve = np.r_[0.0, GRID], np.r_[0.0, GRID**power]
    kept, was = np.interp(bounds.low, points, curve), np.interp(base, points, curve)
    assert (kept >= (1 - loss) * was - 1e-9).all()
    assert (bounds.low >= FLOOR * base - 1e-12).all()


@given(bases, st.floats(0.5, 1.0), st.floats(0.05, 0.9))
def test_a_policys_bounds_hold_for_every_concave_curve_through_it(base, tau, power):
    """A concave curve through (0, 0), (density, tau) and (1, 1) lies above the chords."""
    base = np.minimum(base, 0.9 * tau)
    bounds = from_policy(np.full(len(base), tau), base)
    for low, density in zip(bounds.low, base, strict=True):
        curve = tau * (low / density) ** power
        assert curve >= 0.9 * tau - 1e-9


@given(bases, st.floats(-1.0, 1.0), st.floats(0.3, 1.0), st.floats(1.0, 3.0))
def test_budgets_stay_between_bounds_and_rise_with_pressure(base, pressure, shrink, grow):
    bounds = around(base, shrink, grow)
    budgets = bounds.at(np.array([-1.0, pressure, 1.0]))
    assert (budgets >= bounds.low - 1e-12).all()
    assert (budgets <= bounds.high + 1e-12).all()
    assert (np.diff(budgets, axis=0) >= -1e-12).all()
    np.testing.assert_array_equal(bounds.at(0.0), base)


def test_the_less_sensitive_layer_gives_more():
    flat, steep = np.minimum(GRID * 9.0, 1.0), GRID
    bounds = from_coverage(GRID, np.stack([flat, steep]), np.array([0.4, 0.4]))
    assert bounds.low[0] == pytest.approx(0.2)
    assert bounds.low[1] == pytest.approx(0.36)


@pytest.mark.parametrize(
    ("low", "base", "high"),
    [(0.5, 0.4, 0.6), (0.0, 0.4, 0.6), (0.3, 0.4, 1.1), (0.3, np.nan, 0.6)],
)
def test_bounds_that_cannot_be_are_refused(low, base, high):
    with pytest.raises(ValueError, match="low ≤ base ≤ high"):
        Bounds(*(np.array([x]) for x in (low, base, high)))


def test_coverage_that_falls_is_refused():
    with pytest.raises(ValueError, match="rise"):
        from_coverage([0.5, 1.0], [[0.9, 0.8]], [0.5])
    with pytest.raises(ValueError, match="coverage is"):
        from_coverage([0.5, 1.0], [[0.9]], [0.5])
