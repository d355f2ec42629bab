"""What will a choice of heads cost in every task? Quadratic forms, put right by evaluations.

The forms (`curvature`) are what windowing costs near the dense model. Further off a head costs
more or less than they say: log cost ≈ log form + a sum over the windowed heads. So a choice that
nobody evaluated is judged by Bayesian linear regression of these parts around the incumbent
(Bishop 2006, §3.3, γ by its evidence). All swaps are judged at once, since what one changes in a
form needs no new product.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from afbs_compile.tuner.arrays import Bools, Floats, Ints
from afbs_compile.tuner.curvature import descended, swapped
from afbs_compile.tuner.heads import Bits
from afbs_compile.tuner.relative import FLOOR

REACH = 0.15  # of all bits: evaluations that far away weigh a quarter
NOISES = (
    0.1,
    0.3,
    1.0,
    3.0,
    10.0,
)  # γ: what the sum leaves out, by the variance of one head's part
TYPICAL = 0.05  # a head's part before anything is known
TRUSTED = 4.0  # evaluations that this knowledge is worth


@dataclass(frozen=True, slots=True, eq=False)
class Foresight:
    """What a search knows of its objective, beside losses.

    Attributes:
        forms: Of every task [T, N, N], 1 with all heads windowed (`curvature.units`).
        costs: Of choices that were evaluated [T, n], 1 with all heads windowed.
        join: The losses [...] of costs [T, ...].
    """

    forms: Floats
    costs: Callable[[Sequence[Bits]], Floats]
    join: Callable[[Floats], Floats]

    def by_form(self, strings: Bools) -> Floats:
        """Costs of choices [n, N] by the forms alone [T, n]."""
        z = strings.astype(float)
        return np.asarray(np.einsum("tni,ni->tn", z @ self.forms, z))

    def plain(self, references: Sequence[Bits]) -> "View":
        """How swaps look before anything is known but what each task is compared with.

        The forms are taken to be right about choices `references`.
        """
        tasks, size = self.forms.shape[:2]
        shift = np.zeros(tasks)
        if len(references):
            chosen = np.array(references)
            true, told = self.costs(references), self.by_form(chosen)
            shift = np.log(np.maximum(true, 0) + FLOOR).mean(1) - np.log(told + FLOOR).mean(1)
        return View(self, shift, np.zeros((tasks, size)))


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """Forms with a correction: log cost = log form + shift [T] + parts [T, N] · bits."""

    foresight: Foresight
    shift: Floats
    parts: Floats

    def swaps(self, bits: Bits, on: Ints, off: Ints) -> Floats:
        """Losses [on, off] after swaps."""
        changed = self.parts[:, None, off] - self.parts[:, on, None]
        offset = self.shift + self.parts @ bits
        told = np.maximum(swapped(self.foresight.forms, bits, on, off), 0.0) + FLOOR
        return self.foresight.join(told * np.exp(changed + offset[:, None, None]) - FLOOR)

    def loss(self, bits: Bits) -> float:
        """The loss of a choice."""
        told = self.foresight.by_form(bits[None])[:, 0] + FLOOR
        return float(self.foresight.join(told * np.exp(self.shift + self.parts @ bits) - FLOOR))

    def descent(self, bits: Bits, free: Ints, most: int) -> Bits:
        """Where up to so many single swaps of free bits lead, each the one that gains most."""
        return descended(self.swaps, bits, free, self.loss(bits), most)


def views(
    foresight: Foresight, strings: Bools, centre: Bits, rng: np.random.Generator, count: int
) -> list[View]:
    """Samples of the posterior after some evaluations.

    Args:
        foresight: What is known before.
        strings: Choices that were evaluated [n, N], the incumbent among them.
        centre: The incumbent [N].
        rng: Of the samples.
        count: Of them.
    """
    costs = np.maximum(foresight.costs(list(strings)), 0.0) + FLOOR
    rest = np.log(costs) - np.log(foresight.by_form(strings) + FLOOR)
    distance = (strings != centre).mean(1)
    here = rest[:, int(np.argmin(distance))]
    weight = 1.0 / (1.0 + distance / REACH)
    x = weight[:, None] * (strings.astype(float) - centre)
    y = (weight * (rest - here[:, None])).T  # [n, T]
    values, basis = np.linalg.eigh(x.T @ x)
    values = np.maximum(values, 0.0)
    mean, spread = posterior(values, basis.T @ (x.T @ y), (y**2).sum(0), len(x))
    drawn = rng.standard_normal((count, *mean.shape)) * spread + mean  # [count, N, T]
    parts = [(basis @ one).T for one in drawn]
    return [View(foresight, here - own @ centre, own) for own in parts]


def posterior(values: Floats, shadow: Floats, square: Floats, count: int) -> tuple[Floats, Floats]:
    """Mean and deviation [N, T] of the parts in the eigenbasis, of the γ with most evidence.

    Args:
        values: Eigenvalues of the evaluations' products [N].
        shadow: Their products with the targets there [N, T].
        square: Squared length of the targets [T].
        count: Evaluations.
    """
    best, found = -np.inf, (np.zeros_like(shadow), np.zeros_like(shadow))
    for gamma in NOISES:
        shrunk = shadow / (values[:, None] + gamma)
        left = np.maximum(square - (shadow * shrunk).sum(0), 0.0) / gamma
        variance = (left + TRUSTED * TYPICAL**2) / (count + TRUSTED)
        determinant = np.log1p(values / gamma).sum() + count * np.log(gamma)
        evidence = -((count + TRUSTED) * np.log(variance)).sum() - len(square) * determinant
        if evidence > best:
            best = evidence
            found = shrunk, np.sqrt(variance * gamma / (values[:, None] + gamma))
    return found
