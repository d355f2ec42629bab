import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbs_compile.tuner.acquisition import log_cei, log_ei, log_h

STATED = 1e-13


def precise_log_h(z):
    """log(φ(z) + zΦ(z)) with as many digits as the cancellation eats, and thirty more."""
    with mpmath.workdps(int(30 + 4 * np.log10(1 + abs(z)))):
        z = mpmath.mpf(z)
        mills = (
            mpmath.sqrt(mpmath.pi / 2) * mpmath.exp(z * z / 2) * mpmath.erfc(-z / mpmath.sqrt(2))
        )
        log_phi = -z * z / 2 - mpmath.log(2 * mpmath.pi) / 2
        return float(log_phi + mpmath.log(1 + z * mills))


def deviation(z):
    expected = precise_log_h(z)
    return abs(float(log_h(np.array(z))) - expected) / max(1.0, abs(expected))


@given(z=st.one_of(st.floats(-1e6, -100.0), st.floats(-100.0, 5.0), st.floats(-1.1, -0.9)))
def test_log_h_is_accurate_as_stated(z):
    assert deviation(z) <= STATED


@pytest.mark.parametrize("z", [-1e9, -1e6, -1e5, np.nextafter(-1e5, 0.0), -50.0, -1.0, 0.0, 30.0])
def test_log_h_is_accurate_at_the_seams(z):
    assert deviation(z) <= STATED


def test_log_h_for_a_certain_gain_is_the_log_of_the_gain():
    z = np.array([40.0, 1e3, 1e6])
    np.testing.assert_allclose(log_h(z), np.log(z), rtol=1e-14)


def test_log_h_is_finite_and_rises():
    z = np.concatenate([-np.logspace(100, -3, 4000), np.logspace(-3, 100, 4000)])
    value = log_h(z)
    assert np.isfinite(value).all()
    assert np.all(np.diff(value) > 0.0)


def test_log_ei_is_the_log_of_expected_improvement():
    rng = np.random.default_rng(0)
    sample = 0.3 + 0.5 * rng.standard_normal(2_000_000)
    expected = np.maximum(sample - 0.6, 0.0).mean()
    assert float(log_ei(np.array(0.3), np.array(0.25), 0.6)) == pytest.approx(
        np.log(expected), abs=5e-3
    )


def test_log_ei_far_below_the_incumbent_still_orders():
    value = log_ei(np.array([-1e6, -1e5, -10.0]), np.ones(3), 0.0)
    assert np.isfinite(value).all()
    assert np.all(np.diff(value) > 0.0)


def test_constraint_multiplies_by_the_chance_of_feasibility():
    zero, one = np.zeros(3), np.ones(3)
    limit = np.array([0.0, 40.0, -1e5])  # chances 1/2, 1, and next to none
    value = log_cei(zero, one, 0.5, zero, one, limit) - log_ei(zero, one, 0.5)
    np.testing.assert_allclose(value[:2], [np.log(0.5), 0.0], atol=1e-12)
    assert -5.1e9 < value[2] < -4.9e9


def test_without_an_incumbent_only_feasibility_counts():
    mean = np.array([[0.0, 100.0, 7.0], [0.0, 100.0, 7.0]])
    one = np.ones_like(mean)
    constraint = np.array([[3.0, 2.0, 1.0]] * 2)
    value = log_cei(mean, one, np.array([[-np.inf], [5.0]]), constraint, one, 0.0)
    assert np.argmax(value[0]) == 2
    assert np.argmax(value[1]) == 1
    np.testing.assert_array_equal(
        value[0], log_cei(0 * mean, one, -np.inf, constraint, one, 0.0)[0]
    )


@pytest.mark.parametrize("var", [0.0, -1.0, np.nan])
def test_variance_that_is_none_is_refused(var):
    bad, good = np.array([var]), np.ones(1)
    with pytest.raises(ValueError, match="positive"):
        log_ei(good, bad, 0.0)
    with pytest.raises(ValueError, match="positive"):
        log_cei(good, good, 0.0, good, bad, 0.0)
