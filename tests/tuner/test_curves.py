import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from afbs_compile.tuner.curves import Curves, non_decreasing, stacked


@given(st.lists(st.floats(-10.0, 10.0), min_size=1, max_size=12))
def test_fit_is_monotone_and_leaves_monotone_curves_alone(values):
    fit = non_decreasing(np.array(values))
    assert np.all(np.diff(fit) >= 0.0)
    np.testing.assert_array_equal(non_decreasing(np.sort(values)), np.sort(values))


@given(st.lists(st.integers(-9, 9), min_size=2, max_size=8))
def test_no_monotone_curve_deviates_less(values):
    values = np.array(values, dtype=float)
    n = len(values)
    ones = np.ones((n, 1))
    steps = np.hstack([np.eye(n)[:-1] - np.eye(n)[1:], np.zeros((n - 1, 1))])
    above, below = np.hstack([np.eye(n), -ones]), np.hstack([-np.eye(n), -ones])
    best = linprog(
        [0.0] * n + [1.0],
        A_ub=np.vstack([steps, above, below]),
        b_ub=np.concatenate([np.zeros(n - 1), values, -values]),
        bounds=(None, None),
    )
    assert np.abs(non_decreasing(values) - values).max() <= best.fun + 1e-9


def test_rows_are_fitted_one_by_one():
    rows = np.array([[1.0, 0.0], [0.0, 1.0]])
    np.testing.assert_array_equal(non_decreasing(rows), [[0.5, 0.5], [0.0, 1.0]])


def test_unknown_heads_have_no_grid():
    unknown = Curves.unknown(3)
    assert unknown.heads == 3
    assert unknown.u.size == 0


def test_stacking_keeps_the_order():
    a, b = (Curves(np.arange(2.0), *(np.full((h, 2), float(h)) for _ in range(4))) for h in (1, 2))
    error, density = stacked([b, a])
    np.testing.assert_array_equal(error[:, 0], [2.0, 2.0, 1.0])
    assert density.shape == (3, 2)
