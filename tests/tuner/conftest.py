"""Synthetic sites: the landscapes that the tuner's tests search.

Shapes as measured on SmolLM2-135M: log error nearly a straight line in u, slightly curved, in
small steps (blocks are discrete); density an S-curve in u; a low fidelity is off by a few
percent. Some heads have no error at all, some never reach a cap.
"""

import functools
from dataclasses import dataclass, replace

import numpy as np
import pytest

from afbs_compile.tuner.objective import U_MAX, Measured


@dataclass(frozen=True)
class Landscape:
    """One site's heads; every field but `calls` has one entry a head."""

    intercept: np.ndarray  # log error at u = 0
    slope: np.ndarray  # of log error
    curvature: np.ndarray
    ripple: np.ndarray  # height of steps in log error
    middle: np.ndarray  # u where density is half-way
    base: np.ndarray  # density at u → −∞
    exact_from: np.ndarray  # u from which the error is 0
    bias: np.ndarray  # of log error at low fidelity

    @property
    def heads(self):
        return len(self.slope)

    def error(self, u, low=False):
        wave = self.ripple * np.sin(25.0 * u + 7.0 * self.middle)
        log_error = self.intercept - self.slope * u - 0.5 * self.curvature * u**2 + wave
        error = np.exp(log_error + (self.bias * np.cos(3.0 * u) if low else 0.0))
        return np.where(u >= self.exact_from, 0.0, error)

    def density(self, u):
        share = 1.0 / (1.0 + np.exp(-1.3 * (u - self.middle)))
        return np.clip(self.base + (1.0 - self.base) * share, 0.0, 1.0)

    def __call__(self, u, fidelity):
        assert u.shape == (self.heads,)
        assert np.all((u >= 0.0) & (u <= U_MAX))
        return Measured(self.error(u, low=fidelity.cost < 1.0), self.density(u))

    def taken(self, order):
        """The same site with its heads in another order."""
        fields = {name: value[order] for name, value in vars(self).items()}
        return Landscape(**fields)

    def shifted(self, log_factor):
        """The same heads on another input: errors exp(log_factor) times as large."""
        return replace(
            self, intercept=self.intercept + log_factor, middle=self.middle - 0.2 * log_factor
        )


def make_landscape(seed, heads, hopeless=0.0, exact=0.0):
    """A site of `heads` heads; shares of them never feasible, and without error from some u."""
    rng = np.random.default_rng(seed)
    never, zero = rng.random(heads) < hopeless, rng.random(heads) < exact
    return Landscape(
        intercept=np.where(never, 0.0, np.log(rng.uniform(0.1, 0.7, heads))),
        slope=np.where(never, 0.02, rng.uniform(0.8, 2.4, heads)),
        curvature=np.where(never, 0.0, rng.uniform(-0.1, 0.2, heads)),
        ripple=rng.uniform(0.0, 0.02, heads),
        middle=rng.uniform(1.0, 3.2, heads),
        base=rng.uniform(0.02, 0.2, heads),
        exact_from=np.where(zero, rng.uniform(-1.0, 2.0, heads), np.inf),
        bias=0.05 * rng.standard_normal(heads),
    )


@dataclass(frozen=True)
class Leveled:
    """The same heads with lambda: it adds error of its own and saves a share of the work."""

    base: Landscape
    amount: np.ndarray  # error that the strictest level adds
    saving: np.ndarray  # share of the work that it leaves out, at most a half
    lambdas: tuple[float, ...] = (-np.inf, -7.0, -5.0, -3.0, -1.0)

    @property
    def heads(self):
        return self.base.heads

    def __call__(self, u, fidelity, level=None):
        level = np.zeros(self.heads, dtype=int) if level is None else level
        assert np.all((level >= 0) & (level < len(self.lambdas)))
        strictness = np.array(self.lambdas)[level] + 1.0  # −inf … 0
        plain = self.base(u, fidelity)
        error = np.hypot(plain.error, self.amount * np.exp(0.6 * strictness))
        return Measured(error, plain.density * (1.0 - self.saving * np.exp(0.4 * strictness)))

    def taken(self, order):
        return Leveled(self.base.taken(order), self.amount[order], self.saving[order])

    def shifted(self, log_factor):
        return replace(self, base=self.base.shifted(log_factor))


@dataclass(frozen=True)
class Profiled(Leveled):
    """The same, all of it looked up."""

    profile_cost: float = 4.5


def make_leveled(seed, heads, kind=Leveled, **shares):
    """A site of `heads` heads with five levels of lambda."""
    rng = np.random.default_rng(seed + 1)
    amount, saving = rng.uniform(0.02, 0.4, heads), rng.uniform(0.0, 0.4, heads)
    return kind(make_landscape(seed, heads, **shares), amount, saving)


@pytest.fixture(scope="session")
def landscape():
    return make_landscape


@pytest.fixture(scope="session")
def leveled():
    return make_leveled


@pytest.fixture(scope="session")
def profiled():
    return functools.partial(make_leveled, kind=Profiled)
