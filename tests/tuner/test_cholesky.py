import numpy as np
import pytest

from afbs_compile.tuner.cholesky import inverse_factor, jittered_cholesky


def test_good_matrix_gets_no_jitter():
    gram = np.array([[2.0, 0.5], [0.5, 1.0]])
    chol, jitter = jittered_cholesky(gram)
    assert jitter == 0.0
    np.testing.assert_allclose(chol @ chol.T, gram, rtol=1e-15)


def test_singular_matrix_gets_the_least_jitter_that_works():
    gram = np.full((6, 6), 100.0)
    chol, jitter = jittered_cholesky(gram)
    assert 0.0 < jitter <= 1e-8
    np.testing.assert_allclose(chol @ chol.T, gram + jitter * np.eye(6), rtol=1e-15)


def test_one_jitter_for_a_stack():
    stack = np.stack([np.eye(4), np.ones((4, 4))])
    chol, jitter = jittered_cholesky(stack)
    expected = stack + jitter * np.eye(4)
    assert jitter > 0.0
    np.testing.assert_allclose(chol @ chol.transpose(0, 2, 1), expected, atol=1e-14)


def test_hopeless_matrix_is_refused():
    with pytest.raises(np.linalg.LinAlgError, match="not positive definite"):
        jittered_cholesky(-np.eye(3))


def test_matrix_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        jittered_cholesky(np.full((2, 2), np.nan))


def test_inverse_factor():
    chol = np.tril(np.random.default_rng(0).standard_normal((3, 5, 5))) + 4.0 * np.eye(5)
    inverse = inverse_factor(chol)
    np.testing.assert_allclose(inverse @ chol, np.broadcast_to(np.eye(5), (3, 5, 5)), atol=1e-14)
    assert np.all(np.triu(inverse, 1) == 0.0)
