from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbs_compile.tuner.objective import FULL, U_MAX, Measured
from afbs_compile.tuner.rootfind import solve

TOLERANCE = 0.025
methods = st.sampled_from(["secant", "bisect"])
seeds = st.integers(0, 2**32 - 1)


class Recorded:
    """An evaluator of one argument that remembers what it said."""

    def __init__(self, site):
        self.site, self.said = site, []

    def __call__(self, u):
        measured = self.site(u, FULL)
        self.said.append((u.copy(), measured))
        return measured

    def holds(self, head, u, error, density):
        return any(
            (at[head], m.error[head], m.density[head]) == (u, error, density)
            for at, m in self.said
        )


def check(root, recorded, target):
    """What holds whatever the evaluator does."""
    for head in range(len(target)):
        seen = root.u[head], root.error[head], root.density[head]
        assert recorded.holds(head, *seen)
        assert root.feasible[head] == (root.error[head] <= target[head])
        assert root.feasible[head] or root.u[head] == U_MAX
    assert root.calls == len(recorded.said) == root.evaluations.max()


def drawn(landscape, seed, heads=6):
    site = landscape(seed, heads, hopeless=0.2, exact=0.2)
    rng = np.random.default_rng(seed)
    target = np.exp(rng.uniform(np.log(0.02), np.log(0.3), heads))
    start = rng.uniform(0.0, U_MAX, heads) if seed % 2 else None
    return site, target, start


@given(seed=seeds, method=methods)
def test_finds_the_least_feasible_u(landscape, seed, method):
    site, target, start = drawn(landscape, seed)
    site = replace(site, ripple=np.zeros(6))
    recorded = Recorded(site)
    root = solve(recorded, target, start=start, method=method, tolerance=TOLERANCE)
    check(root, recorded, target)
    assert np.all(root.width <= TOLERANCE * (1 + 1e-6))
    below = np.maximum(root.u - TOLERANCE - 1e-6, 0.0)
    still = site(below, FULL).error <= target
    assert not np.any(root.feasible & (root.u > TOLERANCE + 1e-6) & still)
    np.testing.assert_array_equal(root.feasible, site(np.full(6, U_MAX), FULL).error <= target)


@given(seed=seeds, method=methods, noise=st.floats(0.0, 1.0))
def test_noise_never_makes_an_infeasible_u_feasible(landscape, seed, method, noise):
    site, target, start = drawn(landscape, seed)
    rng = np.random.default_rng(seed)

    def noisy(u, fidelity):
        measured = site(u, fidelity)
        factor = np.exp(noise * rng.standard_normal(6))
        return Measured(measured.error * factor, measured.density)

    recorded = Recorded(noisy)
    root = solve(recorded, target, start=start, method=method)
    check(root, recorded, target)


@given(seed=seeds, method=methods, max_calls=st.integers(1, 8))
def test_few_calls_still_give_an_incumbent(landscape, seed, method, max_calls):
    site, target, start = drawn(landscape, seed)
    recorded = Recorded(site)
    root = solve(recorded, target, start=start, method=method, max_calls=max_calls)
    check(root, recorded, target)
    assert root.calls <= max_calls
    np.testing.assert_array_equal(root.feasible, site(np.full(6, U_MAX), FULL).error <= target)


@given(seed=seeds, method=methods)
def test_permuting_heads_permutes_the_roots(landscape, seed, method):
    site, target, start = drawn(landscape, seed)
    order = np.random.default_rng(seed).permutation(6)
    root = solve(lambda u: site(u, FULL), target, start=start, method=method)
    permuted = solve(
        lambda u: site.taken(order)(u, FULL),
        target[order],
        start=None if start is None else start[order],
        method=method,
    )
    for name in ("u", "error", "density", "feasible", "width", "evaluations"):
        np.testing.assert_array_equal(getattr(permuted, name), getattr(root, name)[order])


def population(landscape):
    site = landscape(0, 2000)
    target = np.exp(np.random.default_rng(0).uniform(np.log(0.03), np.log(0.15), 2000))
    return site, target, lambda u: site(u, FULL)


