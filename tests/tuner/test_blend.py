"""Do mixes keep the cap and the budget, and are their ends what they are mixed of?"""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from afbs_compile.tuner.allocate import allocate_at_price
from afbs_compile.tuner.blend import Mix, first_reaching

POINTS = 41


def mix(seed, cap=0.2, alike=0.5, heads=12, hopeless=0.1):
    """Random falling error and rising density of some heads, a few of which never keep the cap."""
    rng = np.random.default_rng(seed)
    u = np.linspace(0.0, 4.0, POINTS)
    scale, slope = rng.uniform(0.2, 1.0, (heads, 1)), rng.uniform(0.5, 3.0, (heads, 1))
    error = scale * np.exp(-slope * u) + np.where(rng.uniform(size=(heads, 1)) < hopeless, 0.5, 0)
    density = 1.0 - (1.0 - rng.uniform(0.05, 0.2, (heads, 1))) * np.exp(-0.7 * u)
    return Mix(error, density, rng.uniform(0.3, 2.0, heads), cap, alike)


seeds = st.integers(0, 1 << 30)
prices = st.floats(-3.0, 4.0).map(lambda x: 10.0**x)


@given(seeds, prices, st.floats(0.0, 1.0))
def test_the_cap_holds_and_only_hopeless_heads_are_dense(seed, price, alike):
    one = mix(seed, alike=alike)
    index = one.at(price)
    assert np.array_equal(index < 0, one.hopeless)
    sparse = np.flatnonzero(index >= 0)
    assert np.all(one.error[sparse, index[sparse]] <= one.cap)


@given(seeds, prices)
def test_ends_of_the_mix(seed, price):
    """Share 0 is equal marginal error, share 1 one u for all that the cap does not push up."""
    own = mix(seed, alike=0.0)
    weight = own.weight
    given_ = allocate_at_price(weight[:, None] * own.error, own.density, weight * own.cap, price)
    taken = ~given_.dense
    assert np.array_equal(own.at(price)[taken], given_.index[taken])
    alike = mix(seed, alike=1.0)
    index = alike.at(price)
    pushed = index == (alike.error <= alike.cap).argmax(1)
    free = index[(index >= 0) & ~pushed]
    assert len(set(free.tolist())) <= 1


@given(seeds, st.floats(0.0, 0.3), st.floats(0.0, 1.0))
def test_the_least_price_keeps_the_budget(seed, budget, alike):
    one = mix(seed, alike=alike, hopeless=0.0)
    price = one.least_price(budget)
    least_possible = one.mean_error(np.full(len(one.error), POINTS - 1))
    if budget >= 1.05 * least_possible:
        assert one.mean_error(one.at(price)) <= budget


@given(seeds, st.floats(0.0, 1.2))
def test_first_reaching(seed, mean):
    density = mix(seed).density
    at = first_reaching(density, mean)
    assert at == POINTS - 1 or density[:, at].mean() >= mean
    assert at == 0 or density[:, at - 1].mean() < mean
