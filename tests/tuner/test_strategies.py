import pytest

from afbs_compile.tuner.afbs_bo import AfbsBo
from afbs_compile.tuner.landscape import landscape_of
from afbs_compile.tuner.objective import FULL, QueryBlocks
from afbs_compile.tuner.prior import Prior
from afbs_compile.tuner.strategies import STRATEGIES, strategy_of
from afbs_compile.tuner.strategy import Goal


@pytest.mark.parametrize("name", STRATEGIES)
def test_names_make_strategies(name):
    goal, low = Goal(0.1), QueryBlocks(0.25)
    strategy = strategy_of(name, goal, low, FULL)
    assert isinstance(strategy, STRATEGIES[name])
    assert (strategy.goal, strategy.low, strategy.high) == (goal, low, FULL)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"'gird': choose one of afbs-bo, .*grid, one-pass"):
        strategy_of("gird", Goal(0.1), FULL, FULL)


def test_only_afbs_bo_takes_a_prior(leveled):
    prior = Prior.of([landscape_of(leveled(0, 4), FULL)], 0.1)
    strategy = strategy_of("afbs-bo", Goal(0.1), FULL, FULL, prior)
    assert isinstance(strategy, AfbsBo)
    assert strategy.prior is prior
    with pytest.raises(ValueError, match="'grid' takes no prior"):
        strategy_of("grid", Goal(0.1), FULL, FULL, prior)
