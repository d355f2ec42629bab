"""What does the search ask, and what is it told? The protocol between search and measurement.

The variable of a head is u = −log10(1 − tau) in [0, U_MAX], tau the pooled mass kept; log error
is close to a straight line in u. Error falls and density rises with u, up to measurement noise.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Protocol, Self, TypeVar

import numpy as np

from afbs_compile.tuner.arrays import Bools, Floats

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

    error: relative L1 Σ|o − o*| / Σ|o*|, the worst over the documents; density: visited over
    visible blocks, in [0, 1].

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

    def __call__(self, u: Floats, fidelity: Fidelity) -> Measured:
        """Error and density at u [H], looking at as much of the input as `fidelity` says."""
        ...


def expect_heads(measured: Measured, heads: int) -> Measured:
    """`measured`, if it is of `heads` heads.

    Raises:
        ValueError: it is not.
    """
    if len(measured.error) != heads:
        raise ValueError(f"asked for {heads} heads, the evaluator measured {len(measured.error)}")
    return measured


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One call of an evaluator; u, error and density have one entry a head."""

    site: str
    phase: str
    fidelity: Fidelity
    u: tuple[float, ...]
    error: tuple[float, ...]
    density: tuple[float, ...]
    cost: float


@dataclass(slots=True)
class Trace:
    """Every evaluation of a search, in order."""

    rows: list[Evaluation] = field(default_factory=list)

    @property
    def calls(self) -> int:
        """Calls of an evaluator."""
        return len(self.rows)

    @property
    def evaluations(self) -> int:
        """Evaluations per head, summed over the heads."""
        return sum(len(row.u) for row in self.rows)

    @property
    def cost(self) -> float:
        """In dense passes of one site."""
        return sum(row.cost for row in self.rows)

    def to_json(self) -> str:
        """One JSON list, an object an evaluation; numbers come back bit for bit."""
        rows = [asdict(row) | {"fidelity": str(row.fidelity)} for row in self.rows]
        return json.dumps(rows, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The trace that `to_json` wrote."""
        rows = []
        for row in json.loads(text):
            arrays = {name: tuple(row[name]) for name in ("u", "error", "density")}
            rows.append(Evaluation(**row | arrays | {"fidelity": parse_fidelity(row["fidelity"])}))
        return cls(rows)


@dataclass(frozen=True, slots=True)
class Traced:
    """An evaluator that writes down what another one measures, and counts its heads."""

    evaluator: Evaluator
    trace: Trace
    site: str
    phase: str = "evaluate"

    @property
    def heads(self) -> int:
        """Number of heads H."""
        return self.evaluator.heads

    def __call__(self, u: Floats, fidelity: Fidelity) -> Measured:
        """Measure, and append to the trace; errors are noted with the site."""
        try:
            measured = expect_heads(self.evaluator(u, fidelity), self.heads)
        except ValueError as error:
            error.add_note(f"at site {self.site}, phase {self.phase}, {fidelity}")
            raise
        self.trace.rows.append(
            Evaluation(
                site=self.site,
                phase=self.phase,
                fidelity=fidelity,
                u=tuple(u.tolist()),
                error=tuple(measured.error.tolist()),
                density=tuple(measured.density.tolist()),
                cost=fidelity.cost,
            )
        )
        return measured
