import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from afbs_compile.tuner.incumbent import Incumbent, best_of
from afbs_compile.tuner.objective import U_MAX, Measured


@given(seed=st.integers(0, 10**6), points=st.integers(0, 8))
def test_the_best_is_feasible_and_of_least_density(seed, points):
    rng = np.random.default_rng(seed)
    target = np.where(rng.random(5) < 0.2, 0.0, 0.5)
    u, level = rng.uniform(0, 4, (points, 5)), rng.integers(0, 3, (points, 5))
    error, density = rng.random((points, 5)) - 0.0, rng.random((points, 5))
    told = iter(zip(error, density, strict=True))
    found = best_of(lambda *_: Measured(*next(told)), zip(u, level, strict=True), target)
    for head in range(5):
        good = [n for n in range(points) if error[n, head] <= target[head] and target[head] > 0]
        assert found.feasible[head] == bool(good)
        if good:
            n = min(good, key=lambda n: density[n, head])
            assert (found.u[head], found.level[head]) == (u[n, head], level[n, head])
            assert (found.error[head], found.density[head]) == (error[n, head], density[n, head])


def test_nothing_measured_is_dense():
    found = Incumbent.none(np.full(3, 0.1)).found
    assert not found.feasible.any()
    assert np.all(found.u == U_MAX)
    assert np.all(found.density == 1.0)
