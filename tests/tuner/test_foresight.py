"""Are swaps foreseen as they are, and forms put right by evaluations?"""

import numpy as np
import pytest

from afbs_compile.tuner.curvature import units
from afbs_compile.tuner.foresight import Foresight, View, views
from afbs_compile.tuner.relative import FLOOR, geometric

SIZE, COUNT = 12, 5


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def world(rng):
    """Two tasks whose heads cost more or less than their forms say."""
    scale = np.exp(0.5 * rng.standard_normal((2, SIZE)))
    forms = np.array([np.diag(x) + 0.3 * np.outer(x, x) for x in scale])
    parts = 0.2 * rng.standard_normal((2, SIZE))

    def costs(batch):
        z = np.array(batch, dtype=float)
        told = np.einsum("ni,tij,nj->tn", z, forms, z) / forms.sum((1, 2))[:, None]
        return (told + FLOOR) * np.exp(parts @ z.T) - FLOOR

    return Foresight(units(forms), costs, geometric), parts


def choices(rng, count):
    return np.array([rng.permutation(np.arange(SIZE) < COUNT) for _ in range(count)])


def test_swaps_are_what_their_choices_cost(world, rng):
    foresight, parts = world
    view = View(foresight, np.array([0.1, -0.2]), parts)
    (bits,) = choices(rng, 1)
    on, off = np.flatnonzero(bits), np.flatnonzero(~bits)
    losses = view.swaps(bits, on, off)
    for n, i in enumerate(on):
        for m, j in enumerate(off):
            other = bits.copy()
            other[i], other[j] = False, True
            assert losses[n, m] == pytest.approx(view.loss(other), rel=1e-9)


def test_a_descent_ends_where_no_swap_of_free_bits_gains(world, rng):
    foresight, parts = world
    view = View(foresight, np.zeros(2), parts)
    (bits,) = choices(rng, 1)
    free = np.arange(SIZE - 3)
    end = view.descent(bits, free, SIZE)
    assert end.sum() == COUNT
    assert np.array_equal(end[SIZE - 3 :], bits[SIZE - 3 :])
    on, off = free[end[free]], free[~end[free]]
    assert view.loss(end) <= view.swaps(end, on, off).min()
    assert view.loss(end) < view.loss(bits)
    assert (view.descent(bits, free, 1) != bits).sum() == 2
    assert np.array_equal(view.descent(bits, free[:0], 9), bits)


def test_evaluations_tell_the_parts(world, rng):
    foresight, _ = world
    known, fresh = choices(rng, 60), choices(rng, 200)
    true = geometric(foresight.costs(fresh))
    centre = known[int(np.argmin(geometric(foresight.costs(known))))]

    def error(samples):
        told = np.mean([[np.log(view.loss(one)) for one in fresh] for view in samples], 0)
        return np.std(told - np.log(true))

    before = error([foresight.plain(list(known[:1]))])
    after = error(views(foresight, known, centre, rng, 16))
    assert after < 0.3 * before
    few = error(views(foresight, known[:1], known[0], rng, 64))
    assert few < 1.3 * before  # one evaluation spoils nothing


def test_the_incumbent_is_foreseen_exactly(world, rng):
    foresight, _ = world
    known = choices(rng, 8)
    for view in views(foresight, known, known[3], rng, 3):
        assert view.loss(known[3]) == pytest.approx(geometric(foresight.costs(known[3:4]))[0])
