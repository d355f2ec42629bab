"""The controller under faults: budgets stay bounded, swings die out, resumption is exact."""

import json

import numpy as np
import pytest

from afbs_compile.tuner.budget_bounds import around
from afbs_compile.tuner.controller import SparsityController
from afbs_compile.tuner.step_cost import CostModel

REPLICAS, LAYERS = 8, 4
BASE = np.full(LAYERS, 0.25)
BOUNDS = around(BASE, 0.5, 2.0)
TRUTH = np.array([4e-6, 5e-6, 2e-3])


def work(rng, even=False):
    tokens = np.full(REPLICAS, 16384.0) if even else rng.integers(4096, 32768, REPLICAS) * 1.0
    return tokens, tokens**2 / 16384


def seconds(tokens, visible, budgets):
    kept = (visible[:, None] * budgets).sum(axis=1)
    return TRUTH[0] * tokens + TRUTH[1] * kept + TRUTH[2]


def profiled():
    tokens = np.array([2e3, 8e3, 32e3, 16e3, 4e3])
    budgets = np.array([0.2, 0.5, 0.3, 1.0, 0.1])[:, None] * np.ones(LAYERS)
    visible = tokens**2 / 16384
    cost = CostModel()
    cost.profile(tokens, (visible[:, None] * budgets).sum(1), seconds(tokens, visible, budgets))
    return cost


def controller(anchor="mean"):
    return SparsityController(BOUNDS, profiled(), REPLICAS, anchor)


def drive(made, steps, fault=lambda step, t: t, even=False, seed=0):
    """Run steps; the budgets of every step [steps, R, L]."""
    rng, history = np.random.default_rng(seed), []
    for step in range(steps):
        tokens, visible = work(rng, even)
        found = made.plan(tokens, visible)
        history.append(found.budgets)
        made.observe(found, fault(step, seconds(tokens, visible, found.budgets)))
    return np.stack(history)


def bounded(history):
    return (history >= BOUNDS.low - 1e-12).all() and (history <= BOUNDS.high + 1e-12).all()


def test_a_rank_that_is_slow_for_a_while():
    """Its budgets shrink, and within 10 steps of its recovery half of that is gone again."""

    def fault(step, t):
        return np.where((np.arange(REPLICAS) == 2) & (10 <= step < 30), 3.0, 1.0) * t

    history = drive(controller(), 60, fault, even=True)
    assert bounded(history)
    off = np.abs(history - BASE).max(axis=(1, 2))
    assert not off[:10].any()
    assert history[29, 2] == pytest.approx(BOUNDS.low)
    assert history[29].max() > BASE[0]
    assert off[40:].max() < 0.5 * off[30]
    assert off[55:].max() < 0.02


def test_a_fault_does_not_spoil_the_cost_model():
    def fault(step, t):
        return np.where((np.arange(REPLICAS) == 2) & (10 <= step < 30), 3.0, 1.0) * t

    made = controller()
    drive(made, 30, fault)
    np.testing.assert_allclose(made.cost.coefficients[:2], TRUTH[:2], rtol=0.1)


def test_of_two_replicas_the_slow_one_gives_and_gets_back():
    made = SparsityController(BOUNDS, profiled(), 2)
    tokens = np.array([16384.0, 16384.0])
    pressure = []
    for step in range(60):
        found = made.plan(tokens, tokens**2 / 16384)
        pressure.append(found.pressure)
        slow = np.array([3.0 if 10 <= step < 30 else 1.0, 1.0])
        made.observe(found, slow * seconds(tokens, tokens**2 / 16384, found.budgets))
    assert pressure[29].tolist() == [-1.0, 1.0]
    assert np.abs(pressure[50:]).max() < 0.1


def test_one_wrong_time_dies_out_without_swinging():
    def fault(step, t):
        return np.where((np.arange(REPLICAS) == 5) & (step == 5), 20.0, 1.0) * t

    history = drive(controller(), 30, fault, even=True)
    off = (history - BASE)[:, 5, 0]
    assert off[6] < 0.0
    assert (off[6:] <= 1e-9).all()  # no overshoot
    assert (np.diff(off[6:]) >= -1e-9).all()  # back, step after step
    assert abs(off[16]) < 0.5 * abs(off[6])


def test_noisy_times_on_equal_loads_keep_budgets_near_the_base():
    rng = np.random.default_rng(3)
    history = drive(
        controller(), 100, lambda _, t: t * rng.lognormal(0.0, 0.05, REPLICAS), even=True
    )
    assert bounded(history)
    assert np.abs(history - BASE).max() < 0.25 * BASE[0]


