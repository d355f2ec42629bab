"""What does it cost to window some heads of a layer? Stage 1 of BOSCH, arXiv 2604.05942.

From the top layer to the bottom one: a few choices of the asked share of the layer's heads are
tried, with the layers above left as they were decided; the best one is kept. A layer's cost is by
what the loss went up. Resuming the forward pass at the first changed layer makes a probe of layer
l cost L − l layers.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from afbs_compile.tuner.arrays import Floats, Ints
from afbs_compile.tuner.heads import Bits, Layout, lowest
from afbs_compile.tuner.tally import Tally


@dataclass(frozen=True, slots=True, eq=False)
class Probed:
    """What stage 1 found.

    Attributes:
        cost: What a layer adds to the loss [L]; rounding and luck may make it negative.
        bits: The choice of the cascade [N].
    """

    cost: Floats
    bits: Bits


def cascade(
    tally: Tally, layout: Layout, ratio: float, prior: Floats, each: int, rng: np.random.Generator
) -> Probed:
    """Probe every layer, with `each` choices at most.

    Args:
        tally: Where choices are evaluated.
        layout: What the bits are.
        ratio: The share of a layer's heads to window, rounded up.
        prior: Expected harm of every bit [N]; the least harmful choice is tried first.
        each: Choices a layer, at least 1.
        rng: Where the other choices come from.
    """
    bits = np.zeros(layout.size, dtype=bool)
    (before,) = tally([bits])
    cost = np.zeros(layout.layers)
    for layer in reversed(range(layout.layers)):
        tried = [bits | choice for choice in choices(layout, layer, ratio, prior, each, rng)]
        losses = tally(tried)
        bits = tried[int(np.argmin(losses))]
        cost[layer], before = min(losses) - before, min(losses)
    return Probed(cost, bits)


def choices(
    layout: Layout,
    layer: int,
    ratio: float,
    prior: Floats,
    each: int,
    rng: np.random.Generator,
) -> Iterator[Bits]:
    """Up to `each` different choices of a layer's heads, the least harmful one first."""
    among = layout.bits_of(layer)
    count = min(len(among), math.ceil(ratio * len(among) - 1e-9))
    first = lowest(prior, among, count, layout.size)
    yield first
    if math.comb(len(among), count) <= each:
        every = combinations(among.tolist(), count)
        drawn = (marked(np.array(chosen, dtype=np.int64), layout.size) for chosen in every)
    else:
        drawn = (
            marked(rng.choice(among, count, replace=False), layout.size) for _ in range(8 * each)
        )
    seen = {first.tobytes()}
    for bits in drawn:
        if len(seen) >= each:
            return
        if bits.tobytes() not in seen:
            seen.add(bits.tobytes())
            yield bits


def marked(chosen: Ints, size: int) -> Bits:
    """Bits [size] with those of `chosen` set."""
    bits = np.zeros(size, dtype=bool)
    bits[chosen] = True
    return bits
