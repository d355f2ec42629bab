import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbs_compile.tuner.backoff import ROUNDS, STEP, back_off
from afbs_compile.tuner.objective import FULL, U_MAX
from afbs_compile.tuner.trace import Trace, Traced


@given(seed=st.integers(0, 2**32 - 1), cap=st.floats(0.02, 0.3))
def test_heads_hold_the_cap_or_are_dense(landscape, seed, cap):
    site = landscape(seed, 6, hopeless=0.2)
    before = np.random.default_rng(seed).uniform(0.0, U_MAX, 6)
    trace = Trace()
    u, measured, dense = back_off(Traced(site, trace, "site"), before, cap, FULL)
    np.testing.assert_array_equal(measured.error, site(u, FULL).error)
    np.testing.assert_array_equal(dense, measured.error > cap)
    held = site(before, FULL).error <= cap
    np.testing.assert_array_equal(u[held], before[held])
    assert np.all((u >= before) & (u <= np.minimum(before + ROUNDS * STEP + 1e-9, U_MAX)))
    assert 1 <= trace.calls <= ROUNDS + 1
    assert trace.calls == 1 or not held.all()


def test_no_more_is_backed_off_than_needed(landscape):
    site = landscape(0, 4)
    before = np.full(4, 1.0)
    cap = site(before + 0.15, FULL).error
    u, _, dense = back_off(site, before, cap, FULL)
    np.testing.assert_allclose(u, before + 0.2)
    assert not dense.any()


def test_u_stays_in_its_range(landscape):
    u, _, dense = back_off(landscape(0, 2, hopeless=1.0), np.array([3.95, 4.0]), 0.1, FULL)
    np.testing.assert_array_equal(u, U_MAX)
    assert dense.all()


@pytest.mark.parametrize("cap", [np.inf, np.full(3, np.inf)])
def test_without_a_cap_one_call_is_enough(landscape, cap):
    trace = Trace()
    u, _, dense = back_off(Traced(landscape(0, 3), trace, "site"), np.zeros(3), cap, FULL)
    assert trace.calls == 1
    assert not u.any()
    assert not dense.any()