def test_noise_does_not_undo_the_balance():
    rng = np.random.default_rng(4)
    made = controller()
    gains = []
    for _ in range(60):
        tokens, visible = work(rng)
        found = made.plan(tokens, visible)
        true = seconds(tokens, visible, found.budgets)
        gains.append(seconds(tokens, visible, BASE).max() / true.max())
        made.observe(found, true * rng.lognormal(0.0, 0.1, REPLICAS))
    assert np.mean(gains) > 1.1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0, 0.0])
def test_a_time_that_is_none_changes_nothing_of_that_replica(bad):
    made = controller()
    history = drive(made, 40, lambda _, t: np.where(np.arange(REPLICAS) == 1, bad, t), even=True)
    np.testing.assert_allclose(history, np.broadcast_to(BASE, history.shape))
    assert made.missing.tolist() == [0, 40] + [0] * (REPLICAS - 2)


def test_no_observation_at_all():
    made, rng = controller(), np.random.default_rng(0)
    for _ in range(20):
        tokens, visible = work(rng)
        found = made.plan(tokens, visible)
        assert found.after.max() <= found.before.max()


def test_all_times_missing():
    history = drive(controller(), 20, lambda _, t: t * np.nan)
    assert bounded(history)


def test_it_learns_the_cost_by_itself():
    made = SparsityController(BOUNDS, CostModel(), REPLICAS)
    history = drive(made, 60)
    np.testing.assert_array_equal(history[0], np.tile(BASE, (REPLICAS, 1)))
    tokens, visible = work(np.random.default_rng(99))
    found = made.plan(tokens, visible)
    true = seconds(tokens, visible, found.budgets)
    assert np.abs(true / found.after - 1).max() < 0.05


def test_resumption_is_exact():
    rng = np.random.default_rng(1)
    noise = rng.lognormal(0.0, 0.1, (40, REPLICAS))
    whole, before, after = (
        controller(),
        controller(),
        SparsityController(BOUNDS, CostModel(), REPLICAS),
    )
    expected = drive(whole, 20, lambda n, t: t * noise[n])
    drive(before, 20, lambda n, t: t * noise[n])
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    np.testing.assert_array_equal(
        drive(after, 20, lambda n, t: t * noise[20 + n], seed=7),
        drive(whole, 20, lambda n, t: t * noise[20 + n], seed=7),
    )
    assert bounded(expected)


def test_peers_that_are_told_the_same_decide_the_same():
    one, other = controller(), controller()
    noise = np.random.default_rng(2).lognormal(0.0, 0.2, (30, REPLICAS))
    np.testing.assert_array_equal(
        drive(one, 30, lambda n, t: t * noise[n]), drive(other, 30, lambda n, t: t * noise[n])
    )


def test_another_world_size_is_refused_or_keeps_the_cost_alone():
    made = controller()
    drive(made, 10, lambda _, t: t * np.linspace(1.0, 3.0, REPLICAS))
    other = SparsityController(BOUNDS, CostModel(), 4)
    with pytest.raises(ValueError, match="of 8 replicas, this run has 4"):
        other.load_state_dict(made.state_dict())
    other.load_state_dict(made.state_dict(), resize=True)
    assert other.slowness == pytest.approx(np.ones(4))
    np.testing.assert_array_equal(other.cost.coefficients, made.cost.coefficients)
    found = other.plan([4096.0, 8192.0, 8192.0, 16384.0], [1e3, 4e3, 4e3, 16e3])
    assert bounded(found.budgets[None])


def test_a_state_of_other_layers_or_without_numbers_is_refused():
    made = controller()
    with pytest.raises(ValueError, match="layers"):
        SparsityController(around([0.5]), CostModel(), REPLICAS).load_state_dict(made.state_dict())
    with pytest.raises(ValueError, match="no finite number"):
        made.load_state_dict(made.state_dict() | {"log_slowness": [np.nan] * REPLICAS})


def test_calls_of_another_world_are_explained():
    made = controller()
    with pytest.raises(ValueError, match="change of the world size"):
        made.plan([1.0], [1.0])
    found = made.plan(np.ones(REPLICAS), np.ones(REPLICAS))
    with pytest.raises(ValueError, match="one each"):
        made.observe(found, [1.0])
    with pytest.raises(ValueError, match="anchor"):
        SparsityController(BOUNDS, CostModel(), 2, "median")
