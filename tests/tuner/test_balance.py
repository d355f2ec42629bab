"""A plan stays within bounds, meets its target where it can, and does nothing without cause."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbs_compile.tuner.balance import ANCHORS, Work, plan
from afbs_compile.tuner.budget_bounds import around
from afbs_compile.tuner.step_cost import CostModel

LAYERS = 3
BASE = np.array([0.2, 0.3, 0.4])


def cost_model(a=1e-6, b=1e-5, c=1e-3):
    """A model that has learned these coefficients exactly."""
    tokens = np.array([1e3, 4e3, 16e3, 64e3, 2e3, 8e3])
    blocks = np.array([1e2, 1e4, 1e3, 1e5, 1e3, 1e2])
    model = CostModel(ridge=1e-9)
    model.profile(tokens, blocks, a * tokens + b * blocks + c)
    return model


COST = cost_model()
lengths = st.lists(st.integers(1000, 50000), min_size=2, max_size=12)
shrinks, grows = st.floats(0.4, 1.0), st.floats(1.0, 2.5)


def work_of(tokens, slowness=1.0):
    tokens = np.asarray(tokens, float)
    return Work.of(tokens, tokens**2 / 16384, LAYERS, slowness)


@given(lengths, shrinks, grows, st.sampled_from(sorted(ANCHORS)), st.integers(0, 9))
def test_budgets_are_bounded_whatever_the_load(tokens, shrink, grow, anchor, seed):
    slowness = np.random.default_rng(seed).uniform(0.2, 5.0, len(tokens))
    bounds = around(BASE, shrink, grow)
    made = plan(work_of(tokens, slowness), bounds, COST, anchor)
    assert (made.budgets >= bounds.low - 1e-12).all()
    assert (made.budgets <= bounds.high + 1e-12).all()


@given(lengths, shrinks, grows, st.sampled_from(sorted(ANCHORS)))
def test_no_unit_ends_after_the_target(tokens, shrink, grow, anchor):
    """The slowest that nobody can make faster sets the target: it is never infeasible."""
    made = plan(work_of(tokens), around(BASE, shrink, grow), COST, anchor, deadband=0.0)
    assert made.after.max() <= made.target * (1 + 1e-9)
    assert made.after.max() <= made.before.max() * (1 + 1e-9)


@given(lengths, st.sampled_from(sorted(ANCHORS)))
def test_a_unit_inside_its_bounds_ends_at_the_target(tokens, anchor):
    made = plan(work_of(tokens), around(BASE), COST, anchor, deadband=0.0)
    inside = np.abs(made.pressure) < 1.0
    np.testing.assert_allclose(made.after[inside], made.target, rtol=1e-9)


@given(st.integers(1000, 50000), st.integers(1, 8), st.sampled_from(sorted(ANCHORS)))
def test_equal_lengths_change_nothing(tokens, units, anchor):
    made = plan(work_of([tokens] * units), around(BASE), COST, anchor)
    np.testing.assert_array_equal(made.budgets, np.tile(BASE, (units, 1)))


@given(lengths, shrinks, grows)
def test_bubble_only_takes_nothing_and_is_no_slower(tokens, shrink, grow):
    made = plan(work_of(tokens), around(BASE, shrink, grow), COST, "max", deadband=0.0)
    assert (made.pressure >= 0.0).all()
    assert made.after.max() <= made.before.max() * (1 + 1e-9)


@given(lengths)
def test_it_goes_both_ways(tokens):
    made = plan(work_of(tokens), around(BASE), COST, "mean")
    slow, fast = made.before > 1.02 * made.target, made.before < 0.98 * made.target
    assert (made.pressure[slow] < 0.0).all()
    assert (made.pressure[fast] > 0.0).all()


@given(lengths, st.randoms())
def test_order_of_units_does_not_matter(tokens, random):
    order = list(range(len(tokens)))
    random.shuffle(order)
    one = plan(work_of(tokens), around(BASE), COST)
    other = plan(work_of(np.array(tokens)[order]), around(BASE), COST)
    np.testing.assert_allclose(other.budgets, one.budgets[order], rtol=1e-9)


@given(lengths, st.floats(0.01, 0.3))
def test_growing_stops_a_margin_below_the_target(tokens, margin):
    made = plan(work_of(tokens), around(BASE), COST, margin=margin, deadband=0.0)
    grown = made.pressure > 0.0
    assert (made.after[grown] <= (1 - margin) * made.target * (1 + 1e-9)).all()
    assert (made.after[~grown] <= made.target * (1 + 1e-9)).all()


def test_a_held_pressure_stays_while_it_is_near_enough():
    work, bounds = work_of([11700, 12000, 12300]), around(BASE)
    fresh = plan(work, bounds, COST, deadband=0.02)
    assert (np.abs(fresh.pressure) < 0.98).all()
    nudged = fresh.pressure + 0.01
    expected = np.where(fresh.pressure == 0.0, 0.0, nudged)  # the middle one is back at its base
    assert plan(work, bounds, COST, held=nudged).pressure == pytest.approx(expected)
    far = -fresh.pressure
    assert plan(work, bounds, COST, held=far).pressure == pytest.approx(fresh.pressure)


def test_without_a_cost_everybody_keeps_the_base():
    made = plan(work_of([1000, 9000]), around(BASE), CostModel())
    np.testing.assert_array_equal(made.budgets, np.tile(BASE, (2, 1)))
    assert "no cost is known" in made.reason


@pytest.mark.parametrize(
    ("tokens", "visible"),
    [([1.0, 2.0], [1.0]), ([1.0], [-1.0]), ([np.nan], [1.0]), ([], []), ([1.0], [[1.0, 2.0]])],
)
def test_work_that_cannot_be_is_refused(tokens, visible):
    with pytest.raises(ValueError, match="need"):
        Work.of(tokens, visible, LAYERS)
