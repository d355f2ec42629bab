import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern

from afbs_compile.tuner.evidence import (
    AMPLITUDE_BOUNDS,
    LENGTHSCALE_BOUNDS,
    Prior,
    checked_noise,
    default_theta,
    fit_theta,
    hyper_of,
    log_evidence,
    pairwise_squares,
)

BOUNDS = (1e-6, 1e-1)


def problem(seed, heads, n, dimensions):
    rng = np.random.default_rng(seed)
    return rng.random((heads, n, dimensions)), rng.standard_normal((heads, n))


@given(
    seed=st.integers(0, 2**32 - 1),
    heads=st.integers(1, 4),
    n=st.integers(1, 12),
    dimensions=st.integers(1, 3),
    noise=st.sampled_from([BOUNDS, 1e-3]),
)
def test_gradient_is_that_of_finite_differences(seed, heads, n, dimensions, noise):
    x, y = problem(seed, heads, n, dimensions)
    squares = pairwise_squares(x)
    free = isinstance(noise, tuple)
    theta = np.random.default_rng(seed + 1).uniform(-1.0, 1.0, dimensions + 1 + free)
    if free:
        theta[-1] = np.log(1e-2)
    _, gradient = log_evidence(theta, squares, y, noise)
    step = 1e-5
    for k, slope in enumerate(gradient):
        ahead, behind = (theta + s * step * (np.arange(len(theta)) == k) for s in (1, -1))
        rise = (
            log_evidence(ahead, squares, y, noise)[0] - log_evidence(behind, squares, y, noise)[0]
        )
        assert slope == pytest.approx(rise / (2 * step), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("n", [3, 40])
def test_value_and_gradient_are_those_of_sklearn(n):
    x, y = problem(n, 1, n, 2)
    lengthscale, amplitude, noise = np.array([0.3, 0.9]), 1.7, 1e-4
    kernel = ConstantKernel(amplitude) * Matern(lengthscale, nu=2.5)
    theirs = GaussianProcessRegressor(kernel, alpha=noise, optimizer=None).fit(x[0], y[0])
    value, slope = theirs.log_marginal_likelihood(kernel.theta, eval_gradient=True)
    theta = np.log([*lengthscale, amplitude])
    ours, gradient = log_evidence(theta, pairwise_squares(x), y, noise)
    assert ours == pytest.approx(value, abs=1e-8, rel=1e-10)
    np.testing.assert_allclose(gradient[[2, 0, 1]], slope, rtol=1e-7, atol=1e-8)


def test_heads_add_up():
    x, y = problem(0, 3, 7, 2)
    theta = np.log([0.4, 0.6, 1.2, 1e-3])
    together = log_evidence(theta, pairwise_squares(x), y, BOUNDS)
    alone = [
        log_evidence(theta, pairwise_squares(x[h : h + 1]), y[h : h + 1], BOUNDS) for h in range(3)
    ]
    assert together[0] == pytest.approx(sum(value for value, _ in alone), rel=1e-12)
    np.testing.assert_allclose(together[1], sum(slope for _, slope in alone), rtol=1e-9)


@pytest.mark.parametrize("noise", [BOUNDS, 1e-3])
def test_fit_climbs_and_stays_in_its_bounds(noise):
    x, y = problem(1, 2, 15, 2)
    start = default_theta(2, noise)
    theta = fit_theta(x, y, noise, None, start)
    squares = pairwise_squares(x)
    value, slope = log_evidence(theta, squares, y, noise)
    assert value > log_evidence(start, squares, y, noise)[0]
    bounds = np.log([LENGTHSCALE_BOUNDS] * 2 + [AMPLITUDE_BOUNDS] + [BOUNDS] * (len(theta) - 3))
    assert np.all((theta >= bounds[:, 0]) & (theta <= bounds[:, 1]))
    interior = (theta > bounds[:, 0] + 1e-9) & (theta < bounds[:, 1] - 1e-9)
    assert interior.any()
    np.testing.assert_allclose(slope[interior], 0.0, atol=2e-2)


def test_prior_pulls_the_lengthscale_to_its_median():
    x, y = problem(2, 1, 5, 1)
    free = hyper_of(fit_theta(x, y, 1e-3, None, default_theta(1, 1e-3)), 1e-3)
    tight = hyper_of(fit_theta(x, y, 1e-3, Prior(0.7, 0.01), default_theta(1, 1e-3)), 1e-3)
    assert abs(np.log(tight.lengthscale[0] / 0.7)) < 0.05
    assert abs(np.log(free.lengthscale[0] / 0.7)) > 0.2


def test_prior_density_has_its_gradient_and_its_mode():
    prior = Prior(0.7, 0.5)
    at = np.array([-1.0, 0.3])
    step = 1e-6
    for k in range(2):
        shift = step * (np.arange(2) == k)
        rise = prior.log_density(at + shift)[0] - prior.log_density(at - shift)[0]
        assert prior.log_density(at)[1][k] == pytest.approx(rise / (2 * step), rel=1e-7)
    np.testing.assert_allclose(prior.log_density(np.log([0.7]))[1], 0.0, atol=1e-15)


@pytest.mark.parametrize("noise", [-1.0, np.nan, np.inf, (0.0, 1.0), (1e-2, 1e-3)])
def test_noise_out_of_range_is_refused(noise):
    with pytest.raises(ValueError, match="noise variance"):
        checked_noise(noise)


@pytest.mark.parametrize("noise", [0, 0.0, 1e-3, (1e-6, 1e-6)])
def test_noise_in_range_is_kept(noise):
    assert checked_noise(noise) == noise
