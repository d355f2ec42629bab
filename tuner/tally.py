"""What has been evaluated, what was best, and how much of the budget is left?

A search asks for batches of bit strings; nothing is evaluated twice. The objective is any callable
on a batch. It may raise `Stop`: the search then ends with the best that it has.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from afbs_compile.tuner.arrays import Bools, Floats
from afbs_compile.tuner.heads import Bits, text

Objective = Callable[[Sequence[Bits]], Sequence[float]]
"""Losses of some choices of windowed heads, smaller is better."""


class Stop(Exception):
    """Raised by an objective when it is enough; what was evaluated counts."""


class OnBest(Protocol):
    """Called after every batch: evaluations so far, of how many, the stage, the least loss."""

    def __call__(self, done: int, budget: int, stage: str, best: float) -> None:
        """Take note."""


def silent(done: int, budget: int, stage: str, best: float) -> None:
    """Take no note."""


@dataclass(slots=True)
class Tally:
    """The evaluations of one search.

    Attributes:
        objective: What is asked.
        count: Windowed bits that a result must have.
        budget: Bit strings that may be evaluated.
        on_best: Told after every batch.
        stage: What the search is at.
        losses: Of every bit string, in the order of evaluation; not finite counts as inf.
        stages: Evaluations of every stage.
        best: The best of those with `count` bits, or None.
        history: (evaluations, loss) at every improvement of `best`.
    """

    objective: Objective
    count: int
    budget: int
    on_best: OnBest = silent
    stage: str = ""
    losses: dict[str, float] = field(default_factory=dict)
    stages: dict[str, int] = field(default_factory=dict)
    best: Bits | None = None
    history: list[tuple[int, float]] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Evaluations that may still be made."""
        return self.budget - len(self.losses)

    @property
    def least(self) -> float:
        """The loss of `best`, inf without one."""
        return self.history[-1][1] if self.history else np.inf

    def __call__(self, candidates: Sequence[Bits]) -> list[float]:
        """Losses; inf for what the budget does not suffice for."""
        fresh = {text(bits): bits for bits in candidates if text(bits) not in self.losses}
        batch = dict(list(fresh.items())[: self.left])
        if batch:
            found = self.objective(list(batch.values()))
            for (name, bits), loss in zip(batch.items(), found, strict=True):
                self.take(name, bits, float(loss))
            self.stages[self.stage] = self.stages.get(self.stage, 0) + len(batch)
            self.on_best(len(self.losses), self.budget, self.stage, self.least)
        return [self.losses.get(text(bits), np.inf) for bits in candidates]

    def take(self, name: str, bits: Bits, loss: float) -> None:
        """Write one loss down."""
        self.losses[name] = loss if np.isfinite(loss) else np.inf
        if bits.sum() == self.count and (self.best is None or self.losses[name] < self.least):
            self.best = bits.copy()
            self.history.append((len(self.losses), self.losses[name]))

    def has(self, bits: Bits) -> bool:
        """Was this evaluated?"""
        return text(bits) in self.losses

    def evidence(self) -> tuple[Bools, Floats]:
        """Bit strings [n, N] and losses [n] that are finite."""
        known = [(name, loss) for name, loss in self.losses.items() if np.isfinite(loss)]
        strings = np.array([[letter == "1" for letter in name] for name, _ in known], dtype=bool)
        return strings, np.array([loss for _, loss in known])

    def finite(self) -> list[tuple[str, float]]:
        """Evaluated choices with `count` bits and a finite loss, in the order of evaluation."""
        return [
            (name, loss)
            for name, loss in self.losses.items()
            if name.count("1") == self.count and np.isfinite(loss)
        ]

    def incumbents(self) -> list[tuple[str, float]]:
        """Those of them that were the best one for a while; the last one is."""
        found: list[tuple[str, float]] = []
        for name, loss in self.finite():
            if not found or loss < found[-1][1]:
                found.append((name, loss))
        return found
