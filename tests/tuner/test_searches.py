"""Strategies side by side on the same sites: what each finds, and what it says that it cost."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from afbs_compile.tuner.grid import TAUS
from afbs_compile.tuner.landscape import landscape_of
from afbs_compile.tuner.objective import FULL, U_MAX, QueryBlocks, SequenceLength, tau_of_u
from afbs_compile.tuner.prior import Prior
from afbs_compile.tuner.random_search import DRAWS
from afbs_compile.tuner.sparge import NARROW, SHARE
from afbs_compile.tuner.strategies import STRATEGIES, strategy_of
from afbs_compile.tuner.strategy import Goal, SitePlan
from afbs_compile.tuner.trace import Trace, Traced
from afbs_compile.tuner.tune import tune

LEVELS = 5  # of the synthetic sites
GOAL, LOW = Goal(0.1), QueryBlocks(0.125)


def refined(name, site, goal=GOAL, low=LOW):
    """What a strategy that explores nothing finds, and its trace."""
    trace = Trace()
    strategy = strategy_of(name, goal, low, FULL)
    plan = SitePlan.at_zero(np.full(site.heads, goal.cap))
    return strategy.refine(Traced(site, trace, "site"), plan), trace


@settings(max_examples=12)
@given(seed=st.integers(0, 10**6), name=st.sampled_from(sorted(STRATEGIES)))
def test_cap_holds_with_lambda_on_what_was_measured_and_on_validation(leveled, seed, name):
    sites = {f"layer{i}": leveled(seed + i, 4, hopeless=0.15, exact=0.1) for i in range(2)}
    others = {site: heads.shifted(0.3) for site, heads in sites.items()}
    prior = None
    if name == "afbs-bo":
        prior = Prior.of([landscape_of(leveled(seed + 9, 5), FULL)], GOAL.max_error)
    result = tune(sites, GOAL, name, prior=prior, validation=others)
    for inputs in (sites, others):
        for site, evaluator in inputs.items():
            found = result.sites[site]
            measured, sparse = evaluator(found.u, FULL, found.level), ~found.dense
            assert np.all(measured.error[sparse] <= GOAL.max_error)
            assert np.all(found.error[sparse] >= measured.error[sparse] - 1e-15)
            assert np.all(found.density[sparse] >= measured.density[sparse] - 1e-15)
            assert np.all(found.u[found.dense] == U_MAX)
            assert np.all(found.level[found.dense] == 0)
            np.testing.assert_array_equal(found.lambda_, np.array(evaluator.lambdas)[found.level])


@given(seed=st.integers(0, 10**6))
def test_no_strategy_beats_one_pass_on_the_grid(profiled, seed):
    site = profiled(seed, 6, hopeless=0.1)
    trace = Trace()
    best = tune({"site": site}, GOAL, "one-pass", trace=trace).sites["site"]
    dense = landscape_of(site, FULL)
    exhaustive = dense.best(np.full(6, GOAL.cap))
    np.testing.assert_array_equal(best.dense, ~exhaustive.feasible)
    np.testing.assert_array_equal(
        best.density, np.where(exhaustive.feasible, exhaustive.density, 1.0)
    )
    feasible = dense.error <= GOAL.cap
    assert np.all(best.density[:, None, None] <= np.where(feasible, dense.density, 1.0))


def test_one_pass_costs_its_profile_and_nothing_else(profiled, leveled):
    trace = Trace()
    sites = {f"layer{i}": profiled(i, 4) for i in range(3)}
    tune(sites, GOAL, "one-pass", trace=trace)
    assert (trace.evaluations, trace.cost) == (0, 3 * 4.5)
    honest = Trace()
    tune({"site": leveled(0, 4)}, GOAL, "one-pass", trace=honest)
    assert honest.points(FULL) == 4 * LEVELS * 161


def test_one_pass_spends_a_budget_where_it_buys_most(profiled):
    sites = {f"layer{i}": profiled(i, 9) for i in range(6)}
    goal = Goal(0.2, 0.05)
    best = tune(sites, goal, "one-pass")
    assert 0.98 * goal.mean_error <= best.mean_error <= goal.mean_error
    assert best.mean_density < tune(sites, goal, "sparge").mean_density


@given(seed=st.integers(0, 10**6))
def test_grid_is_the_best_of_all_its_points(leveled, seed):
    site = leveled(seed, 4, hopeless=0.2)
    found, trace = refined("grid", site)
    assert trace.points() == trace.points(FULL) == 4 * LEVELS * len(TAUS)
    errors, densities = (
        np.array([getattr(row, name) for row in trace.rows]) for name in ("error", "density")
    )
    allowed = np.where(errors <= GOAL.cap, densities, 1.0)
    np.testing.assert_array_equal(found.feasible, (errors <= GOAL.cap).any(0))
    np.testing.assert_array_equal(found.density, allowed.min(0))


def test_random_draws_are_the_seeds(leveled):
    site = leveled(0, 4)
    first, again = (refined("random", site, Goal(0.1, seed=3))[1] for _ in range(2))
    other = refined("random", site, Goal(0.1, seed=4))[1]
    assert first == again
    assert first.rows[0].u != other.rows[0].u
    assert first.points() == 4 * DRAWS
    assert {z for row in first.rows for z in row.level} == set(range(LEVELS))


@given(seed=st.integers(0, 10**6))
def test_sparge_finds_the_least_tau_and_then_the_strictest_lambda(leveled, seed):
    site = leveled(seed, 5)
    found, trace = refined("sparge", site)
    cap = GOAL.cap
    assert 10 <= trace.calls <= 10 + 4
    for head in np.flatnonzero(found.feasible):
        u = np.full(5, found.u[head])
        assert site(u, FULL).error[head] < SHARE * cap
        tau = tau_of_u(found.u[head]) - 2 * NARROW
        if tau > 0.0:
            below = np.full(5, -np.log10(1.0 - tau))
            wave = site.base.ripple[head]  # errors are monotone but for it
            assert site(below, FULL).error[head] >= SHARE * cap * np.exp(-3.0 * wave)
        assert found.error[head] == site(u, FULL, found.level).error[head] < cap
        if found.level[head] + 1 < LEVELS:
            assert site(u, FULL, found.level + (found.level < LEVELS - 1)).error[head] >= cap
        assert found.density[head] <= 0.9


def test_the_papers_recipe_explores_short_and_bisects_long(leveled):
    low = SequenceLength(0.25)
    found, trace = refined("afbs-bo-paper", leveled(2, 6), low=low)
    fidelities = [row.fidelity for row in trace.rows]
    assert fidelities[:16] == [low] * 16
    assert set(fidelities[16:]) == {FULL}
    assert found.feasible.all()
    assert np.all(found.error <= GOAL.cap)
    assert trace.points(FULL) <= 6 * 2 * 7
    best = landscape_of(leveled(2, 6), FULL).best(np.full(6, GOAL.cap))
    assert found.density.mean() < best.density.mean() + 0.08


def test_the_papers_recipe_goes_on_where_its_regions_hold_nothing(leveled):
    class Misleading:
        """Short sequences look far better than long ones."""

        heads, lambdas = 4, leveled(0, 4).lambdas

        def __call__(self, u, fidelity, level=None):
            site = leveled(0, 4) if fidelity == FULL else leveled(0, 4).shifted(-2.5)
            return site(u, fidelity, level)

    found, _ = refined("afbs-bo-paper", Misleading())
    assert found.feasible.all()
