import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern

from afbs_compile.tuner.evidence import Hyper
from afbs_compile.tuner.gp import GP
from afbs_compile.tuner.matern import matern52, squared_distance


def smooth(x):
    return np.sin(5.0 * x[:, 0]) + (x**2).sum(1)


def drawn(seed, n, dimensions):
    rng = np.random.default_rng(seed)
    x = rng.random((n, dimensions))
    return x, smooth(x), rng.random((50, dimensions))


def hyper(seed, dimensions, noise=1e-4):
    rng = np.random.default_rng(seed)
    return Hyper(rng.uniform(0.2, 1.5, dimensions), rng.uniform(0.5, 3.0), noise)


@pytest.mark.parametrize(("n", "noise"), [(15, 1e-4), (15, 1e-6), (60, 1e-4), (200, 1e-6)])
def test_posterior_is_that_of_sklearn(n, noise):
    x, y, at = drawn(n, n, 2)
    known = hyper(n, 2, noise)
    kernel = ConstantKernel(known.amplitude) * Matern(known.lengthscale, nu=2.5)
    theirs = GaussianProcessRegressor(kernel, alpha=noise, optimizer=None, normalize_y=True)
    mean, std = theirs.fit(x, y).predict(at, return_std=True)
    ours_mean, ours_var = GP().fit(x, y, known).predict(at)
    np.testing.assert_allclose(ours_mean, mean, rtol=0, atol=1e-8)
    np.testing.assert_allclose(ours_var, std**2, rtol=0, atol=1e-8)


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 20), dimensions=st.integers(1, 3))
def test_interpolates_as_noise_vanishes(seed, n, dimensions):
    x, y, _ = drawn(seed, n, dimensions)
    gp = GP(noise=1e-10).fit(x, y, hyper(seed, dimensions, 1e-10))
    mean, var = gp.predict(x)
    np.testing.assert_allclose(mean, y, atol=1e-3 * max(1.0, gp.scale))
    assert np.all((var > 0.0) & (var <= 1e-8 * gp.scale**2))


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 20), dimensions=st.integers(1, 3))
def test_variance_lies_between_zero_and_the_prior(seed, n, dimensions):
    x, y, at = drawn(seed, n, dimensions)
    gp = GP().fit(x, y, hyper(seed, dimensions))
    _, var = gp.predict(np.vstack([at, x]))
    assert np.all((var > 0.0) & (var <= gp.hyper.amplitude * gp.scale**2 * (1 + 1e-12)))


def test_variance_is_positive_where_rounding_would_make_it_negative():
    x = np.linspace(0.0, 1.0, 60)[:, None]
    gp = GP(noise=0.0).fit(x, smooth(x), Hyper(np.array([2.0]), 1.0, 0.0))
    assert np.all(gp.predict(np.linspace(0.0, 1.0, 1000)[:, None])[1] > 0.0)


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 15), shift=st.floats(-100.0, 100.0))
def test_shifting_y_shifts_the_mean_only(seed, n, shift):
    x, y, at = drawn(seed, n, 2)
    mean, var = GP().fit(x, y).predict(at)
    shifted_mean, shifted_var = GP().fit(x, y + shift).predict(at)
    np.testing.assert_allclose(shifted_mean - shift, mean, atol=1e-5)
    np.testing.assert_allclose(shifted_var, var, rtol=1e-4, atol=1e-8)


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 12), more=st.integers(1, 5))
def test_appending_is_conditioning_on_all(seed, n, more):
    x, y, at = drawn(seed, n + more, 2)
    known = hyper(seed, 2)
    gp = GP().fit(x[:n], y[:n], known)
    for row, value in zip(x[n:], y[n:], strict=True):
        gp.append(row, value)
    whole = GP().fit(x, y, known)
    whole.shift, whole.scale = gp.shift, gp.scale  # append keeps the first standardisation
    whole.y = (y - gp.shift) / gp.scale
    whole.weights = np.linalg.solve(whole.chol @ whole.chol.T, whole.y)
    for ours, theirs in zip(gp.predict(at), whole.predict(at), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-8)


def test_appending_the_same_point_without_noise_still_works():
    x, y, at = drawn(0, 6, 1)
    gp = GP(noise=0.0).fit(x, y, Hyper(np.array([0.5]), 1.0, 0.0))
    before, _ = gp.predict(at)
    gp.append(x[2], y[2])
    after, var = gp.predict(at)
    assert gp.jitter > 0.0
    np.testing.assert_allclose(after, before, atol=1e-3)
    assert np.isfinite(var).all()


def test_factor_stays_that_of_the_gram_matrix_with_its_jitter():
    x = np.array([[0.1], [0.1], [0.4]])
    gp = GP(noise=0.0).fit(x, np.array([1.0, 1.0, 2.0]), Hyper(np.array([0.5]), 4.0, 0.0))
    gp.append(np.array([0.8]), 3.0)
    assert gp.jitter > 0.0
    gram = matern52(squared_distance(gp.x, gp.x, np.array([0.5])), 4.0)
    diagonal = np.diagonal(gp.chol @ gp.chol.T)
    np.testing.assert_allclose(gp.chol @ gp.chol.T, gram + gp.jitter * np.eye(4), rtol=1e-13)
    np.testing.assert_allclose(diagonal - 4.0, gp.jitter, atol=4e-15)


def test_fit_finds_the_smooth_dimension():
    rng = np.random.default_rng(0)
    x = rng.random((40, 2))
    gp = GP().fit(x, np.sin(9.0 * x[:, 0]) + 0.1 * x[:, 1])
    assert gp.hyper.lengthscale[1] > 2.0 * gp.hyper.lengthscale[0]
    at = rng.random((200, 2))
    error = gp.predict(at)[0] - (np.sin(9.0 * at[:, 0]) + 0.1 * at[:, 1])
    assert np.sqrt(np.mean(error**2)) < 0.03


def test_fit_maximises_the_likelihood_it_reports():
    x, y, _ = drawn(3, 20, 2)
    gp = GP(prior=None).fit(x, y)
    theta = np.log([*gp.hyper.lengthscale, gp.hyper.amplitude, gp.hyper.noise])
    best, _ = gp.log_marginal_likelihood(theta)
    for k in range(4):
        for step in (-0.3, 0.3):
            other = theta + step * (np.arange(4) == k)
            inside = np.exp(other[-1]) >= 1e-6
            assert not inside or gp.log_marginal_likelihood(other)[0] <= best + 1e-6


def test_constant_values_are_no_problem():
    gp = GP().fit(np.linspace(0.0, 1.0, 4)[:, None], np.full(4, 3.0))
    mean, var = gp.predict(np.array([[0.2], [5.0]]))
    np.testing.assert_allclose(mean, 3.0)
    assert np.isfinite(var).all()


@pytest.mark.parametrize(
    ("x", "y", "match"),
    [
        (np.zeros((3, 1)), np.zeros(2), "need x"),
        (np.zeros((0, 1)), np.zeros(0), "need x"),
        (np.zeros((2, 1)), np.array([0.0, np.nan]), "finite"),
        (np.array([[np.inf], [0.0]]), np.zeros(2), "finite"),
    ],
)
def test_bad_data_is_refused(x, y, match):
    with pytest.raises(ValueError, match=match):
        GP().fit(x, y)


def test_bad_row_is_refused_and_leaves_the_model_alone():
    x, y, at = drawn(0, 5, 1)
    gp = GP().fit(x, y)
    before = gp.predict(at)
    with pytest.raises(ValueError, match="finite"):
        gp.append(np.array([0.5]), float("nan"))
    np.testing.assert_array_equal(gp.predict(at), before)
