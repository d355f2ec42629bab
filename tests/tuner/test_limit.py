"""Is the price the least one that keeps the limit, and does what is returned keep it?"""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbs_compile.tuner.limit import MAX_CALLS, PRICES, TOLERANCE, Limit, least_price

damages = st.tuples(st.floats(-3.0, 1.0), st.floats(0.2, 3.0), st.floats(-0.3, 0.3))


def line(intercept, slope, bend):
    """Log10 damage over log10 price: a falling line with a bend."""
    return lambda price: (
        10.0
        ** (intercept - slope * math.log10(price) - bend * slope * math.sin(math.log10(price)))
    )


@given(damages, st.floats(1e-4, 1.0))
def test_the_least_price_that_keeps_the_limit(law, most):
    damage, asked = line(*law), []

    def measured(price):
        asked.append(price)
        return damage(price)

    best = least_price(lambda price: price, Limit(most, measured))
    assert len(asked) <= MAX_CALLS
    if damage(PRICES[1]) > most:
        assert best is None
        return
    assert best in asked
    assert damage(best) <= most
    below = best / 10.0 ** (1.01 * TOLERANCE)
    assert below < PRICES[0] or damage(below) > most or len(asked) == MAX_CALLS


@given(st.lists(st.floats(0.0, 2.0), min_size=MAX_CALLS, max_size=MAX_CALLS))
def test_what_is_returned_was_measured_to_keep_the_limit(noise):
    """Whatever is measured: perplexity on a short text is no smooth function of anything."""
    values = iter(noise)
    seen = {}

    def measured(price):
        seen[price] = next(values)
        return seen[price]

    best = least_price(lambda price: price, Limit(1.0, measured))
    if best is None:
        assert all(value > 1.0 for value in seen.values())
    else:
        assert seen[best] <= 1.0


def test_no_damage_at_all_takes_the_lowest_price():
    best = least_price(lambda price: price, Limit(0.5, lambda price: 0.0))
    assert best == pytest.approx(PRICES[0])
