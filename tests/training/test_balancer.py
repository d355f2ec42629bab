"""Budgets reach the sites, times reach the controller, and a resumed run goes on exactly."""

import json

import numpy as np
import pytest

from afbs_compile.training.balancer import Balancer
from afbs_compile.training.report import StragglerReport
from afbs_compile.training.sampler import SparsityAwareBatchSampler, totals
from afbs_compile.tuner.budget_bounds import around
from afbs_compile.tuner.controller import SparsityController
from afbs_compile.tuner.step_cost import CostModel

WORLD, SITES = 4, ["layers.0", "layers.1"]
BOUNDS = around([0.2, 0.4], 0.5, 2.0)
TRUTH = (2e-6, 1e-5, 1e-3)


class Exchange:
    """All replicas in one process: what every rank would have sent."""

    replicas = WORLD

    def __init__(self):
        self.sent, self.rounds = None, 0

    def start(self, value):
        self.rounds += 1
        self.sent = value

    def finish(self):
        sent, self.sent = self.sent, None
        return sent


class Clock:
    """Tells the true times of all replicas a step late, as `StepClock` does of one."""

    def __init__(self):
        self.balancer, self.before = None, None

    def begin(self):
        pass

    def end(self):
        before, self.before = self.before, self.true()
        return before

    def true(self):
        balancer = self.balancer
        step = balancer.sampler.step(balancer.number)
        tokens = totals(step, balancer.sampler.lengths).sum(1)
        visible = totals(step, balancer.sampler.visible).sum(1) / len(SITES)
        budgets = balancer.plans[0].budgets if balancer.plans else np.full((WORLD, 2), 0.3)
        return TRUTH[0] * tokens + TRUTH[1] * (visible[:, None] * budgets).sum(1) + TRUTH[2]


def made(long_tail, rank=0, controlled=True, sync="step", timed=True, seed=0):
    sampler = SparsityAwareBatchSampler(
        long_tail(96), 1, 2, world=WORLD, rank=rank, layers=len(SITES), sync=sync, seed=seed
    )
    controller = SparsityController(BOUNDS, CostModel(), WORLD) if controlled else None
    given = {}
    clock = Clock() if timed else None
    balancer = Balancer(
        sampler, controller, SITES if controlled else (), given.update,
        Exchange() if timed else None, clock,
    )  # fmt: skip
    if clock:
        clock.balancer = balancer
    return balancer, given


def run(balancer, given, steps):
    history = []
    for step in steps:
        balancer.begin_step(step)
        history.append(dict(given))
        balancer.end_step()
    return history


def test_budgets_of_this_rank_reach_its_sites(long_tail):
    for rank in range(WORLD):
        balancer, given = made(long_tail, rank)
        run(balancer, given, range(12))
        assert list(given.values()) == balancer.plans[0].budgets[rank].tolist()
    assert balancer.plans[0].pressure.any()


def test_one_scalar_a_step_and_none_without_a_clock(long_tail):
    balancer, given = made(long_tail)
    run(balancer, given, range(12))
    assert balancer.exchange.rounds == 11  # the last step is told by the next one
    blind, given = made(long_tail, timed=False)
    run(blind, given, range(12))
    assert blind.exchange is None


def test_all_ranks_plan_the_same(long_tail):
    plans = []
    for rank in range(WORLD):
        balancer, given = made(long_tail, rank)
        run(balancer, given, range(10))
        plans.append(balancer.plans[0].budgets)
    for other in plans[1:]:
        np.testing.assert_array_equal(plans[0], other)


def test_it_balances_better_than_batches_alone(long_tail):
    def slowest(controlled):
        balancer, given = made(long_tail, controlled=controlled)
        for epoch in range(4):
            balancer.next_epoch(epoch)
            run(balancer, given, range(12))
        last = list(balancer.report.records)[-12:]
        return np.mean([record.slowest for record in last])

    assert slowest(True) < 0.95 * slowest(False)


def test_budgets_become_densities_of_the_next_epoch(long_tail):
    balancer, given = made(long_tail)
    run(balancer, given, range(12))
    before = balancer.sampler.densities().copy()
    balancer.next_epoch(1)
    assert (balancer.sampler.densities() < before).all()


def test_every_micro_batch_has_budgets_of_its_own(long_tail):
    balancer, given = made(long_tail, sync="micro", timed=False)
    tokens = np.array([1e3, 4e3, 16e3, 64e3])
    balancer.controller.cost.profile(tokens, tokens**2 / 1e4, 2e-6 * tokens + tokens**2 / 1e9)
    plans = balancer.begin_step(0)
    assert len(plans) == 2
    for micro, plan in enumerate(plans):
        balancer.begin_micro_batch(micro)
        assert list(given.values()) == plan.budgets[0].tolist()


@pytest.mark.parametrize("done", [1, 7, 12])
def test_a_killed_run_goes_on_as_if_nothing_had_been(long_tail, done):
    def go_on(balancer, given, first):
        history = run(balancer, given, range(first, 12))
        balancer.next_epoch(1)
        return history + run(balancer, given, range(12)), list(balancer.sampler)

    whole, given = made(long_tail, seed=5)
    run(whole, given, range(done))
    state = json.loads(json.dumps(whole.state_dict(done * 2)))
    expected = go_on(whole, given, done)
    other, taken = made(long_tail, seed=77)
    other.load_state_dict(state)
    assert go_on(other, taken, done) == expected


def test_a_state_of_another_kind_of_run_is_refused(long_tail):
    state = made(long_tail)[0].state_dict()
    with pytest.raises(ValueError, match="whether there is a controller"):
        made(long_tail, controlled=False)[0].load_state_dict(state)


def test_parts_that_do_not_fit_are_refused():
    sampler = SparsityAwareBatchSampler([10] * 8, world=2, rank=0, layers=2)
    with pytest.raises(ValueError, match="4 replicas, the sampler 2"):
        Balancer(sampler, SparsityController(BOUNDS, CostModel(), 4), SITES, print)
    with pytest.raises(ValueError, match="1 sites, 2 layers of the sampler, 2 of the controller"):
        Balancer(sampler, SparsityController(BOUNDS, CostModel(), 2), SITES[:1], print)


def test_every_step_is_reported(long_tail):
    balancer, given = made(long_tail)
    run(balancer, given, range(12))
    balancer.flush()
    assert [r.step for r in balancer.report.records] == list(range(12))
    assert balancer.report.summary()["steps"] == 12
    assert isinstance(balancer.report, StragglerReport)
