from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbs_compile.tuner.allocate import allocate, allocate_at_price

CAP = 0.55


def problem(seed, heads, grid, coarse):
    """Monotone curves; coarse ones have many ties, and corners off the convex hull."""
    rng = np.random.default_rng(seed)
    error = -np.sort(-rng.random((heads, grid)), axis=1)
    density = np.sort(rng.random((heads, grid)), axis=1)
    return (
        (np.round(4.0 * error) / 4.0, np.round(4.0 * density) / 4.0)
        if coarse
        else (error, density)
    )


def every_choice(error, density):
    """Total error and density of every allowed choice of all heads, dense ones included."""
    options = [
        [(0.0, 1.0), *((e, d) for e, d in zip(*curves, strict=True) if e <= CAP)]
        for curves in zip(error, density, strict=True)
    ]
    return np.array([np.sum(choice, axis=0) for choice in product(*options)])


problems = given(
    seed=st.integers(0, 2**32 - 1),
    heads=st.integers(1, 4),
    grid=st.integers(1, 4),
    coarse=st.booleans(),
    budget=st.floats(0.0, 0.6),
)


@problems
def test_never_exceeds_budget_or_cap(seed, heads, grid, coarse, budget):
    error, density = problem(seed, heads, grid, coarse)
    given_ = allocate(error, density, CAP, budget)
    assert given_.error.mean() <= budget
    assert np.all(given_.error <= CAP)
    for head, index in enumerate(given_.index):
        expected = (0.0, 1.0) if index < 0 else (error[head, index], density[head, index])
        assert (given_.error[head], given_.density[head]) == expected


@problems
def test_nothing_with_as_little_error_is_sparser(seed, heads, grid, coarse, budget):
    error, density = problem(seed, heads, grid, coarse)
    given_ = allocate(error, density, CAP, budget)
    choices = every_choice(error, density)
    rivals = choices[choices[:, 0] <= given_.error.sum() + 1e-12]
    assert given_.density.sum() <= rivals[:, 1].min() + 1e-9


@problems
def test_within_one_head_of_the_optimum(seed, heads, grid, coarse, budget):
    error, density = problem(seed, heads, grid, coarse)
    given_ = allocate(error, density, CAP, budget)
    choices = every_choice(error, density)
    best = choices[choices[:, 0] <= budget * heads, 1].min()
    one_head = (1.0 - density.min(1)).max()
    assert given_.density.sum() <= best + one_head + 1e-9


@given(seed=st.integers(0, 2**32 - 1), coarse=st.booleans(), price=st.floats(0.0, 50.0))
def test_at_a_price_no_choice_is_cheaper(seed, coarse, price):
    error, density = problem(seed, 3, 4, coarse)
    given_ = allocate_at_price(error, density, CAP, price)
    choices = every_choice(error, density)
    ours = given_.density.sum() + price * given_.error.sum()
    assert ours == pytest.approx((choices[:, 1] + price * choices[:, 0]).min(), abs=1e-9)
    assert given_.price == price


@problems
def test_the_price_found_is_the_price_of_the_choice(seed, heads, grid, coarse, budget):
    error, density = problem(seed, heads, grid, coarse)
    given_ = allocate(error, density, CAP, budget)
    if np.isfinite(given_.price):
        dual = allocate_at_price(error, density, CAP, given_.price)
        cost, least = (a.density + given_.price * a.error for a in (given_, dual))
        np.testing.assert_allclose(cost, least, atol=1e-9)
        assert given_.density.sum() <= dual.density.sum() + 1e-12


@given(seed=st.integers(0, 2**32 - 1), budget=st.floats(0.05, 0.3))
def test_the_price_is_found_to_rounding(seed, budget):
    error, density = problem(seed, 40, 20, coarse=False)
    given_ = allocate(error, density, CAP, budget)
    dual = allocate_at_price(error, density, CAP, given_.price)
    assert np.count_nonzero(given_.index != dual.index) <= 1
    assert allocate_at_price(error, density, CAP, given_.price * (1 - 1e-9)).error.mean() > budget


@given(seed=st.integers(0, 2**32 - 1), low=st.floats(0.0, 20.0), high=st.floats(0.0, 20.0))
def test_a_higher_price_buys_less_error(seed, low, high):
    error, density = problem(seed, 6, 8, coarse=False)
    low, high = sorted((low, high))
    cheap, dear = (allocate_at_price(error, density, CAP, p) for p in (low, high))
    assert dear.error.sum() <= cheap.error.sum() + 1e-12
    assert dear.density.sum() >= cheap.density.sum() - 1e-12


def test_equal_heads_share_the_budget_one_by_one():
    error = np.tile([0.5, 0.1], (10, 1))
    density = np.tile([0.2, 0.6], (10, 1))
    given_ = allocate(error, density, 1.0, 0.3)
    assert np.count_nonzero(given_.index == 0) == 5
    assert given_.error.mean() <= 0.3


def test_hopeless_heads_are_dense():
    error, density = np.array([[0.9, 0.8], [0.5, 0.1]]), np.array([[0.1, 0.2], [0.1, 0.2]])
    given_ = allocate(error, density, 0.5, None)
    np.testing.assert_array_equal(given_.dense, [True, False])
    np.testing.assert_array_equal(given_.index, [-1, 0])
    assert given_.price == 0.0


def test_a_cap_a_head():
    error, density = np.array([[0.5, 0.1]] * 2), np.array([[0.1, 0.2]] * 2)
    given_ = allocate(error, density, np.array([0.6, 0.2]), None)
    np.testing.assert_array_equal(given_.index, [0, 1])


def test_no_budget_leaves_only_what_is_exact():
    error, density = np.array([[0.5, 0.0], [0.5, 1e-30]]), np.array([[0.1, 0.2]] * 2)
    given_ = allocate(error, density, 1.0, 0.0)
    np.testing.assert_array_equal(given_.index, [1, -1])
    assert given_.error.sum() == 0.0


def test_free_accuracy_is_taken():
    given_ = allocate(np.array([[0.5, 0.1]]), np.array([[0.2, 0.2]]), 1.0, None)
    assert given_.index[0] == 1


@given(seed=st.integers(0, 2**32 - 1), budget=st.floats(0.05, 0.5))
def test_permuting_heads_permutes_the_allocation(seed, budget):
    error, density = problem(seed, 6, 8, coarse=False)
    order = np.random.default_rng(seed).permutation(6)
    given_, permuted = (
        allocate(e, d, CAP, budget) for e, d in ((error, density), (error[order], density[order]))
    )
    np.testing.assert_array_equal(permuted.index, given_.index[order])


@pytest.mark.parametrize(
    ("error", "budget", "match"),
    [
        (np.zeros((2, 3)), 0.1, r"need \[heads, grid\]"),
        (np.zeros(2), 0.1, r"need \[heads, grid\]"),
        (np.full((2, 2), np.nan), 0.1, "finite"),
        (np.zeros((2, 2)), -0.1, "mean_error"),
        (np.zeros((2, 2)), np.nan, "mean_error"),
    ],
)
def test_bad_arguments_are_refused(error, budget, match):
    with pytest.raises(ValueError, match=match):
        allocate(error, np.zeros((2, 2)), 1.0, budget)


@pytest.mark.parametrize("price", [-1.0, np.nan])
def test_bad_price_is_refused(price):
    with pytest.raises(ValueError, match="price"):
        allocate_at_price(np.zeros((1, 1)), np.zeros((1, 1)), 1.0, price)
