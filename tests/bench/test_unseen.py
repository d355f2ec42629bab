"""Are the heads that break the bound on unseen windows counted as they should be?"""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbs_compile.bench import unseen
from afbs_compile.tuner.objective import Measured

U = np.linspace(0, 4, 41)


class Window:
    """Heads whose error is scale × 10^(−u)."""

    def __init__(self, *scales):
        self.scales = np.array(scales)
        self.heads = len(scales)

    def __call__(self, u, fidelity, level=None):
        return Measured(self.scales * 10.0**-u, u / 4)


def found(*windows):
    sites = {"a": SimpleNamespace(windows=[Window(*scales) for scales in windows])}
    return list(unseen.rows(*unseen.curves(sites, U), (0.1,)))


def test_equal_windows_break_nothing():
    assert all(
        row["heldout_over"] == 0 for row in found((1.0, 2.0), (1.0, 2.0), (1.0, 2.0), (1.0, 2.0))
    )


def test_a_harder_window_breaks_it_whenever_it_is_not_calibrated_on():
    rows = found((1.0,), (1.0,), (1.0,), (8.0,))
    one, two, three = (r for r in rows if r["margin"] == 1.0)
    # three of four choices of one window leave the hard one among the three others
    assert one["heldout_over"] == pytest.approx(3 / 4 / 3)
    assert two["heldout_over"] == pytest.approx(1 / 2 / 2)
    assert three["heldout_over"] == pytest.approx(1 / 4)
    assert one["heldout_over_1_1"] == one["heldout_over"]
    assert [one["choices"], two["choices"], three["choices"]] == [4, 6, 4]


@given(
    scales=st.lists(st.lists(st.floats(0.01, 5), min_size=2, max_size=2), min_size=4, max_size=5)
)
def test_a_margin_costs_blocks_and_breaks_less(scales):
    rows = found(*map(tuple, scales))
    for count in (1, 2, 3):
        alike = [row for row in rows if row["documents"] == count]
        for wide, narrow in pairwise(alike):
            assert narrow["margin"] < wide["margin"]
            assert narrow["density"] >= wide["density"]
            assert narrow["heldout_over"] <= wide["heldout_over"]


def test_the_least_threshold_that_stays_below():
    error = np.array([[0.5, 0.1], [0.2, 0.3], [0.1, 0.1], [0.05, 0.1]])
    assert list(unseen.least(error, 0.1)) == [2, 2]
    assert list(unseen.least(error, 0.01)) == [3, 3]
    assert list(unseen.least(error, 1.0)) == [0, 0]
