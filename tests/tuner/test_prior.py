import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afbs_compile.tuner.curves import GRID
from afbs_compile.tuner.improve import COARSE, SECANT_CALLS, STEPS, Search
from afbs_compile.tuner.landscape import Landscape, landscape_of
from afbs_compile.tuner.objective import FULL, U_MAX
from afbs_compile.tuner.prior import Family, Prior, left_out, points
from afbs_compile.tuner.rootfind import solve
from afbs_compile.tuner.strategies import strategy_of
from afbs_compile.tuner.strategy import Goal
from afbs_compile.tuner.trace import Trace, Traced
from afbs_compile.tuner.tune import tune

CAP = 0.09


@pytest.fixture(scope="module")
def prior(leveled):
    return Prior.of([landscape_of(leveled(seed, 9), FULL) for seed in (500, 501)], 0.1)


def test_a_landscape_is_what_its_evaluator_says(leveled):
    site = leveled(0, 3)
    dense = landscape_of(site, FULL)
    for z, n in ((0, 0), (4, 160), (2, 77)):
        measured = site(np.full(3, GRID[n]), FULL, np.full(3, z))
        np.testing.assert_array_equal(dense.error[:, z, n], measured.error)
        np.testing.assert_array_equal(dense.density[:, z, n], measured.density)


@given(seed=st.integers(0, 10**6))
def test_the_optimum_of_a_landscape_is_feasible_and_no_point_is_better(seed):
    rng = np.random.default_rng(seed)
    shape = (4, 2, len(GRID))
    dense = Landscape((-np.inf, -3.0), rng.random(shape), rng.random(shape))
    target = np.array([0.5, 1e-3, 0.0, 2.0])
    best = dense.best(target)
    allowed = (dense.error <= target[:, None, None]) & (target > 0.0)[:, None, None]
    np.testing.assert_array_equal(best.feasible, allowed.any((1, 2)))
    least = np.where(allowed, dense.density, np.inf).min((1, 2))
    np.testing.assert_array_equal(best.density[best.feasible], least[best.feasible])
    n = np.searchsorted(GRID, best.u - 1e-9)
    rows = np.arange(4)
    np.testing.assert_array_equal(dense.error[rows, best.level, n], best.error)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 5))
def test_a_posterior_goes_through_what_was_measured(prior, leveled, seed, n):
    site = leveled(seed, 3)
    rng = np.random.default_rng(seed)
    at = rng.choice(110, n, replace=False)
    level = rng.integers(0, 5, (3, n))
    measured = [site(np.full(3, GRID[k]), FULL, level[:, j]) for j, k in enumerate(at)]
    density = np.stack([m.density for m in measured], 1)
    u = np.broadcast_to(GRID[at], (3, n))
    mean, var = prior.density.posterior(u, level, density)
    column = level * len(GRID) + at
    np.testing.assert_allclose(np.take_along_axis(mean, column, 1), density, atol=0.02)
    assert np.all(np.take_along_axis(var, column, 1) < 0.3 * var.max(1, keepdims=True))


def test_a_head_like_the_probes_is_known_after_few_points(prior, leveled):
    site = leveled(501, 9)  # one of them
    dense = landscape_of(site, FULL)
    u, level = np.tile([0.5, 1.5, 1.0, 1.0], (9, 1)), np.tile([0, 0, 2, 4], (9, 1))
    measured = [site(u[:, k], FULL, level[:, k]) for k in range(4)]
    mean, _ = prior.density.posterior(u, level, np.stack([m.density for m in measured], 1))
    off = np.abs(mean - dense.density.reshape(9, -1))
    without = np.abs(prior.density.mean - dense.density.reshape(9, -1))
    assert off.mean() < 0.15 * without.mean()


def test_heads_unlike_the_probes_are_believed_less(prior):
    u, level = np.tile([0.5, 1.5, 2.5], (4, 1)), np.zeros((4, 3), int)
    at = (u / U_MAX * 160).round().astype(int)
    usual = prior.density.mean[at]
    _, close = prior.density.posterior(u, level, usual)
    _, far = prior.density.posterior(u, level, usual + np.array([0.5, -0.5, 0.5]))
    assert np.all(far > 2.0 * close)


