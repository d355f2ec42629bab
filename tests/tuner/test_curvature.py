"""Quadratic forms of what windowed heads cost: estimated from slopes, and their least choice."""

from itertools import combinations

import numpy as np
import pytest

from afbs_compile.tuner import curvature
from afbs_compile.tuner.heads import lowest
from afbs_compile.tuner.relative import geometric

SIZE = 9


@pytest.fixture
def forms(rng):
    """Two tasks; heads come in pairs that stand in for each other."""
    found = []
    for _ in range(2):
        pairs = np.kron(np.eye(SIZE // 2 + 1), np.ones((2, 2)))[:SIZE, :SIZE]
        scale = np.sqrt(rng.uniform(0.5, 2.0, SIZE))
        found.append((0.1 * np.eye(SIZE) + 0.9 * pairs) * scale * scale[:, None])
    return np.array(found)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def costs(forms, bits):
    z = np.asarray(bits, dtype=float)
    every = np.ones(len(z))
    return np.array([z @ form @ z / (every @ form @ every) for form in forms])


def chosen(*on):
    bits = np.zeros(SIZE, dtype=bool)
    bits[list(on)] = True
    return bits


@pytest.mark.parametrize("count", [2, 4, 7])
def test_no_choice_of_as_many_costs_less(forms, count):
    found = curvature.least(forms, count)
    every = [chosen(*on) for on in combinations(range(SIZE), count)]
    best = min(float(geometric(costs(forms, bits))) for bits in every)
    assert found.sum() == count
    assert geometric(costs(forms, found)) == pytest.approx(best)


def test_what_a_swap_costs(forms):
    bits = chosen(0, 3, 4)
    on, off = np.flatnonzero(bits), np.flatnonzero(~bits)
    after = curvature.swapped(curvature.units(forms), bits, on, off)
    for n, i in enumerate(on):
        for m, j in enumerate(off):
            moved = bits.copy()
            moved[i], moved[j] = False, True
            np.testing.assert_allclose(after[:, n, m], costs(forms, moved), rtol=1e-9)


def test_heads_that_stand_in_for_each_other_are_not_windowed_together(forms):
    alone = np.einsum("tnn->tn", curvature.units(forms)).mean(0)
    plain = lowest(alone, np.arange(SIZE), 4, SIZE)
    found = curvature.least(forms, 4)
    assert geometric(costs(forms, found)) < geometric(costs(forms, plain))


@pytest.mark.parametrize("count", range(SIZE + 1))
def test_the_ranking_ends_where_the_choice_does(forms, count):
    harm = curvature.harms(forms, count)
    assert np.isfinite(harm).all()
    again = lowest(harm, np.arange(SIZE), count, SIZE)
    assert np.array_equal(again, curvature.least(forms, count))


def test_ties_of_opposed_heads_stay_with_the_choice():
    """Heads that mend each other: to take one away costs more than to add a third."""
    form = np.eye(SIZE)
    form[0, 1] = form[1, 0] = -0.95
    harm = curvature.harms(form[None], 2)
    assert set(np.argsort(harm, kind="stable")[:2]) == {0, 1}


def test_many_slopes_give_the_form_itself(forms, rng):
    samples = rng.multivariate_normal(np.zeros(SIZE), forms[0], 20_000)
    np.testing.assert_allclose(curvature.shrunk(samples), forms[0], atol=0.1)


def test_few_slopes_of_independent_heads_show_no_pairs(rng):
    found = curvature.shrunk(rng.standard_normal((6, 40)))
    off = found[~np.eye(40, dtype=bool)]
    assert np.abs(off).max() < 0.1
    assert np.diag(found).min() > 0


@pytest.mark.parametrize("samples", [np.zeros((4, 3)), np.ones((1, 3))])
def test_nothing_to_learn_from(samples):
    found = curvature.shrunk(samples)
    np.testing.assert_array_equal(found, np.diag((samples**2).mean(0)))
    assert np.isfinite(curvature.harms(found[None], 2)).all()
