"""What does the search ask, and what is it told? The protocol between search and measurement.

The first variable of a head is u = −log10(1 − tau) in [0, U_MAX], tau the pooled mass kept; log
error is close to a straight line in u. Error falls and density rises with u, up to noise.
The second is a level: an index into the evaluator's values of lambda, from off to strict. Error
rises and density falls with it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from afbs_compile.tuner.arrays import Bools, Floats, Ints

U_MAX = 4.0  # tau = 0.9999
ROUNDING = 1e-6  # a density of float32 sums may leave [0, 1] by this much

Real = TypeVar("Real", float, Floats)


def tau_of_u(u: Real) -> Real:
    """Pooled mass kept: tau = 1 − 10^(−u)."""
    tau: Real = -np.expm1(-u * np.log(10.0))
    return tau


def u_of_tau(tau: Floats | float) -> Floats:
    """Inverse of tau_of_u: −log10(1 − tau), at most U_MAX.

    Raises:
        ValueError: tau outside [0, 1].
    """
    tau = np.asarray(tau, dtype=np.float64)
    if not np.all((tau >= 0.0) & (tau <= 1.0)):
        raise ValueError(f"tau must lie in [0, 1], got {tau}")
    return np.asarray(-np.log10(np.maximum(1.0 - tau, 10.0**-U_MAX)))


def _check_fraction(fraction: float) -> None:
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"a fidelity is a fraction in (0, 1], got {fraction}")


@dataclass(frozen=True, slots=True)
class QueryBlocks:
    """A share of the query blocks, each against all its keys: cheap and nearly unbiased."""

    fraction: float

    def __post_init__(self) -> None:
        _check_fraction(self.fraction)

    @property
    def cost(self) -> float:
        """In dense passes of one site."""
        return self.fraction

    def __str__(self) -> str:
        return f"query_blocks({self.fraction!r})"


@dataclass(frozen=True, slots=True)
class SequenceLength:
    """A prefix of the input, as AFBS-BO has it: cheaper still, but biased to too sparse."""

    fraction: float

    def __post_init__(self) -> None:
        _check_fraction(self.fraction)

    @property
    def cost(self) -> float:
        """In dense passes of one site."""
        return self.fraction**2

    def __str__(self) -> str:
        return f"sequence_length({self.fraction!r})"


Fidelity = QueryBlocks | SequenceLength
FULL = QueryBlocks(1.0)
FIDELITIES: dict[str, Callable[[float], Fidelity]] = {
    "query_blocks": QueryBlocks,
    "sequence_length": SequenceLength,
}


def parse_fidelity(text: str) -> Fidelity:
    """The fidelity whose string form is `text`, such as "query_blocks(0.125)".

    Raises:
        ValueError: any other text.
    """
    name, bracket, rest = text.partition("(")
    if name not in FIDELITIES or not bracket or not rest.endswith(")"):
        raise ValueError(
            f"{text!r} is no fidelity: write one of {sorted(FIDELITIES)} as name(0.5)"
        )
    return FIDELITIES[name](float(rest[:-1]))


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """What one evaluation says of each head: error [H] and density [H].

    error: relative L1 Σ|o − o*| / Σ|o*|, the worst over the documents; density, in [0, 1]: the
    mean of the shares of visible blocks whose Q·K and whose P·V is computed (they differ only
    where a lambda is on), 1 − (Q·K skipped + P·V skipped) / 2.

    Raises:
        ValueError: shapes that differ, or a head with a value that is not finite or in range.
    """

    error: Floats
    density: Floats

    def __post_init__(self) -> None:
        error, density = (np.asarray(a, dtype=np.float64) for a in (self.error, self.density))
        if error.ndim != 1 or error.shape != density.shape:
            raise ValueError(
                f"error is {error.shape}, density {density.shape}: need [heads], [heads]"
            )
        _refuse(~(np.isfinite(error) & (error >= 0.0)), "error", error, "finite and ≥ 0")
        inside = (density >= -ROUNDING) & (density <= 1.0 + ROUNDING)
        _refuse(~inside, "density", density, "in [0, 1]")
        object.__setattr__(self, "error", error)
        object.__setattr__(self, "density", np.clip(density, 0.0, 1.0))


def _refuse(bad: Bools, name: str, values: Floats, need: str) -> None:
    if bad.any():
        head = int(np.argmax(bad))
        raise ValueError(
            f"head {head}: the evaluator gave {name} {values[head]}, need it {need}; "
            "check the inputs that it was measured on for overflow"
        )


class Evaluator(Protocol):
    """Measures all heads of one site at once."""

    @property
    def heads(self) -> int:
        """Number of heads H."""
        ...

    @property
    def lambdas(self) -> tuple[float, ...]:
        """Values of lambda that levels stand for, in log2 units, ascending; the first is −inf."""
        ...

    def __call__(self, u: Floats, fidelity: Fidelity, level: Ints | None = None) -> Measured:
        """Error and density at u [H] and level [H], on as much of the input as `fidelity` says.

        Levels are indices into `lambdas`; None is 0 for every head.
        """
        ...


OFF = (-np.inf,)  # the levels of an evaluator that knows no lambda


def lambdas_of(evaluator: Evaluator) -> tuple[float, ...]:
    """The evaluator's levels; one that does not tell has lambda off."""
    lambdas: tuple[float, ...] = getattr(evaluator, "lambdas", OFF)
    return lambdas


def measure(
    evaluator: Evaluator, u: Floats, fidelity: Fidelity, level: Ints | None = None
) -> Measured:
    """Call an evaluator; one that knows no levels is not given any as long as all are 0."""
    if level is None or not level.any():
        return evaluator(u, fidelity)
    return evaluator(u, fidelity, level)


def weights_of(evaluator: Evaluator) -> Floats:
    """What a unit of each head's error counts [H]: the evaluator's `weights`, else 1."""
    weights: Floats | None = getattr(evaluator, "weights", None)
    return np.ones(evaluator.heads) if weights is None else weights


def profile_cost_of(evaluator: Evaluator) -> float | None:
    """Dense passes that the profile behind an evaluator cost; None: every call runs attention.

    An evaluator with an attribute `profile_cost` answers every call by a look-up.
    """
    cost: float | None = getattr(evaluator, "profile_cost", None)
    return cost


def checked_lambdas(lambdas: tuple[float, ...]) -> tuple[float, ...]:
    """`lambdas`, if they are levels.

    Raises:
        ValueError: the first is not −inf, or they do not ascend.
    """
    if not lambdas or lambdas[0] != -np.inf or not np.all(np.diff(lambdas) > 0.0):
        raise ValueError(f"levels of lambda begin with -inf and ascend, got {lambdas}")
    return lambdas


def expect_heads(measured: Measured, heads: int) -> Measured:
    """`measured`, if it is of `heads` heads.

    Raises:
        ValueError: it is not.
    """
    if len(measured.error) != heads:
        raise ValueError(f"asked for {heads} heads, the evaluator measured {len(measured.error)}")
    return measured
