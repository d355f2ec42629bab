"""Which heads can be windowed, how many must be, and by how many may a layer have them?

One bit a layer and KV group, in the order of the layers (all query heads of a group share keys and
values, so they go together). A ratio is met exactly: with the least number of groups that is no
less than it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from afbs_compile.tuner.arrays import Bools, Floats, Ints

Bits: TypeAlias = Bools
"""Which KV groups are windowed, bool [N]."""

ROUNDING = 1e-9  # of ratio · N


class Impossible(ValueError):
    """No choice of heads does what is asked for; the message says what would."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The KV groups of every layer, from the bottom to the top."""

    groups: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check that there is something to choose from."""
        if not self.groups or min(self.groups) < 1:
            raise Impossible(
                f"KV groups by layer are {list(self.groups)}; needed: a layer, a group in each"
            )

    @property
    def size(self) -> int:
        """N, the number of bits."""
        return sum(self.groups)

    @property
    def layers(self) -> int:
        """L, the number of layers."""
        return len(self.groups)

    @property
    def layer(self) -> Ints:
        """The layer of every bit [N]."""
        return np.repeat(np.arange(self.layers), self.groups)

    def bits_of(self, layer: int) -> Ints:
        """The bits of a layer."""
        return np.flatnonzero(self.layer == layer)

    def counts(self, bits: Bits) -> Ints:
        """Windowed groups of every layer [L]."""
        return np.bincount(self.layer, weights=bits, minlength=self.layers).astype(np.int64)

    def share(self, ratio: float) -> int:
        """How many bits a ratio asks for.

        Raises:
            Impossible: The ratio is not in [0, 1].
        """
        if not 0.0 <= ratio <= 1.0:
            raise Impossible(f"ratio is {ratio}; needed: a share of the heads, from 0 to 1")
        return math.ceil(ratio * self.size - ROUNDING)


def lowest(harm: Floats, among: Ints, count: int, size: int) -> Bits:
    """The `count` least harmful bits of `among`, as bits [size]; the first ones among equals."""
    bits = np.zeros(size, dtype=bool)
    bits[among[np.argsort(harm[among], kind="stable")[:count]]] = True
    return bits


def with_counts(harm: Floats, layout: Layout, counts: Sequence[int] | Ints) -> Bits:
    """The least harmful bits of every layer, so many each."""
    chosen = [
        lowest(harm, layout.bits_of(layer), int(count), layout.size)
        for layer, count in enumerate(counts)
    ]
    return np.asarray(np.logical_or.reduce(chosen), dtype=np.bool_)


def text(bits: Bits) -> str:
    """The bits as 0 and 1, in order."""
    return "".join("1" if bit else "0" for bit in bits)


def bits(written: str) -> Bits:
    """What `text` wrote."""
    return np.array([letter == "1" for letter in written], dtype=bool)
