"""How many heads of which layer are windowed? Stage 2 of BOSCH, arXiv 2604.05942.

Layers in the order of their cost fall into bins, from easy to hard, and a bin gets a share of
windowed heads: the global one and more, or less. A layer's share is one of its levels. Then layers
move between neighbouring levels until the global number is met: of all ways to meet it the one
that moves least, easy layers upwards and hard ones downwards first (dynamic programming, exact).
"""

from collections.abc import Sequence

import numpy as np

from afbs_compile.tuner.arrays import Floats, Ints
from afbs_compile.tuner.heads import Impossible, Layout

STEPS = (0.375, 0.1875, 0.0, -0.1875, -0.375)  # of the ratio, from the easiest bin to the hardest


def levels_of(layout: Layout, levels: Sequence[int] | None) -> list[list[int]]:
    """The numbers of windowed groups that each layer may have; None allows all.

    Raises:
        Impossible: A level is no number of groups.
    """
    if levels is None:
        return [list(range(groups + 1)) for groups in layout.groups]
    if not levels or min(levels) < 0:
        raise Impossible(f"levels are {list(levels)}; needed: numbers of groups a layer, ≥ 0")
    return [sorted({level for level in levels if level <= groups}) for groups in layout.groups]


def adapted(
    cost: Floats, layout: Layout, ratio: float, levels: Sequence[int] | None = None
) -> Ints:
    """Windowed groups of every layer [L]; they add up to the ratio's number exactly.

    Args:
        cost: What windowing costs in each layer [L].
        layout: The layers.
        ratio: Global share of windowed groups.
        levels: The numbers that a layer may have; None allows all.

    Raises:
        Impossible: The levels cannot add up to it.
    """
    allowed = levels_of(layout, levels)
    hardness = np.argsort(np.argsort(cost, kind="stable"), kind="stable") / max(
        1, layout.layers - 1
    )
    wanted = np.zeros(layout.layers)
    for step, members in zip(
        STEPS, np.array_split(np.argsort(cost, kind="stable"), len(STEPS)), strict=True
    ):
        for layer in members:
            share = min(1.0, max(0.0, ratio + step)) * layout.groups[layer]
            wanted[layer] = min(allowed[layer], key=lambda level: abs(level - share))
    return nearest(wanted, hardness, allowed, layout.share(ratio))


def nearest(
    wanted: Floats, hardness: Floats, allowed: Sequence[Sequence[int]], total: int
) -> Ints:
    """Levels [L] that add up to `total` and move least from `wanted` [L].

    A step up costs 1 + hardness, one down 2 − hardness.

    Raises:
        Impossible: No levels add up to it.
    """
    least: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for layer, options in enumerate(allowed):
        following: dict[int, tuple[float, tuple[int, ...]]] = {}
        for sum_, (price, path) in least.items():
            for level in options:
                move = level - wanted[layer]
                rate = 1 + hardness[layer] if move > 0 else 2 - hardness[layer]
                after = price + abs(move) * float(rate)
                if sum_ + level <= total and (
                    sum_ + level not in following or after < following[sum_ + level][0]
                ):
                    following[sum_ + level] = after, (*path, level)
        least = following
    if total not in least:
        raise Impossible(unreachable(allowed, total))
    return np.array(least[total][1], dtype=np.int64)


def unreachable(allowed: Sequence[Sequence[int]], total: int) -> str:
    """What to say if no levels add up to `total`."""
    sums = {0}
    for options in allowed:
        sums = {sum_ + level for sum_ in sums for level in options}
    size = max(sums)
    near = [max((s for s in sums if s < total), default=None),
            min((s for s in sums if s > total), default=None)]  # fmt: skip
    instead = " or ".join(f"{n / size:.4g} ({n} groups)" for n in near if n is not None)
    return (
        f"the ratio asks for {total} windowed groups, which layers with "
        f"{sorted({level for options in allowed for level in options})} each cannot add up to; "
        f"give the ratio {instead}, or more levels"
    )
