"""What will a choice of windowed heads cost? Bayesian linear regression on bits and layer counts.

loss ≈ loss of the incumbent + Σ_i harm_i Δz_i + Σ_l bend_l Δc_l², c_l the windowed groups of layer
l: heads of a layer stand in for each other, so their harms do not add up. The weights are
N(ρ · prior, s² D) around a static ranking, what the sum leaves out is N(0, s² γ); s² has a closed
form, ρ and γ maximise the evidence over a grid (Bishop 2006, §3.5, in the eigenbasis of the data).
Choices near the incumbent weigh more, since the sum is only right nearby.
"""

from dataclasses import dataclass

import numpy as np

from afbs_compile.tuner.arrays import Bools, Floats
from afbs_compile.tuner.heads import Bits, Layout

REACH = 0.15  # of all bits: choices that far away weigh a quarter
BEND = 0.3  # prior deviation of bends, of that of harms
TRUST = (0.0, 0.25, 0.5, 1.0)  # ρ
LEFT_OUT = (0.03, 0.1, 0.3, 1.0, 3.0)  # γ, in units of the variance of one harm
TINY = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class Surrogate:
    """A posterior over the weights of `features`.

    Attributes:
        layout: What the bits are.
        mean: Weights [F].
        root: Square root of their covariance [F, F].
    """

    layout: Layout
    mean: Floats
    root: Floats

    def harms(self) -> Floats:
        """Mean harm of every bit [N] where no other bit of its layer is set."""
        return self.mean[: self.layout.size] + self.mean[self.layout.size + self.layout.layer]

    def sample(self, rng: np.random.Generator, count: int) -> Floats:
        """Weights drawn from the posterior [count, F]."""
        return self.mean + rng.standard_normal((count, len(self.mean))) @ self.root.T


def features(strings: Bools, layout: Layout) -> Floats:
    """Bits and squared counts by layer [n, N + L]."""
    starts = [0, *np.cumsum(layout.groups)[:-1].tolist()]
    counts = np.add.reduceat(strings.astype(float), starts, axis=1)
    return np.concatenate([strings, counts**2], axis=1)


def fit(strings: Bools, losses: Floats, layout: Layout, prior: Floats, centre: Bits) -> Surrogate:
    """The posterior after some evaluations.

    Args:
        strings: Choices [n, N], n ≥ 1.
        losses: Of each [n].
        layout: What the bits are.
        prior: Expected harm of every bit [N], ≥ 0, in units of the loss.
        centre: The incumbent [N].
    """
    distance = (strings != centre).mean(1)
    weight = 1.0 / (1.0 + distance / REACH)  # square root of what a choice counts
    start = np.concatenate([prior, np.zeros(layout.layers)])
    deviation = deviations(prior, layout)
    x = features(strings, layout) - features(centre[None], layout)
    scaled = weight[:, None] * x * deviation
    values, basis = np.linalg.eigh(scaled.T @ scaled)
    values = np.maximum(values, 0.0)
    rises = weight * (losses - losses[np.argmin(distance)])
    best, mean, root = -np.inf, start, np.diag(deviation)
    for trust in TRUST:
        rest = rises - weight * (x @ (trust * start))
        shadow = basis.T @ (scaled.T @ rest)  # [F]
        for gamma in LEFT_OUT:
            shrunk = shadow / (values + gamma)
            unit = max(float(rest @ rest - shadow @ shrunk) / gamma / len(rest), TINY)
            determinant = np.log1p(values / gamma).sum() + len(rest) * np.log(gamma)
            evidence = -len(rest) * np.log(unit) - determinant
            if evidence > best:
                best = evidence
                mean = trust * start + deviation * (basis @ shrunk)
                spread = np.sqrt(unit * gamma / (values + gamma))
                root = deviation[:, None] * basis * spread
    return Surrogate(layout, mean, root)


def deviations(prior: Floats, layout: Layout) -> Floats:
    """Relative prior deviation of the weights [F]: harms that look large may be far off."""
    each = np.concatenate([prior + prior.mean(), np.full(layout.layers, 2 * BEND * prior.mean())])
    return each / max(float(each.mean()), TINY)
