"""Does a loss mind the task in which a ranking is exceeded?"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbs_compile.tuner.relative import FLOOR, MARGIN, geometric, relative

COSTS = st.lists(st.floats(1e-3, 10.0), min_size=3, max_size=3)


@given(COSTS, COSTS, st.floats(1.01, 2.0), st.integers(0, 2))
def test_it_grows_with_every_cost(costs, references, factor, task):
    more = np.array(costs)
    more[task] *= factor
    before, after = relative(np.array([costs, more]).T, np.array(references))
    assert after > before > 0


def test_units_are_those_of_the_references():
    references = np.array([0.1, 0.003])
    np.testing.assert_allclose(
        relative(0.7 * references, references), relative(0.7 * 10 * references, 10 * references),
        rtol=0.02,
    )  # fmt: skip


def test_below_all_references_the_geometric_mean_decides():
    references = np.ones(2)
    even, uneven = np.array([0.5, 0.5]), np.array([0.25, 0.9])
    assert relative(uneven, references) < relative(even, references)
    assert geometric(uneven) < geometric(even)
    exceeded = np.array([0.2, 1.1])
    assert geometric(exceeded) < geometric(even)
    assert relative(exceeded, references) > relative(even, references)


def test_free_costs_the_floor():
    assert geometric(np.zeros(3)) == pytest.approx(FLOOR)
    assert relative(np.zeros(2), np.full(2, 1.0)) == pytest.approx(FLOOR, rel=1e-3)
    assert relative(np.ones(2), np.ones(2)) == pytest.approx(np.exp(8 * MARGIN))
