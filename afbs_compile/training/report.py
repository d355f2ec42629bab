"""Who waited for whom, how long, and what did budgets do about it? Records of steps, and JSON.

A replica's bubble is the share of a step in which it waits for the slowest one.
"""

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from afbs_compile.cache import replace_file
from afbs_compile.tuner.arrays import Floats
from afbs_compile.tuner.balance import Plan

LAST = 10_000  # records that are kept


@dataclass(frozen=True, slots=True)
class Record:
    """One step.

    Attributes:
        epoch: Its epoch.
        step: Its number there.
        seconds: What each replica worked [R]; None where nobody knows.
        budget: Mean budget of each replica over layers [R]; None without a controller.
        target: Seconds that were planned; None without a plan.
        reason: Why budgets were base budgets; empty if for no reason.
    """

    epoch: int
    step: int
    seconds: tuple[float | None, ...]
    budget: tuple[float, ...] | None = None
    target: float | None = None
    reason: str = ""

    @staticmethod
    def of(epoch: int, step: int, seconds: Floats, plans: Sequence[Plan]) -> "Record":
        """A record from measured times [R] and the plans of the step's units."""
        known = tuple(float(s) if np.isfinite(s) else None for s in seconds)
        if not plans:
            return Record(epoch, step, known)
        budget = np.mean([plan.budgets.mean(axis=1) for plan in plans], axis=0)
        target = float(sum(plan.target for plan in plans))
        return Record(
            epoch, step, known, tuple(budget.tolist()),
            target if np.isfinite(target) else None, plans[0].reason,
        )  # fmt: skip

    @property
    def slowest(self) -> float | None:
        """Seconds of the slowest replica that is known."""
        return max((s for s in self.seconds if s is not None), default=None)

    @property
    def bubble(self) -> float | None:
        """Share of the replicas' time in which they wait, in [0, 1)."""
        known = [s for s in self.seconds if s is not None]
        return 1.0 - float(np.mean(known)) / max(known) if known and max(known) > 0 else None


class ScalarWriter(Protocol):
    """What TensorBoard's `SummaryWriter` is here."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> Any:
        """Note one number."""


class StragglerReport:
    """Records of the last steps."""

    def __init__(self, writer: ScalarWriter | None = None) -> None:
        """Begin empty; `writer` is told of every step (see `tensorboard`)."""
        self.records: deque[Record] = deque(maxlen=LAST)
        self.writer, self.steps = writer, 0

    def add(self, record: Record) -> None:
        """Note a step."""
        self.records.append(record)
        self.steps += 1
        if self.writer:
            for tag, value in scalars(record).items():
                self.writer.add_scalar(tag, value, self.steps)

    def summary(self) -> dict[str, Any]:
        """Means over the records: of the run, and of every replica."""
        timed = [r for r in self.records if r.slowest is not None]
        replicas = len(timed[0].seconds) if timed else 0
        seconds = np.array([[np.nan if s is None else s for s in r.seconds] for r in timed])
        budgets = [r.budget for r in timed if r.budget is not None]
        slowest = np.array([r.slowest for r in timed])
        rows = []
        for rank in range(replicas):
            known = np.isfinite(seconds[:, rank])
            own = seconds[known, rank]
            rows.append({
                "replica": rank,
                "steps": int(known.sum()),
                "seconds": float(own.mean()) if known.any() else None,
                "bubble": float(1 - own.sum() / slowest[known].sum()) if known.any() else None,
                "slowest_in": float((own == slowest[known]).mean()) if known.any() else None,
                "budget": float(np.mean([b[rank] for b in budgets])) if budgets else None,
            })  # fmt: skip
        bubbles = [r.bubble for r in timed if r.bubble is not None]
        return {
            "steps": len(timed),
            "step_seconds": float(slowest.mean()) if timed else None,
            "bubble": float(np.mean(bubbles)) if bubbles else None,
            "budget": float(np.mean(budgets)) if budgets else None,
            "at_base": sum(bool(r.reason) for r in timed),
            "replicas": rows,
        }

    def write(self, path: Path) -> None:
        """Store summary and records as JSON; a reader sees the old file or the new one."""
        document = {"schema": 1, "summary": self.summary(),
                    "records": [asdict(record) for record in self.records]}  # fmt: skip
        replace_file(path, json.dumps(document, sort_keys=True, indent=1, allow_nan=False) + "\n")


def scalars(record: Record) -> dict[str, float]:
    """What TensorBoard shows of a step."""
    found = {
        "balance/slowest_s": record.slowest,
        "balance/bubble": record.bubble,
        "balance/target_s": record.target,
    }
    if record.budget is not None:
        found |= {
            "balance/budget_mean": float(np.mean(record.budget)),
            "balance/budget_min": min(record.budget),
            "balance/budget_max": max(record.budget),
        }
    return {tag: value for tag, value in found.items() if value is not None}


def tensorboard(folder: Path) -> ScalarWriter:
    """A writer of TensorBoard's files.

    Raises:
        ModuleNotFoundError: The package `tensorboard` is missing.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is missing: run `pip install tensorboard`", name=error.name
        ) from error
    writer: ScalarWriter = SummaryWriter(str(folder))
    return writer
