"""How else are heads chosen? One registry: rules by layer, static rankings, single-stage searches.

All meet the ratio exactly. `bosch` stands among them, so that every claim is a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from afbs_compile.tuner import bosch
from afbs_compile.tuner.arrays import Floats
from afbs_compile.tuner.bosch import Found, Search
from afbs_compile.tuner.heads import Bits, Impossible, Layout, lowest
from afbs_compile.tuner.tally import Objective, OnBest, silent


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """What every method is asked.

    Attributes:
        objective: Losses of a batch of choices; rules and rankings do not look at it.
        wanted: Layout, ratio, budget, prior and seed.
        ranking: Expected harm of every bit [N] by the ranking's name.
        on_best: Told by searches.
        validate: Losses on held-out inputs, for searches.
        geometric: The same, whose loss is relative to nothing; None if this one's is not either.
    """

    objective: Objective
    wanted: Search
    ranking: Callable[[str], Floats]
    on_best: OnBest = silent
    validate: Objective | None = None
    geometric: "Question | None" = None

    @property
    def count(self) -> int:
        """Bits to set."""
        return self.wanted.layout.share(self.wanted.ratio)


Method = Callable[[Question], Found]


def by_layers(order: Callable[[int], Sequence[int]]) -> Method:
    """Whole layers in an order, the last one in part."""

    def choose(question: Question) -> Found:
        layout = question.wanted.layout
        bits = np.concatenate([layout.bits_of(layer) for layer in order(layout.layers)])
        return plain(layout, bits[: question.count])

    return choose


def by_ranking(name: str) -> Method:
    """The least harmful bits of a static ranking."""

    def choose(question: Question) -> Found:
        layout, harm = question.wanted.layout, question.ranking(name)
        return found(lowest(harm, np.arange(layout.size), question.count, layout.size))

    return choose


def by_search(prior: bool = True, finals: bool = True, **changes: object) -> Method:
    """A search that leaves something out, or has another solver."""

    def choose(question: Question) -> Found:
        wanted = replace(question.wanted, **changes)  # type: ignore[arg-type]
        wanted = wanted if prior else replace(wanted, prior=None, foresight=None)
        validate = question.validate if finals else None
        return bosch.search(question.objective, wanted, question.on_best, validate)

    return choose


def without_curvature(question: Question) -> Found:
    """A search that begins with the other rankings only; the first one is `curvature`.

    Raises:
        Impossible: There are no others.
    """
    wanted = question.wanted
    if not wanted.others:
        raise Impossible("no ranking is left without curvature: give --prior best")
    first, *others = wanted.others
    wanted = replace(wanted, prior=first, others=others, foresight=None)
    return bosch.search(question.objective, wanted, question.on_best, question.validate)


def by_mean(question: Question) -> Found:
    """A search for the geometric mean of the tasks' costs, relative to nothing."""
    return by_search()(question.geometric or question)


def at_random(question: Question) -> Found:
    """Any bits."""
    layout = question.wanted.layout
    order = np.random.default_rng(question.wanted.seed).permutation(layout.size)
    return plain(layout, order[: question.count])


def whole_layers(question: Question) -> Found:
    """Stages 1 and 2 with whole layers alone; `Impossible` where these do not add up."""
    most = max(question.wanted.layout.groups)
    wanted = replace(question.wanted, stages=("probes", "ratios"), levels=(0, most))
    return bosch.search(question.objective, wanted, question.on_best, question.validate)


def from_middle(layers: int) -> list[int]:
    """The middle layer, then its neighbours."""
    return sorted(range(layers), key=lambda layer: (abs(layer - (layers - 1) / 2), layer))


def interleaved(layers: int) -> list[int]:
    """Every second layer, then the others."""
    return [*range(1, layers, 2), *range(0, layers, 2)]


def plain(layout: Layout, chosen: np.ndarray) -> Found:
    """These bits, not evaluated."""
    bits = np.zeros(layout.size, dtype=bool)
    bits[chosen] = True
    return found(bits)


def found(bits: Bits) -> Found:
    """A choice that needed no evaluation."""
    return Found(bits, np.inf, 0, {}, (), None, True)


METHODS: dict[str, Method] = {
    "bosch": by_search(),
    "bosch-cold": by_search(prior=False),
    "one-prior": by_search(others=()),
    "no-curvature": without_curvature,
    "no-foresight": by_search(foresight=None),
    "no-finals": by_search(finals=False),
    "geometric": by_mean,
    "stages-1-2": by_search(stages=("probes", "ratios")),
    "no-ratios": by_search(stages=("probes", "groups", "exchange")),
    "no-exchange": by_search(stages=("probes", "ratios", "groups")),
    "one-stage-lns": by_search(stages=("exchange",)),
    "one-stage-swaps": by_search(prior=False, stages=("exchange",), solver="swaps"),
    "one-stage-random": by_search(prior=False, stages=("exchange",), solver="random"),
    "whole-layers": whole_layers,
    "curvature": by_ranking("curvature"),
    "fisher": by_ranking("fisher"),
    "retrieval": by_ranking("retrieval"),
    "locality": by_ranking("locality"),
    "begin": by_layers(range),
    "middle": by_layers(from_middle),
    "end": by_layers(lambda layers: range(layers - 1, -1, -1)),
    "interleaved": by_layers(interleaved),
    "random": at_random,
}
SEEDED = (
    "bosch", "bosch-cold", "one-prior", "no-curvature", "no-foresight", "no-finals", "geometric",
    "stages-1-2", "no-ratios", "no-exchange", "one-stage-lns", "one-stage-swaps",
    "one-stage-random", "whole-layers", "random",
)  # fmt: skip
CHEAP = (
    "curvature", "fisher", "retrieval", "locality", "begin", "middle", "end", "interleaved",
    "random",
)  # fmt: skip
