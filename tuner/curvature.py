"""Which heads can be windowed together? The quadratic form of the loss, and its least choice.

Near the dense model KL(dense ‖ hybrid) is zᵀ Q z, Q half the Fisher information of the heads'
gates: its diagonal is what a head costs alone, the rest how heads that stand in for each other
cost more together. Q comes from a few slopes, so its correlations are shrunk towards none as much
as their noise asks for (Schäfer & Strimmer 2005). A choice costs nothing to judge then, and swaps
lead to one that no swap betters.
"""

from collections.abc import Callable

import numpy as np

from afbs_compile.tuner.arrays import Floats, Ints
from afbs_compile.tuner.heads import Bits, lowest
from afbs_compile.tuner.relative import FLOOR, geometric

TINY = 1e-30


def shrunk(samples: Floats) -> Floats:
    """The mean of x xᵀ [N, N] over samples x [M, N], its correlations shrunk by their noise."""
    count = len(samples)
    deviation = np.sqrt(np.mean(samples**2, 0))
    unit = samples / np.maximum(deviation, TINY)
    mean = unit.T @ unit / count
    square = (unit**2).T @ unit**2 / count
    noise = (square - mean**2) / max(count - 1, 1)  # variance of each mean product
    for matrix in (noise, signal := mean**2):
        np.fill_diagonal(matrix, 0.0)
    share = min(1.0, float(noise.sum()) / max(float(signal.sum()), TINY)) if count > 1 else 1.0
    mean *= 1.0 - share
    np.fill_diagonal(mean, 1.0)
    return np.asarray(mean * deviation * deviation[:, None], dtype=np.float64)


def units(forms: Floats) -> Floats:
    """Quadratic forms [T, N, N] whose tasks cost 1 if all heads are windowed."""
    return np.asarray(forms / np.maximum(forms.sum((1, 2)), TINY)[:, None, None])


def least(forms: Floats, count: int) -> Bits:
    """`count` bits that no single swap betters, from the least harmful ones alone on.

    Args:
        forms: What windowing costs in every task, as quadratic forms [T, N, N].
        count: Bits to set.
    """
    forms = units(forms)
    alone = np.einsum("tnn->tn", forms)
    size = alone.shape[1]
    bits = lowest(alone.mean(0), np.arange(size), count, size)
    best = float(geometric(forms[:, bits][:, :, bits].sum((1, 2))))

    def losses(bits: Bits, on: Ints, off: Ints) -> Floats:
        return geometric(swapped(forms, bits, on, off))

    return descended(losses, bits, np.arange(size), best)


def descended(
    losses: Callable[[Bits, Ints, Ints], Floats],
    bits: Bits,
    free: Ints,
    best: float,
    most: float = np.inf,
) -> Bits:
    """Where single swaps of free bits lead, each the one that gains most, until none gains.

    Args:
        losses: After each swap of a choice, a set bit for an unset one [on, off].
        bits: Where to begin [N].
        free: The bits that may change.
        best: The loss there.
        most: Swaps at most.
    """
    bits, done = bits.copy(), 0
    while done < most:
        on, off = free[bits[free]], free[~bits[free]]
        if not len(on) or not len(off):
            break
        after = losses(bits, on, off)
        n, m = np.unravel_index(int(np.argmin(after)), after.shape)
        if after[n, m] >= best * (1 - 1e-9):
            break
        best, done = after[n, m], done + 1
        bits[on[n]], bits[off[m]] = False, True
    return bits


def swapped(forms: Floats, bits: Bits, on: Ints, off: Ints) -> Floats:
    """What every task costs after each swap [T, on, off]."""
    z = bits.astype(float)
    sums, alone = forms @ z, np.einsum("tnn->tn", forms)
    now = (sums @ z)[:, None, None]
    taken = alone[:, on] - 2 * sums[:, on]
    given = alone[:, off] + 2 * sums[:, off]
    between = forms[:, on][:, :, off]
    return np.asarray(now + taken[:, :, None] + given[:, None] - 2 * between)


def harms(forms: Floats, count: int) -> Floats:
    """A ranking [N] whose `count` least harmful bits are `least`'s: what each adds there.

    In relative changes of the cost; the bits of the choice never rank behind others.
    """
    bits, forms = least(forms, count), units(forms)
    z = bits.astype(float)
    sums, alone = forms @ z, np.einsum("tnn->tn", forms)
    change = 2 * sums + np.where(bits, -alone, alone)
    now = np.maximum(sums @ z, 0.0) + FLOOR
    harm = np.asarray((change / now[:, None]).mean(0), dtype=np.float64)
    if 0 < count < len(bits):
        harm[bits] = np.minimum(harm[bits], np.nextafter(harm[~bits].min(), -np.inf))
    return harm
