"""Density estimates learn by source, only at a commit, and the same from any split over ranks."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbs_compile.tuner.densities import DensityEstimates

SOURCES = [0, 1, 1, 0]


def made():
    return DensityEstimates(np.full(4, 0.4), np.array(SOURCES))


def test_nothing_changes_before_a_commit():
    estimates = made()
    estimates.observe([0], 0.1)
    np.testing.assert_array_equal(estimates(), 0.4)
    estimates.commit()
    assert estimates()[3] < 0.4 == estimates()[1]


def test_converges_to_what_is_seen():
    estimates = made()
    for _ in range(100):
        estimates.observe([1, 2], [0.2, 0.3])
        estimates.commit()
    np.testing.assert_allclose(estimates()[[1, 2]], 0.25, rtol=1e-3)


seen = st.lists(st.tuples(st.integers(0, 3), st.floats(0.01, 1.0)), max_size=20)


@given(seen, st.integers(0, 20))
def test_ranks_sum_to_one_process(observed, split):
    one, *ranks = made(), made(), made()
    for n, (sample, density) in enumerate(observed):
        for estimates in (one, ranks[n < split]):
            estimates.observe([sample], density)
    total = sum(rank.pending for rank in ranks)
    one.commit()
    for rank in ranks:
        rank.commit(total)
        np.testing.assert_allclose(rank(), one(), rtol=1e-12)
        assert not rank.pending.any()


@given(st.sampled_from([np.nan, -1.0, 0.0, 1.5, np.inf]))
def test_what_is_no_density_is_left_out(bad):
    estimates = made()
    estimates.observe([0, 1], [bad, bad])
    estimates.commit()
    np.testing.assert_array_equal(estimates(), 0.4)


def test_state_round_trip():
    estimates, other = made(), made()
    estimates.observe([0, 1], 0.3)
    estimates.commit()
    estimates.observe([2], 0.1)
    other.load_state_dict(json.loads(json.dumps(estimates.state_dict())))
    estimates.commit()
    other.commit()
    np.testing.assert_array_equal(estimates(), other())


def test_another_data_set_is_refused():
    with pytest.raises(ValueError, match="another"):
        made().load_state_dict(DensityEstimates(np.full(3, 0.4)).state_dict())
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        DensityEstimates(np.array([0.0]))
    with pytest.raises(ValueError, match="one"):
        DensityEstimates(np.array([0.5, 0.5]), np.array([0]))
    with pytest.raises(ValueError, match="shape"):
        made().commit(np.zeros((1, 2)))
