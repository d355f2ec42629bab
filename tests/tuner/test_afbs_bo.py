from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbs_compile.tuner.afbs_bo import AfbsBo
from afbs_compile.tuner.curves import GRID
from afbs_compile.tuner.objective import FULL, U_MAX, QueryBlocks
from afbs_compile.tuner.strategy import Goal, SitePlan
from afbs_compile.tuner.trace import Trace, Traced

LOW = QueryBlocks(0.125)
GOAL = Goal(0.2, 0.08)
seeds = st.integers(0, 2**32 - 1)


def made(goal=GOAL):
    return AfbsBo(goal, LOW, FULL)


def arrays(curves):
    return [getattr(curves, field.name) for field in fields(curves)]


@given(seed=seeds)
def test_explores_cheaply_and_returns_monotone_curves(landscape, seed):
    trace = Trace()
    site = Traced(landscape(seed, 5, hopeless=0.1, exact=0.1), trace, "site")
    curves = made().explore(site)
    assert {row.fidelity for row in trace.rows} == {LOW}
    assert 3 <= trace.calls <= 8
    assert curves.heads == 5
    assert np.all(curves.error > 0.0)
    assert np.all(np.diff(curves.error, axis=1) <= 0.0)
    assert np.all(np.diff(curves.density, axis=1) >= 0.0)
    assert np.all((curves.density >= 0.0) & (curves.density <= 1.0))
    assert np.array_equal(curves.weight, np.ones(5))
    for values in arrays(curves)[1:-1]:
        assert values.shape == (5, len(GRID))
        assert np.isfinite(values).all()


@pytest.mark.parametrize(("exact", "tolerance"), [(0.0, 0.06), (0.2, 0.25)])
def test_curves_are_right_where_it_matters(landscape, exact, tolerance):
    site = replace(landscape(3, 40, exact=exact), bias=np.zeros(40))
    curves = made().explore(site)
    truth = np.stack([site.error(np.full(40, u)) for u in GRID], axis=1)
    density = np.stack([site.density(np.full(40, u)) for u in GRID], axis=1)
    relevant = (truth > 0.04) & (truth < GOAL.max_error) & np.isinf(site.exact_from)[:, None]
    off = np.abs(np.log(curves.error[relevant] / truth[relevant]))
    assert np.quantile(off, 0.9) < tolerance
    assert np.quantile(np.abs(curves.density - density)[relevant], 0.9) < 0.02


def test_uncertainty_grows_away_from_the_measurements(landscape):
    trace = Trace()
    curves = made().explore(Traced(landscape(1, 4), trace, "site"))
    for head in range(4):
        measured = [round(row.u[head] / 0.025) for row in trace.rows]
        distance = np.abs(np.arange(len(GRID))[:, None] - measured).min(1)
        std = curves.log_error_std[head]
        assert std[distance == 0].max() < std[distance == distance.max()].min()


def test_stops_when_nothing_is_to_be_gained(landscape):
    trace = Trace()
    site = Traced(replace(landscape(0, 4), exact_from=np.full(4, -1.0)), trace, "site")
    made().explore(site)
    assert trace.calls < 8


def test_same_seed_same_curves_other_seed_other_points(landscape):
    site = landscape(0, 4)
    for ours, theirs in zip(*(arrays(made().explore(site)) for _ in range(2)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    traces = [Trace(), Trace()]
    for seed, trace in enumerate(traces):
        made(replace(GOAL, seed=seed)).explore(Traced(site, trace, "site"))
    assert traces[0].rows[0].u != traces[1].rows[0].u


@pytest.mark.slow
@given(seed=seeds)
def test_permuting_heads_permutes_the_curves(landscape, seed):
    site = landscape(seed, 5)
    order = np.random.default_rng(seed).permutation(5)
    curves, permuted = (made().explore(s) for s in (site, site.taken(order)))
    np.testing.assert_allclose(permuted.error, curves.error[order], rtol=0.05)
    np.testing.assert_allclose(permuted.density, curves.density[order], atol=0.02)


def test_points_gather_where_the_price_of_earlier_sites_says(landscape):
    def last_points(log_factor):
        trace = Trace()
        strategy = made(Goal(0.3, 0.08))
        earlier = [strategy.explore(landscape(s, 9).shifted(log_factor)) for s in range(3)]
        strategy.explore(Traced(landscape(7, 9), trace, "site"), earlier)
        return np.array([row.u for row in trace.rows[3:]])

    assert np.median(last_points(1.0)) > np.median(last_points(-1.5)) + 0.3


@given(seed=seeds, mean=st.floats(0.02, 0.2))
def test_targets_respect_budget_and_cap(landscape, seed, mean):
    strategy = made(Goal(0.2, mean))
    curves = {
        f"layer{i}": strategy.explore(landscape(seed + i, 3 + i, hopeless=0.1)) for i in range(2)
    }
    plan = strategy.allocate(curves)
    assert list(plan.sites) == ["layer0", "layer1"]
    assert [len(site.target) for site in plan.sites.values()] == [3, 4]
    target, start = (
        np.concatenate([getattr(site, name) for site in plan.sites.values()])
        for name in ("target", "start")
    )
    assert target.mean() <= mean
    assert np.all(target <= strategy.goal.cap)
    np.testing.assert_array_equal(start[target == 0.0], U_MAX)
    assert plan.price >= 0.0


def test_a_plan_starts_where_the_curve_meets_the_target(landscape):
    strategy = made()
    curves = strategy.explore(landscape(0, 4))
    plan = strategy.allocate({"site": curves}).sites["site"]
    for head in range(4):
        at = np.interp(plan.start[head], GRID, curves.error[head])
        assert at == pytest.approx(plan.target[head])


def test_refines_at_high_fidelity_and_leaves_dense_heads_alone(landscape):
    trace = Trace()
    site = landscape(0, 3)
    target, start = np.array([0.1, 0.0, 0.05]), np.array([1.0, U_MAX, 1.5])
    found = made().refine(Traced(site, trace, "site"), SitePlan(target, start, np.zeros(3, int)))
    assert {row.fidelity for row in trace.rows} == {FULL}
    np.testing.assert_array_equal(found.feasible, [True, False, True])
    assert np.all(found.error[[0, 2]] <= target[[0, 2]])
    assert {row.u[1] for row in trace.rows} == {U_MAX}


def test_validates_at_high_fidelity(landscape):
    trace = Trace()
    site = Traced(landscape(0, 4), trace, "s")
    _, measured, dense = made().validate(site, np.full(4, 1.0), np.zeros(4, int), 0.1)
    assert {row.fidelity for row in trace.rows} == {FULL}
    np.testing.assert_array_equal(dense, measured.error > 0.1)
