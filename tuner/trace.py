"""What did a search measure, and what did that cost? Every evaluation, in order."""

import json
from dataclasses import asdict, dataclass, field
from typing import Self

import numpy as np

from afbs_compile.tuner.arrays import Floats, Ints
from afbs_compile.tuner.objective import (
    FULL,
    Evaluator,
    Fidelity,
    Measured,
    expect_heads,
    lambdas_of,
    measure,
    parse_fidelity,
    profile_cost_of,
    weights_of,
)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One call of an evaluator; u, level, error and density have one entry a head.

    The row of a profile has none: it was no evaluation, and has a cost.
    """

    site: str
    phase: str
    fidelity: Fidelity
    u: tuple[float, ...]
    level: tuple[int, ...]
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
        return sum(bool(row.u) for row in self.rows)

    @property
    def evaluations(self) -> int:
        """Evaluations per head, summed over the heads."""
        return sum(len(row.u) for row in self.rows)

    def points(self, fidelity: Fidelity | None = None) -> int:
        """Points measured, summed over the heads; of one fidelity, or all.

        A head that is done is measured again where it was, for as long as others of its site are
        not: such repeats tell nothing new and are not counted, unlike in `evaluations`.
        """
        seen = {
            (row.site, row.phase == "validate", head, str(row.fidelity), *point)
            for row in self.rows
            if fidelity in (None, row.fidelity)
            for head, point in enumerate(zip(row.u, row.level, strict=True))
        }
        return len(seen)

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
            arrays = {name: tuple(row[name]) for name in ("u", "level", "error", "density")}
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

    @property
    def lambdas(self) -> tuple[float, ...]:
        """Levels of the evaluator."""
        return lambdas_of(self.evaluator)

    @property
    def weights(self) -> Floats:
        """Of the evaluator's heads [H]."""
        return weights_of(self.evaluator)

    @property
    def profile_cost(self) -> float | None:
        """Of the evaluator."""
        return profile_cost_of(self.evaluator)

    def look_ups(self) -> Evaluator:
        """The same for dense tables: look-ups are not written down, the profile's cost is.

        That cost is paid once a site. An evaluator without a profile runs attention in every
        call, so all are written down.
        """
        cost = self.profile_cost
        if cost is None:
            return self
        if any(row.phase == "profile" and row.site == self.site for row in self.trace.rows):
            return self.evaluator
        self.trace.rows.append(Evaluation(self.site, "profile", FULL, (), (), (), (), cost))
        return self.evaluator

    def __call__(self, u: Floats, fidelity: Fidelity, level: Ints | None = None) -> Measured:
        """Measure, and append to the trace; errors are noted with the site."""
        try:
            measured = expect_heads(measure(self.evaluator, u, fidelity, level), self.heads)
        except ValueError as error:
            error.add_note(f"at site {self.site}, phase {self.phase}, {fidelity}")
            raise
        levels = np.zeros(self.heads, dtype=np.int64) if level is None else level
        self.trace.rows.append(
            Evaluation(
                site=self.site,
                phase=self.phase,
                fidelity=fidelity,
                u=tuple(u.tolist()),
                level=tuple(levels.tolist()),
                error=tuple(measured.error.tolist()),
                density=tuple(measured.density.tolist()),
                cost=fidelity.cost,
            )
        )
        return measured


def look_ups(evaluator: Evaluator) -> Evaluator:
    """`Traced.look_ups` of an evaluator that may not be traced."""
    return evaluator.look_ups() if isinstance(evaluator, Traced) else evaluator
