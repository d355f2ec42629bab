import pytest

from afbs_compile.tuner.afbs_bo import AfbsBo
from afbs_compile.tuner.bisect import Bisect
from afbs_compile.tuner.objective import FULL, QueryBlocks
from afbs_compile.tuner.strategies import strategy_of
from afbs_compile.tuner.strategy import Goal


@pytest.mark.parametrize(("name", "kind"), [("afbs-bo", AfbsBo), ("bisect", Bisect)])
def test_names_make_strategies(name, kind):
    goal, low = Goal(0.1), QueryBlocks(0.25)
    strategy = strategy_of(name, goal, low, FULL)
    assert isinstance(strategy, kind)
    assert (strategy.goal, strategy.low, strategy.high) == (goal, low, FULL)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"'grid': choose one of afbs-bo, bisect"):
        strategy_of("grid", Goal(0.1), FULL, FULL)
