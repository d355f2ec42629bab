import numpy as np

from afbs_compile.tuner.bisect import Bisect
from afbs_compile.tuner.objective import FULL, QueryBlocks
from afbs_compile.tuner.strategy import Goal, SitePlan
from afbs_compile.tuner.trace import Trace, Traced


def made(goal):
    return Bisect(goal, QueryBlocks(0.125), FULL)


def test_explores_nothing(landscape):
    trace = Trace()
    curves = made(Goal(0.2)).explore(Traced(landscape(0, 4), trace, "site"))
    assert curves.heads == 4
    assert trace.calls == 0


def test_gives_every_head_the_same_target(landscape):
    strategy = made(Goal(0.2, 0.07))
    curves = {name: strategy.explore(landscape(0, heads)) for name, heads in (("a", 2), ("b", 3))}
    plan = strategy.allocate(curves)
    assert plan.price is None
    assert [len(plan.sites[name].target) for name in ("a", "b")] == [2, 3]
    assert {t for site in plan.sites.values() for t in site.target} == {0.07}


def test_refines_at_high_fidelity(landscape):
    trace = Trace()
    site = Traced(landscape(0, 4), trace, "site")
    root = made(Goal(0.2)).refine(site, SitePlan.at_zero(np.full(4, 0.1)))
    assert {row.fidelity for row in trace.rows} == {FULL}
    assert np.all(root.error <= 0.1)
    assert trace.calls == 8


def test_validates_at_high_fidelity(landscape):
    trace = Trace()
    site = Traced(landscape(0, 4), trace, "site")
    _, measured, dense = made(Goal(0.2)).validate(site, np.full(4, 1.0), np.zeros(4, int), 0.1)
    assert {row.fidelity for row in trace.rows} == {FULL}
    np.testing.assert_array_equal(dense, measured.error > 0.1)
