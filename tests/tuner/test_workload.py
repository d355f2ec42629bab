"""Visible blocks are what a dense causal mask shows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbs_compile.tuner.workload import sample_costs, visible_blocks


def counted(length, block_m, block_n):
    causal = np.tril(np.ones((length, length), dtype=bool))
    rows = range(0, length, block_m)
    return sum(
        causal[i : i + block_m, j : j + block_n].any()
        for i in rows
        for j in range(0, length, block_n)
    )


@given(st.integers(1, 200), st.integers(1, 3), st.sampled_from([4, 8, 16]))
def test_visible_blocks_are_those_of_the_mask(length, factor, block_n):
    expected = counted(length, factor * block_n, block_n)
    assert visible_blocks([length], factor * block_n, block_n) == [expected]


def test_blocks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="multiple"):
        visible_blocks([10], 96, 64)


def test_costs_rise_with_density_and_length():
    lengths = np.array([1000.0, 2000.0])
    costs = sample_costs(lengths, visible_blocks(lengths), [0.5, 0.5], None)
    assert costs[1] > 2 * costs[0]
    assert (sample_costs(lengths, visible_blocks(lengths), [0.6, 0.6], None) > costs).all()