def test_warm_secant_needs_less_than_four_evaluations(landscape):
    _, target, evaluate = population(landscape)
    cold = solve(evaluate, target)
    start = cold.u + 0.1 * np.random.default_rng(1).standard_normal(2000)
    warm = solve(evaluate, target, start=start)
    assert warm.evaluations.mean() < 4.0
    assert cold.evaluations.mean() < 5.0
    assert max(warm.calls, cold.calls) <= 12


def test_bisection_needs_eight(landscape):
    _, target, evaluate = population(landscape)
    assert 7.0 <= solve(evaluate, target, method="bisect").evaluations.mean() <= 8.5


@pytest.mark.parametrize("start", [None, 0.1, 3.9])
def test_stairs_do_not_make_the_secant_crawl(start):
    rng = np.random.default_rng(0)
    width, phase, slope = rng.uniform(0.05, 1.0, 2000), rng.random(2000), rng.uniform(1, 2, 2000)
    target = rng.uniform(0.03, 0.15, 2000)

    def stairs(u):
        return Measured(np.exp(-slope * width * np.floor(u / width + phase)), 0.0 * u)

    root = solve(stairs, target, start=None if start is None else np.full(2000, start))
    assert np.all(root.width <= TOLERANCE * (1 + 1e-6))
    assert root.evaluations.mean() < 10.0


@pytest.mark.parametrize("method", ["secant", "bisect"])
def test_heads_without_error_need_no_mass(method):
    root = solve(lambda u: Measured(0.0 * u, 0.1 + 0.0 * u), np.array([0.1, 0.0]), method=method)
    assert root.feasible.all()
    assert np.all(root.u <= TOLERANCE)


def test_target_met_at_the_bottom_is_seen_at_once():
    root = solve(lambda u: Measured(0.01 * np.exp(-u), 0.0 * u), np.full(1, 0.1))
    assert root.u[0] == 0.0
    assert root.calls == 2


def test_hopeless_heads_are_told_soon():
    root = solve(lambda u: Measured(0.9 - 0.01 * u, 0.0 * u), np.full(1, 0.1))
    assert not root.feasible[0]
    assert (root.u[0], root.error[0]) == (U_MAX, 0.86)
    assert root.calls == 3


def test_target_of_zero_is_met_by_no_error_only():
    def evaluate(u):
        return Measured(np.where(u >= 1.3, 0.0, 0.2), 0.0 * u)

    root = solve(evaluate, np.zeros(1))
    assert root.feasible[0]
    assert 1.3 <= root.u[0] <= 1.3 + TOLERANCE


def test_measurements_that_are_no_numbers_name_the_head():
    def broken(u):
        return Measured(np.where(np.arange(4) == 2, np.nan, 0.1), 0.0 * u)

    with pytest.raises(ValueError, match="head 2"):
        solve(broken, np.full(4, 0.05))


@pytest.mark.parametrize(
    ("target", "options", "match"),
    [
        ([np.nan], {}, "target"),
        ([-0.1], {}, "target"),
        ([], {}, "target"),
        (0.1, {}, "target"),
        ([0.1], {"lo": 5.0}, "lo < hi"),
        ([0.1], {"tolerance": 0.0}, "tolerance"),
        ([0.1], {"max_calls": 0}, "max_calls"),
        ([0.1], {"start": np.zeros(2)}, "start"),
        ([0.1], {"start": np.array([np.nan])}, "start"),
        ([0.1], {"method": "newton"}, "method"),
    ],
)
def test_bad_arguments_are_refused(target, options, match):
    with pytest.raises(ValueError, match=match):
        solve(lambda u: Measured(0.0 * u, 0.0 * u), np.array(target), **options)


def test_another_number_of_heads_is_refused():
    with pytest.raises(ValueError, match="asked for 2 heads"):
        solve(lambda u: Measured(np.zeros(3), np.zeros(3)), np.full(2, 0.1))
