"""Which strategies are there? One registry, so that every claim is a benchmark row."""

from dataclasses import replace

from afbs_compile.tuner.afbs_bo import AfbsBo
from afbs_compile.tuner.afbs_bo_paper import AfbsBoPaper
from afbs_compile.tuner.bisect import Bisect
from afbs_compile.tuner.grid import Grid
from afbs_compile.tuner.objective import Fidelity
from afbs_compile.tuner.one_pass import OnePass
from afbs_compile.tuner.prior import Prior
from afbs_compile.tuner.random_search import RandomSearch
from afbs_compile.tuner.sparge import Sparge
from afbs_compile.tuner.strategy import Factory, Goal, Strategy

STRATEGIES: dict[str, Factory] = {
    "afbs-bo": AfbsBo,
    "afbs-bo-paper": AfbsBoPaper,
    "one-pass": OnePass,
    "bisect": Bisect,
    "grid": Grid,
    "sparge": Sparge,
    "random": RandomSearch,
}


def strategy_of(
    name: str, goal: Goal, low: Fidelity, high: Fidelity, prior: Prior | None = None
) -> Strategy:
    """The strategy of that name, for a goal and a low and a high fidelity.

    Raises:
        ValueError: no such name, the message lists those that there are; or a prior for one that
            knows none.
    """
    if name not in STRATEGIES:
        raise ValueError(f"no strategy {name!r}: choose one of {', '.join(sorted(STRATEGIES))}")
    strategy = STRATEGIES[name](goal, low, high)
    if prior is None:
        return strategy
    if not isinstance(strategy, AfbsBo):
        raise ValueError(f"strategy {name!r} takes no prior; afbs-bo does")
    return replace(strategy, prior=prior)