def test_points_are_ordered_level_by_level():
    x = points(3)
    assert x.shape == (3 * len(GRID), 2)
    np.testing.assert_array_equal(x[len(GRID) : len(GRID) + 2], [[0.0, 0.5], [GRID[1] / 4, 0.5]])


def test_what_others_explain_is_left_out():
    rng = np.random.default_rng(0)
    rows = rng.random((6, 2)) @ rng.random((2, 40))  # every row is made of two
    assert np.abs(left_out(rows)).max() < 0.1 * rows.std()
    assert np.abs(left_out(rng.standard_normal((6, 40)))).mean() > 0.5


def test_what_is_no_prior_is_refused(leveled):
    dense = landscape_of(leveled(0, 2), FULL)
    other = Landscape((-np.inf, -1.0), dense.error[:, :2], dense.density[:, :2])
    for probes, error, match in (
        ([], 0.1, "one or more probe layers"),
        ([dense, other], 0.1, "same levels"),
        ([dense], 0.1, "3 heads or more, got 2"),
        ([dense, dense], 0.0, "max_error must be positive"),
    ):
        with pytest.raises(ValueError, match=match):
            Prior.of(probes, error)


def test_other_levels_are_refused(prior, leveled):
    class Others:
        heads, lambdas = 2, (-np.inf, -2.0)
        __call__ = leveled(0, 2).__call__

    with pytest.raises(ValueError, match="the prior is of levels"):
        tune({"site": Others()}, Goal(0.1), prior=prior)


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6))
def test_lambda_never_makes_it_worse_than_the_secant_it_began_with(prior, leveled, seed):
    site = leveled(seed, 5, hopeless=0.1)
    target, start = np.full(5, CAP), np.full(5, 1.0)
    secant = solve(
        lambda u: site(u, FULL), target, start=start, tolerance=COARSE, max_calls=SECANT_CALLS
    )
    search = Search.new(lambda u, z: site(u, FULL, z), target, prior)
    found = search.run(start)
    assert len(search.u) <= secant.calls + STEPS
    assert np.all(found.feasible | ~secant.feasible)
    better = found.feasible & secant.feasible
    assert np.all(found.density[better] <= secant.density[better])
    measured = site(found.u, FULL, found.level)
    np.testing.assert_array_equal(measured.error[found.feasible], found.error[found.feasible])


def test_near_the_optimum_after_few_evaluations(prior, leveled):
    sites = {f"layer{i}": leveled(i, 9) for i in range(4)}
    goal, trace = Goal(0.1), Trace()
    ours = tune(sites, goal, prior=prior, trace=trace)
    optima = {
        name: landscape_of(site, FULL).best(np.full(9, goal.cap)) for name, site in sites.items()
    }
    optimum = np.mean([np.where(o.feasible, o.density, 1.0) for o in optima.values()])
    tau_only = tune(sites, goal).mean_density
    assert trace.points(FULL) / 36 <= 8.0
    assert ours.mean_density - optimum < 0.01
    assert tau_only - ours.mean_density > 0.5 * (tau_only - optimum)


def test_a_head_that_is_to_be_dense_costs_one_point(prior, leveled):
    trace = Trace()
    site = Traced(leveled(0, 3), trace, "site")
    strategy = strategy_of("afbs-bo", Goal(0.1), FULL, FULL, prior)
    curves = strategy.explore(leveled(0, 3))
    plan = strategy.allocate({"site": curves}).sites["site"]
    plan.target[1], plan.start[1] = 0.0, U_MAX
    found = strategy.refine(site, plan)
    assert found.feasible.tolist() == [True, False, True]
    assert {(row.u[1], row.level[1]) for row in trace.rows} == {(U_MAX, 0)}


def test_a_family_keeps_its_shape(prior):
    assert isinstance(prior.log_error, Family)
    assert prior.log_error.factors.shape == (19, 5 * len(GRID))
