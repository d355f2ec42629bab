"""Every item is placed once; LPT keeps its bound; differencing is no worse where it counts."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbs_compile.tuner.assignment import (
    ASSIGNERS,
    karmarkar_karp,
    loads,
    lower_bound,
    lpt,
    members,
    snake,
)

costs = st.lists(st.floats(0.0, 100.0), min_size=0, max_size=40)
few = st.lists(st.integers(1, 20), min_size=1, max_size=7)
GREEDY = [lpt, karmarkar_karp]


def best(cost, bins):
    return min(
        loads(cost, np.array(where), bins).max()
        for where in itertools.product(range(bins), repeat=len(cost))
    )


@given(costs, st.integers(1, 9), st.sampled_from(sorted(ASSIGNERS)), st.booleans())
def test_every_item_is_in_one_bin(cost, bins, name, equal):
    where = ASSIGNERS[name](np.array(cost), bins, equal)
    assert where.shape == (len(cost),)
    assert sorted(itertools.chain(*members(where, bins))) == list(range(len(cost)))


@given(costs, st.integers(1, 9), st.sampled_from(GREEDY))
def test_equal_bins_differ_by_one_item_at_most(cost, bins, assign):
    count = np.bincount(assign(cost, bins, equal=True), minlength=bins)
    assert count.max() - count.min() <= 1


@given(st.lists(st.floats(0.1, 100.0), min_size=9, max_size=40), st.integers(1, 9),
       st.sampled_from(GREEDY), st.booleans())  # fmt: skip
def test_no_bin_is_empty_if_there_are_items_enough(cost, bins, assign, equal):
    assert np.bincount(assign(cost, bins, equal=equal), minlength=bins).min() >= 1


@given(few, st.integers(1, 3))
def test_lpt_keeps_its_bound(cost, bins):
    made = loads(cost, lpt(cost, bins), bins).max()
    assert made <= (4 / 3 - 1 / (3 * bins)) * best(cost, bins) + 1e-9


@given(costs, st.integers(1, 9), st.sampled_from(sorted(ASSIGNERS)))
def test_lower_bound_is_one(cost, bins, name):
    made = loads(cost, ASSIGNERS[name](np.array(cost), bins, True), bins).max(initial=0.0)
    assert lower_bound(cost, bins) <= made + 1e-9


def test_differencing_is_closer_to_the_bound_on_many_alike_items():
    rng = np.random.default_rng(0)
    over = dict.fromkeys(GREEDY, 0.0)
    for _ in range(20):
        cost = rng.uniform(0.5, 1.0, 32)
        for assign in GREEDY:
            over[assign] += loads(cost, assign(cost, 4), 4).max() / lower_bound(cost, 4) - 1
    assert over[karmarkar_karp] < 0.5 * over[lpt]


def test_lpt_beats_sorting_on_a_long_tail():
    rng = np.random.default_rng(0)
    cost = rng.lognormal(0.0, 2.0, 64)
    makespan = [loads(cost, assign(cost, 8), 8).max() for assign in (lpt, snake)]
    assert makespan[0] <= makespan[1]


@given(costs, st.integers(1, 9), st.sampled_from(GREEDY), st.booleans())
def test_scaling_costs_changes_nothing(cost, bins, assign, equal):
    where = assign(cost, bins, equal=equal)
    np.testing.assert_array_equal(where, assign(np.array(cost) * 4.0, bins, equal=equal))


@pytest.mark.parametrize("bad", [[-1.0], [float("nan")], [[1.0]]])
def test_what_is_no_cost_is_refused(bad):
    with pytest.raises(ValueError, match="finite"):
        lpt(bad, 2)
    with pytest.raises(ValueError, match="bins"):
        lpt([1.0], 0)
