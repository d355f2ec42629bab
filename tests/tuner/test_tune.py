import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afbs_compile.tuner.limit import Limit
from afbs_compile.tuner.objective import FULL, U_MAX, Measured, QueryBlocks
from afbs_compile.tuner.strategies import STRATEGIES
from afbs_compile.tuner.strategy import Goal
from afbs_compile.tuner.trace import Trace
from afbs_compile.tuner.tune import tune

names = st.sampled_from(sorted(STRATEGIES))


def model(landscape, seed=0, layers=3, heads=4, **shares):
    return {f"layer{i}": landscape(1000 * seed + i, heads, **shares) for i in range(layers)}


def unseen(sites, log_factor):
    return {name: site.shifted(log_factor) for name, site in sites.items()}


def holds(result, sites, goal):
    """The guarantee: what the result claims was measured, and is within the goal."""
    for name, site in sites.items():
        found = result.sites[name]
        measured = site(found.u, FULL)
        sparse = ~found.dense
        assert np.all(measured.error[sparse] <= goal.max_error)
        assert np.all(found.error[sparse] >= measured.error[sparse] - 1e-15)
        assert np.all(found.density[sparse] >= measured.density[sparse] - 1e-15)
        for values, expected in ((found.u, U_MAX), (found.error, 0.0), (found.density, 1.0)):
            np.testing.assert_array_equal(values[found.dense], expected)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 10**6),
    strategy=names,
    max_error=st.floats(0.02, 0.4),
    share=st.one_of(st.none(), st.floats(0.1, 1.2)),
)
def test_cap_and_budget_hold_on_what_was_measured(landscape, seed, strategy, max_error, share):
    sites = model(landscape, seed, hopeless=0.15, exact=0.1)
    goal = Goal(max_error, None if share is None else share * max_error)
    result = tune(sites, goal, strategy)
    holds(result, sites, goal)
    for name, site in sites.items():
        found = result.sites[name]
        sparse = ~found.dense
        np.testing.assert_array_equal(found.error[sparse], site(found.u, FULL).error[sparse])
        assert np.all(found.error <= goal.cap)
    assert result.mean_error <= goal.budget * (1 + 1e-12)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), strategy=names, worse=st.floats(-0.5, 1.0))
def test_cap_holds_on_validation_too(landscape, seed, strategy, worse):
    sites = model(landscape, seed, layers=2)
    others = unseen(sites, worse)
    goal = Goal(0.15, 0.08)
    result = tune(sites, goal, strategy, validation=others)
    holds(result, sites, goal)
    holds(result, others, goal)


def test_validation_moves_only_what_fails(landscape):
    sites = model(landscape)
    goal = Goal(0.15, 0.08)
    alone = tune(sites, goal)
    easy = tune(sites, goal, validation=unseen(sites, -1.0))
    hard = tune(sites, goal, validation=unseen(sites, 0.4))
    for name in sites:
        np.testing.assert_array_equal(easy.sites[name].u, alone.sites[name].u)
        np.testing.assert_array_equal(easy.sites[name].error, alone.sites[name].error)
        assert np.all(hard.sites[name].u >= alone.sites[name].u)
    assert hard.mean_density > alone.mean_density
    assert {row.phase for row in hard.trace.rows} == {"explore", "refine", "validate", "remeasure"}
    assert {row.phase for row in easy.trace.rows} == {"explore", "refine", "validate"}


def test_heads_that_were_dense_stay_so_and_cost_no_round_of_validation(landscape):
    site = landscape(0, 3, hopeless=1.0)
    site = site.shifted(np.log(0.12))  # errors of 0.11 to 0.12 at any u
    for strategy in ("afbs-bo", "bisect"):
        result = tune(
            {"site": site},
            Goal(0.15, margin=0.5),
            strategy,
            validation={"site": site.shifted(1.0)},
        )
        assert result.sites["site"].dense.all()
        assert sum(row.phase == "validate" for row in result.trace.rows) == 1


def test_a_head_that_moves_out_of_its_cap_is_dense():
    class Odd:
        """Error jumps up again at some u."""

        heads = 2

        def __init__(self, factor, jump):
            self.factor, self.jump = factor, jump

        def __call__(self, u, fidelity):
            error = np.where(u <= self.jump, 0.4 * np.exp(-u), 0.3) * np.array([self.factor, 1.0])
            return Measured(error, u / U_MAX)

    goal = Goal(0.06, margin=0.95)
    result = tune({"site": Odd(1.0, 2.0)}, goal, "bisect", validation={"site": Odd(1.2, 9.0)})
    assert result.sites["site"].dense.tolist() == [True, False]


def test_budget_is_used_and_beats_one_target_for_all(landscape):
    sites = model(landscape, layers=30, heads=9)
    goal = Goal(0.2, 0.06)
    ours = tune(sites, goal)
    assert 0.97 * goal.mean_error <= ours.mean_error <= goal.mean_error
    theirs = tune(sites, Goal(0.2, 1.02 * ours.mean_error), "bisect")
    assert theirs.mean_error >= ours.mean_error
    assert ours.mean_density < theirs.mean_density - 0.01
    assert ours.trace.cost < theirs.trace.cost


def test_a_better_strategy_is_no_cheat_under_the_cap_alone(landscape):
    sites = model(landscape, layers=6, heads=9)
    ours, theirs = (tune(sites, Goal(0.1), name) for name in ("afbs-bo", "bisect"))
    assert ours.price == 0.0
    assert theirs.price is None
    assert ours.mean_density == pytest.approx(theirs.mean_density, abs=0.01)


