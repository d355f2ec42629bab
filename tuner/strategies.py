"""Which strategies are there? One registry, so that every claim is a benchmark row."""

from afbs_compile.tuner.afbs_bo import AfbsBo
from afbs_compile.tuner.bisect import Bisect
from afbs_compile.tuner.objective import Fidelity
from afbs_compile.tuner.strategy import Factory, Goal, Strategy

STRATEGIES: dict[str, Factory] = {"afbs-bo": AfbsBo, "bisect": Bisect}


def strategy_of(name: str, goal: Goal, low: Fidelity, high: Fidelity) -> Strategy:
    """The strategy of that name, for a goal and a low and a high fidelity.

    Raises:
        ValueError: no such name; the message lists those that there are.
    """
    if name not in STRATEGIES:
        raise ValueError(f"no strategy {name!r}: choose one of {', '.join(sorted(STRATEGIES))}")
    return STRATEGIES[name](goal, low, high)
