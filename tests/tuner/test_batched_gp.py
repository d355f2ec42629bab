import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbs_compile.tuner.batched_gp import BatchedGP
from afbs_compile.tuner.evidence import Hyper
from afbs_compile.tuner.gp import GP
from afbs_compile.tuner.matern import matern52, squared_distance


def drawn(seed, heads, n, dimensions):
    rng = np.random.default_rng(seed)
    y = 3.0 * rng.standard_normal((heads, n)) + rng.standard_normal((heads, 1))
    return rng.random((heads, n, dimensions)), y, rng.random((20, dimensions))


@given(
    seed=st.integers(0, 2**32 - 1),
    heads=st.integers(1, 6),
    n=st.integers(2, 12),
    dimensions=st.integers(1, 3),
)
def test_each_head_has_the_posterior_of_a_gp_of_its_own(seed, heads, n, dimensions):
    x, y, at = drawn(seed, heads, n, dimensions)
    hyper = Hyper(np.full(dimensions, 0.6), 1.3, 1e-4)
    batched = BatchedGP().fit(x, y, hyper)
    mean, var = batched.predict(at)
    own_mean, own_var = batched.predict(np.broadcast_to(at, (heads, *at.shape)))
    for head in range(heads):
        alone = GP()
        ratio = (batched.scale / y[head].std()) ** 2  # a GP scales by its own data
        scaled = Hyper(hyper.lengthscale, hyper.amplitude * ratio, hyper.noise * ratio)
        expected_mean, expected_var = alone.fit(x[head], y[head], scaled).predict(at)
        for ours in (mean[head], own_mean[head]):
            np.testing.assert_allclose(ours, expected_mean, rtol=1e-8, atol=1e-8)
        for ours in (var[head], own_var[head]):
            np.testing.assert_allclose(ours, expected_var, rtol=1e-8, atol=1e-8)


@given(seed=st.integers(0, 2**32 - 1), heads=st.integers(2, 6))
def test_permuting_heads_permutes_the_posterior(seed, heads):
    x, y, at = drawn(seed, heads, 5, 1)
    order = np.random.default_rng(seed).permutation(heads)
    mean, var = BatchedGP().fit(x, y).predict(at)
    permuted_mean, permuted_var = BatchedGP().fit(x[order], y[order]).predict(at)
    np.testing.assert_allclose(permuted_mean, mean[order], atol=1e-4)
    np.testing.assert_allclose(permuted_var, var[order], rtol=1e-3, atol=1e-4)


def test_sharing_recovers_a_lengthscale_from_four_points_a_head():
    rng = np.random.default_rng(0)
    x = rng.random((40, 4, 1))
    gram = matern52(squared_distance(x, x, np.array([0.25])), 1.0)
    y = (np.linalg.cholesky(gram) @ rng.standard_normal((40, 4, 1)))[..., 0]
    shared = BatchedGP(noise=1e-6, prior=None).fit(x, y).hyper.lengthscale[0]
    alone = [
        GP(noise=1e-6, prior=None).fit(a, b).hyper.lengthscale[0]
        for a, b in zip(x, y, strict=True)
    ]
    assert abs(np.log(shared / 0.25)) < 0.4
    assert np.median(np.abs(np.log(np.array(alone) / 0.25))) > 0.5


@pytest.mark.parametrize(
    ("x", "y"),
    [(np.zeros((2, 3, 1)), np.zeros((2, 4))), (np.zeros((1, 2, 1)), np.full((1, 2), np.nan))],
)
def test_bad_data_is_refused(x, y):
    with pytest.raises(ValueError, match=r"need x|finite"):
        BatchedGP().fit(x, y)