@pytest.mark.parametrize("goal", [Goal(0.0), Goal(0.1, 0.0)])
def test_no_error_means_dense_without_an_evaluation(landscape, goal):
    sites = model(landscape)
    result = tune(sites, goal)
    assert result.trace.calls == 0
    assert (result.mean_error, result.mean_density) == (0.0, 1.0)
    for name in sites:
        assert result.sites[name].dense.all()
        np.testing.assert_array_equal(result.sites[name].u, U_MAX)


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_same_seed_same_result(landscape, strategy):
    sites = model(landscape)
    first, second = (tune(sites, Goal(0.1, 0.05, seed=3), strategy) for _ in range(2))
    assert first.trace == second.trace
    assert first.price == second.price
    for name in sites:
        np.testing.assert_array_equal(first.sites[name].u, second.sites[name].u)


def test_fidelities_are_those_asked_for(landscape):
    low, high = QueryBlocks(0.25), QueryBlocks(0.5)
    result = tune(model(landscape), Goal(0.1), low=low, high=high)
    assert {(row.phase, row.fidelity) for row in result.trace.rows} == {
        ("explore", low),
        ("refine", high),
    }


def test_progress_counts_every_step_once(landscape):
    said = []
    tune(model(landscape, layers=2), Goal(0.1), on_progress=lambda *step: said.append(step))
    assert said == [
        (1, 4, "explore", "layer0"),
        (2, 4, "explore", "layer1"),
        (3, 4, "refine", "layer0"),
        (4, 4, "refine", "layer1"),
    ]


def test_an_interrupt_leaves_what_was_found(landscape):
    sites = model(landscape)
    found, trace = {}, Trace()

    def interrupt(done, total, phase, site):
        if (phase, site) == ("refine", "layer1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(sites, Goal(0.1), on_progress=interrupt, found=found, trace=trace)
    whole = tune(sites, Goal(0.1))
    assert list(found) == ["layer0"]
    np.testing.assert_array_equal(found["layer0"].u, whole.sites["layer0"].u)
    assert 0 < trace.calls < whole.trace.calls


def test_a_mapping_may_make_evaluators_when_asked(landscape):
    class Lazy(dict):
        def __getitem__(self, name):
            asked.append(name)
            return super().__getitem__(name)

    asked = []
    tune(Lazy(model(landscape, layers=2)), Goal(0.1))
    assert asked == ["layer0", "layer1", "layer0", "layer1"]


def test_nonsense_names_head_and_site(landscape):
    class Broken:
        heads = 4

        def __call__(self, u, fidelity):
            return Measured(np.where(np.arange(4) == 1, np.nan, 0.1), 0.0 * u)

    sites = model(landscape) | {"layer1": Broken()}
    with pytest.raises(ValueError, match="head 1") as caught:
        tune(sites, Goal(0.1))
    assert any("layer1" in note for note in caught.value.__notes__)


def test_bad_arguments_are_refused_before_anything_is_measured(landscape):
    sites, trace = model(landscape), Trace()
    with pytest.raises(ValueError, match="choose one of"):
        tune(sites, Goal(0.1), "gird", trace=trace)
    with pytest.raises(ValueError, match="no site"):
        tune({}, Goal(0.1), trace=trace)
    with pytest.raises(ValueError, match="layer0, layer2"):
        tune(sites, Goal(0.1), validation={"layer1": sites["layer1"]}, trace=trace)
    assert trace.calls == 0


def damage_of(sites):
    """What a run end to end might say: no simple sum of the heads' errors."""
    return float(sum(np.square(site.error).sum() for site in sites.values())) ** 0.7


@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), most=st.floats(1e-3, 1.0))
def test_a_limit_holds_at_the_least_density_that_was_seen(landscape, seed, most):
    sites, seen, found = model(landscape, seed), [], {}

    def damage(made):
        density = np.mean([site.density.mean() for site in made.values()])
        seen.append((density, damage_of(made)))
        return seen[-1][1]

    result = tune(sites, Goal(0.5), found=found, limit=Limit(most, damage))
    assert found == result.sites
    fitting = [density for density, done in seen if done <= most]
    assert result.mean_density == pytest.approx(min(fitting, default=1.0))
    if fitting:
        assert result.damage == damage_of(result.sites) <= most
    else:
        assert result.damage is None
        assert all(site.dense.all() for site in result.sites.values())
    for site in result.sites.values():
        assert np.all(site.error[~site.dense] <= 0.5)


def test_a_looser_limit_is_sparser(landscape):
    densities = [
        tune(model(landscape), Goal(0.5), limit=Limit(most, damage_of)).mean_density
        for most in (0.01, 0.1, 1.0)
    ]
    assert densities[0] > densities[1] > densities[2]


def test_an_interrupt_keeps_the_best_within_the_limit(landscape):
    found, done = {}, []

    def damage(made):
        done.append(damage_of(made))
        if any(d <= 0.1 for d in done[:-1]):
            raise KeyboardInterrupt
        return done[-1]

    with pytest.raises(KeyboardInterrupt):
        tune(model(landscape), Goal(0.5), found=found, limit=Limit(0.1, damage))
    assert damage_of(found) <= 0.1
    assert not all(site.dense.all() for site in found.values())


def test_a_limit_needs_a_strategy_with_a_price(landscape):
    with pytest.raises(ValueError, match="afbs-bo"):
        tune(model(landscape), Goal(0.5), "bisect", limit=Limit(0.1, damage_of))
