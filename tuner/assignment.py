"""Which rank gets which sample, so that the slowest is as fast as can be? Greedy and differencing.

`lpt` is longest processing time first (Graham 1969): at most (4/3 − 1/(3·bins)) times the optimum.
`karmarkar_karp` is the differencing method (Karmarkar & Karp 1982, for k bins: Korf 2009). Both
are deterministic: ties go to the sample that comes first, then to the bin that comes first.
"""

import heapq
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from afbs_compile.tuner.arrays import Floats, Ints

Assign: TypeAlias = Callable[[Floats, int, bool], Ints]


def lpt(costs: ArrayLike, bins: int, equal: bool = False) -> Ints:
    """The bin of every item: the costliest item first, each to the bin of least load.

    Args:
        costs: Costs ≥ 0 [N].
        bins: How many bins, ≥ 1.
        equal: Whether the numbers of items in two bins may differ by one at most.

    Raises:
        ValueError: A cost is negative or no number, or there is no bin.
    """
    cost = checked(costs, bins)
    floor, extras = divmod(len(cost), bins) if equal else (len(cost), 0)
    count, where = [0] * bins, np.empty(len(cost), dtype=np.int64)
    heap = [(0.0, bin_) for bin_ in range(bins)]
    for item in np.argsort(-cost, kind="stable").tolist():
        load, bin_ = heapq.heappop(heap)
        while count[bin_] >= floor + (extras > 0):  # it is full
            load, bin_ = heapq.heappop(heap)
        extras -= count[bin_] >= floor
        where[item] = bin_
        count[bin_] += 1
        heapq.heappush(heap, (load + float(cost[item]), bin_))
    return where


def karmarkar_karp(costs: ArrayLike, bins: int, equal: bool = False) -> Ints:
    """The bin of every item by the largest differencing method.

    Partial partitions are joined, the two most uneven ones first, the fullest bin of one with the
    emptiest of the other. `bins` × log `bins` work for each item: for up to a few hundred bins.

    Args:
        costs: Costs ≥ 0 [N].
        bins: How many bins, ≥ 1.
        equal: Whether the numbers of items in two bins may differ by one at most.

    Raises:
        ValueError: A cost is negative or no number, or there is no bin.
    """
    cost = checked(costs, bins)
    order = np.argsort(-cost, kind="stable").tolist()
    step = bins if equal else 1
    # A partition: loads of its bins, fullest first, and the items of each.
    heap = []
    for number, start in enumerate(range(0, len(order), step)):
        items = order[start : start + step]
        loads = np.zeros(bins)
        loads[: len(items)] = cost[items]
        groups = [[item] for item in items] + [[] for _ in range(bins - len(items))]
        heap.append((-spread(loads), number, loads, groups))
    heapq.heapify(heap)
    for number in range(len(heap), 2 * len(heap) - 1):
        _, _, one, ones = heapq.heappop(heap)
        _, _, other, others = heapq.heappop(heap)
        loads = one + other[::-1]
        groups = [a + b for a, b in zip(ones, reversed(others), strict=True)]
        down = np.argsort(-loads, kind="stable")
        joined = (loads[down], [groups[n] for n in down])
        heapq.heappush(heap, (-spread(joined[0]), number, *joined))
    return placed(heap[0][3], len(cost)) if heap else np.empty(0, dtype=np.int64)


def deal(costs: ArrayLike, bins: int, equal: bool = True) -> Ints:
    """The bin of every item in the order given, like cards: costs do not matter."""
    cost = checked(costs, bins)
    return np.arange(len(cost), dtype=np.int64) % bins if equal else lpt(np.ones(len(cost)), bins)


def snake(costs: ArrayLike, bins: int, equal: bool = True) -> Ints:
    """Sorted by cost and dealt there and back: 0 1 2 2 1 0 0 1 … What sorting alone can do."""
    cost = checked(costs, bins)
    turn = np.arange(len(cost)) % (2 * bins)
    where = np.empty(len(cost), dtype=np.int64)
    where[np.argsort(-cost, kind="stable")] = np.minimum(turn, 2 * bins - 1 - turn)
    return where


ASSIGNERS: dict[str, Assign] = {
    "lpt": lpt,
    "karmarkar-karp": karmarkar_karp,
    "deal": deal,
    "snake": snake,
}


def loads(costs: ArrayLike, where: Ints, bins: int) -> Floats:
    """Summed cost of every bin [bins]."""
    return np.bincount(where, np.asarray(costs, float), bins).astype(np.float64)


def lower_bound(costs: ArrayLike, bins: int) -> float:
    """No assignment's largest load is below the mean load, nor below the costliest item."""
    cost = checked(costs, bins)
    return float(max(cost.sum() / bins, cost.max(initial=0.0)))


def members(where: Ints, bins: int) -> list[list[int]]:
    """The items of every bin, ascending."""
    result: list[list[int]] = [[] for _ in range(bins)]
    for item, bin_ in enumerate(where.tolist()):
        result[bin_].append(item)
    return result


def placed(groups: Sequence[Sequence[int]], items: int) -> Ints:
    """The bin of every item, bins in the order of their first items."""
    where = np.empty(items, dtype=np.int64)
    for bin_, group in enumerate(sorted(groups, key=lambda g: min(g, default=items))):
        where[list(group)] = bin_
    return where


def spread(sorted_loads: Floats) -> float:
    """Largest minus least load."""
    return float(sorted_loads[0] - sorted_loads[-1])


def checked(costs: ArrayLike, bins: int) -> Floats:
    """Costs as an array.

    Raises:
        ValueError: A cost is negative or no number, or there is no bin.
    """
    cost = np.asarray(costs, dtype=np.float64)
    if cost.ndim != 1 or not np.isfinite(cost).all() or (cost < 0.0).any():
        raise ValueError(f"costs of shape {cost.shape} need finite numbers ≥ 0 in one row")
    if bins < 1:
        raise ValueError(f"bins is {bins}, need 1 or more")
    return cost
