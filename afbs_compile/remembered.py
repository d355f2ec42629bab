"""What did an evaluator say when it was asked this before? Answers outlive the process."""

from dataclasses import dataclass

import numpy as np

from afbs_compile.profiling import Clock
from afbs_compile.store import About, Store
from afbs_compile.tuner.arrays import Floats, Ints
from afbs_compile.tuner.objective import Evaluator, Fidelity, Measured, lambdas_of, measure


class OutOfTime(Exception):
    """The budget is over, and the next answer is not known yet."""


@dataclass(slots=True)
class Budget:
    """How long all evaluators of a search may measure; each start measures once at least."""

    clock: Clock
    measured: int = 0

    def spend(self) -> None:
        """Take the right to measure once.

        Raises:
            OutOfTime: The budget is over.
        """
        if self.measured and self.clock.over():
            raise OutOfTime
        self.measured += 1


@dataclass(frozen=True, slots=True)
class Remembered:
    """An evaluator that keeps every answer in a store, and asks again only what it lacks."""

    evaluator: Evaluator
    store: Store
    job: About
    budget: Budget

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.evaluator.heads

    @property
    def lambdas(self) -> tuple[float, ...]:
        """Levels of lambda."""
        return lambdas_of(self.evaluator)

    def __call__(self, u: Floats, fidelity: Fidelity, level: Ints | None = None) -> Measured:
        """Error and density at u `[H]` and level `[H]` (None: off)."""
        about = self.job | {"fidelity": str(fidelity), "u": np.asarray(u).tolist()}
        if level is not None and level.any():
            about |= {"level": level.tolist()}
        if known := self.store.load(about):
            return Measured(known[1]["error"], known[1]["density"])
        self.budget.spend()
        found = measure(self.evaluator, u, fidelity, level)
        self.store.save(about, {}, {"error": found.error, "density": found.density})
        return found
