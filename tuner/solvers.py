"""How is a subset of heads improved without changing how many are windowed? Solvers, one registry.

`lns` is large neighbourhood search (Shaw 1998): candidates exchange some windowed heads for global
ones; a sample of a posterior says which to evaluate (Thompson 1933), the surrogate's or, if there
is foresight, that of the costs in every task. `swaps` is
local search by random single swaps, `random` draws anew. They differ in nothing else. `nomad` asks
another program.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from afbs_compile.tuner.arrays import Bools, Floats, Ints
from afbs_compile.tuner.foresight import Foresight, View, views
from afbs_compile.tuner.heads import Bits, Layout, bits
from afbs_compile.tuner.surrogate import features, fit
from afbs_compile.tuner.tally import Tally

BATCH = 4  # evaluated together, by as many workers; fixed, so that results do not hang on it
POOL = 96  # candidates that a sample of the surrogate ranks
LARGEST = 6  # swaps of one step
TRIES = 20  # pools without anything new before a neighbourhood counts as exhausted


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """One subset to be improved.

    Attributes:
        tally: Where candidates are evaluated.
        layout: What the bits are.
        prior: Expected harm of every bit [N].
        start: The choice to begin with [N].
        free: The bits that may change; how many of them are set does not.
        budget: Evaluations that may be spent.
        rng: Where chance comes from.
        foresight: What is known of the loss beside losses, or None.
    """

    tally: Tally
    layout: Layout
    prior: Floats
    start: Bits
    free: Ints
    budget: int
    rng: np.random.Generator
    foresight: Foresight | None = None


Solver = Callable[[Task], Bits]
"""The best choice found, `start` at worst."""


def improve(task: Task, propose: Callable[[Task, Bits], list[Bits]]) -> Bits:
    """Evaluate what `propose` makes of the incumbent, and go where it is better."""
    tally, end = task.tally, max(0, task.tally.left - task.budget)
    incumbent = task.start
    (loss,) = tally([incumbent])
    while tally.left > end:
        batch = propose(task, incumbent)[: tally.left - end]
        if not batch:
            break
        losses = tally(batch)
        if min(losses) < loss:
            loss = min(losses)
            incumbent = batch[losses.index(loss)]
    return incumbent


def lns(task: Task) -> Bits:
    """Large neighbourhood search with the surrogate, or with foresight."""
    return improve(task, foreseen if task.foresight else thompson)


def swaps(task: Task) -> Bits:
    """Random single swaps."""
    return improve(task, lambda task, bits: fresh(task, lambda: swapped(task, bits, 1)))


def scatter(task: Task) -> Bits:
    """Random choices of the free bits."""
    return improve(task, lambda task, bits: fresh(task, lambda: shuffled(task, bits)))


def nomad(task: Task) -> Bits:
    """MADS, by NOMAD in another process."""
    from afbs_compile.tuner.nomad import mads

    return mads(task)


SOLVERS: dict[str, Solver] = {"lns": lns, "swaps": swaps, "random": scatter, "nomad": nomad}


def thompson(task: Task, incumbent: Bits) -> list[Bits]:
    """For each of `BATCH` samples of the surrogate, the best new neighbour."""
    strings, losses = task.tally.evidence()
    if not len(losses):
        return fresh(task, lambda: swapped(task, incumbent, 1))
    model = fit(strings, losses, task.layout, task.prior, incumbent)
    batch: list[Bits] = []
    for weights in model.sample(task.rng, BATCH):
        pool = neighbours(task, incumbent, weights[: task.layout.size])
        order = np.argsort(features(pool, task.layout) @ weights, kind="stable")
        taken = {bits.tobytes() for bits in batch}
        new = (n for n in order if pool[n].tobytes() not in taken and not task.tally.has(pool[n]))
        if (first := next(new, None)) is not None:
            batch.append(pool[first])
    return batch or fresh(task, lambda: swapped(task, incumbent, 1))


def foreseen(task: Task, incumbent: Bits) -> list[Bits]:
    """For each of `BATCH` samples of what may be so, where its best swaps lead."""
    assert task.foresight
    strings = np.array([bits(name) for name, _ in task.tally.finite()])
    batch: list[Bits] = []
    for view in views(task.foresight, strings, incumbent, task.rng, BATCH):
        found = view.descent(incumbent, task.free, LARGEST)
        taken = {one.tobytes() for one in batch}
        if task.tally.has(found) or found.tobytes() in taken:
            found = next_best(task, view, found, taken)
        batch.append(found)
    return [one for one in batch if not task.tally.has(one)] or fresh(
        task, lambda: swapped(task, incumbent, 1)
    )


def next_best(task: Task, view: View, start: Bits, taken: set[bytes]) -> Bits:
    """The best single swap that nobody evaluated; `start` if all were."""
    on, off = task.free[start[task.free]], task.free[~start[task.free]]
    losses = view.swaps(start, on, off)
    for place in np.argsort(losses, axis=None, kind="stable"):
        n, m = np.unravel_index(int(place), losses.shape)
        found = start.copy()
        found[on[n]], found[off[m]] = False, True
        if not task.tally.has(found) and found.tobytes() not in taken:
            return found
    return start


def neighbours(task: Task, incumbent: Bits, harm: Floats) -> Bools:
    """Choices [POOL, N] one or more swaps away: half by chance, half by sampled harm."""
    sizes = np.minimum(task.rng.geometric(0.5, POOL), LARGEST)
    by_chance = [swapped(task, incumbent, int(k)) for k in sizes[: POOL // 2]]
    by_harm = [repaired(task, incumbent, harm, int(k)) for k in sizes[POOL // 2 :]]
    return np.array(by_chance + by_harm)


def swapped(task: Task, bits: Bits, count: int) -> Bits:
    """`count` free windowed heads changed for as many free global ones, if there are as many."""
    on, off = task.free[bits[task.free]], task.free[~bits[task.free]]
    count = min(count, len(on), len(off))
    result = bits.copy()
    result[task.rng.choice(on, count, replace=False)] = False
    result[task.rng.choice(off, count, replace=False)] = True
    return result


def repaired(task: Task, bits: Bits, harm: Floats, count: int) -> Bits:
    """Some free heads, at least `2 · count`, assigned anew by least harm."""
    most = min(len(task.free), 8 * count)
    torn = task.rng.choice(task.free, most, replace=False)
    keep = int(bits[torn].sum())
    result = bits.copy()
    result[torn] = False
    result[torn[np.argsort(harm[torn], kind="stable")[:keep]]] = True
    return result


def shuffled(task: Task, bits: Bits) -> Bits:
    """The free bits in random order."""
    result = bits.copy()
    result[task.free] = task.rng.permutation(bits[task.free])
    return result


def fresh(task: Task, draw: Callable[[], Bits]) -> list[Bits]:
    """Up to `BATCH` different draws that were not evaluated; none if chance finds none."""
    batch: dict[bytes, Bits] = {}
    for _ in range(TRIES * BATCH):
        bits = draw()
        if not task.tally.has(bits):
            batch[bits.tobytes()] = bits
        if len(batch) == BATCH:
            break
    return list(batch.values())
