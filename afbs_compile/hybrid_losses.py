"""How bad is a choice of windowed heads, as one number? Evaluations that are kept and shared.

What windowing costs in a task is told in units of what windowing every head costs there (the
anchors of BOSCH, arXiv 2604.05942): 0 is the dense model, 1 has no global head. The cost of a
choice is the geometric mean over the tasks. The arithmetic mean would be the cost on text: an
answer that is lost without global heads costs hundreds of times as much then, so that good choices
differ by nothing in its units. The loss is the cost, or where there are choices to compare with
what `tuner.relative` makes of the tasks' costs. An evaluation is a job of a `Store`, one file a
choice of heads: a search that was killed goes on, and processes that search the same thing share
the work.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from afbs_compile.hybrid_objective import FIGURES
from afbs_compile.profiling import POLL_SECONDS, Clock
from afbs_compile.store import About, Arrays, Store
from afbs_compile.tuner.heads import Bits, text
from afbs_compile.tuner.relative import FLOOR, geometric, relative
from afbs_compile.tuner.tally import Stop

OBJECTIVES = {"kl": "kl", "task": "surprise"}  # and the figure that each compares
LEAST = 1e-9  # nats: windowing that costs less costs nothing

Figures = NDArray[np.float64]


class NothingToChoose(ValueError):
    """Windowing every head changes nothing, so no choice is better than another."""


@dataclass(slots=True, eq=False)
class Losses:
    """The objective of a search: losses of a batch of choices.

    Attributes:
        evaluate: Figures of every call `[calls, 3]` on the device, not waited for.
        size: Bits.
        tasks: The task of every call.
        store: Where evaluations are kept.
        objective: `kl`, or `task`: the surprise by the right tokens.
        rivals: What each task's cost is compared with (`compare`); empty at first.
        clock: When to stop.
        known: Figures by bit string.
        measured: Evaluations that this process made itself.
    """

    evaluate: Callable[[Bits], Tensor]
    size: int
    tasks: Sequence[str]
    store: Store
    objective: str = "kl"
    rivals: dict[str, float] = field(default_factory=dict)
    clock: Clock = field(default_factory=lambda: Clock(None))
    known: dict[str, Figures] = field(default_factory=dict)
    measured: int = 0

    def __call__(self, batch: Sequence[Bits]) -> list[float]:
        """Losses of some choices.

        Raises:
            NothingToChoose: Windowing every head costs nothing.
            Stop: The time is over, or Ctrl-C was pressed.
        """
        try:
            return [self.loss(found) for found in self.figures(batch)]
        except KeyboardInterrupt as error:
            raise Stop from error

    def figures(self, batch: Sequence[Bits]) -> list[Figures]:
        """Figures `[calls, 3]` of some choices, whoever evaluates them.

        Raises:
            Stop: The time is over.
        """
        left = {text(bits): bits for bits in batch if text(bits) not in self.known}
        while left:
            for name, bits in list(left.items()):
                if self.clock.over():
                    raise Stop
                if self.attempt(name, bits):
                    del left[name]
            if left:
                time.sleep(POLL_SECONDS)
        return [self.known[text(bits)] for bits in batch]

    def attempt(self, name: str, bits: Bits) -> bool:
        """Evaluate one choice or look it up; False if somebody else is at it."""
        found = self.store.once({"heads": name}, lambda: self.measure(bits))
        if found is None:
            return False
        self.known[name] = np.asarray(found[1]["figures"], dtype=np.float64)
        return True

    def measure(self, bits: Bits) -> tuple[About, Arrays]:
        """Run the model."""
        self.measured += 1
        return {}, {"figures": self.evaluate(bits).double().cpu().numpy()}

    def compare(self, choices: Sequence[Bits]) -> None:
        """From now on a loss is relative to the least that one of these choices costs a task.

        Raises:
            NothingToChoose: Windowing every head costs nothing.
            Stop: The time is over.
        """
        self.rivals = dict(zip(self.counting(), self.costs(choices).min(1).tolist(), strict=True))

    def loss(self, found: Figures) -> float:
        """What a search minimises: 0 is dense; as bad as the rivals is about 1, if there are any.

        Raises:
            NothingToChoose: Windowing every head costs nothing.
        """
        return float(self.join(np.array([*self.by_task(found).values()])))

    def join(self, costs: Figures) -> Figures:
        """Losses [...] of costs [T, ...] in the tasks that count."""
        if not self.rivals:
            return geometric(costs) - FLOOR
        return relative(costs, np.array([*self.rivals.values()]))

    def cost(self, found: Figures) -> float:
        """The geometric mean of the tasks' costs: 0 is dense, 1 has no global head.

        Raises:
            NothingToChoose: Windowing every head costs nothing.
        """
        return float(geometric(np.array([*self.by_task(found).values()])) - FLOOR)

    def costs(self, batch: Sequence[Bits]) -> Figures:
        """What choices cost in every task that counts [T, n]."""
        found = [[*self.by_task(one).values()] for one in self.figures(batch)]
        return np.array(found).T

    def counting(self) -> list[str]:
        """The tasks in which windowing every head costs something."""
        return list(self.by_task(self.anchors()[1]))

    def by_task(self, found: Figures) -> dict[str, float]:
        """The loss in every task.

        Raises:
            NothingToChoose: Windowing every head costs nothing in any task.
        """
        none, every = self.anchors()
        column = FIGURES.index(OBJECTIVES[self.objective])
        result = {}
        for task in dict.fromkeys(self.tasks):
            calls = [n for n, name in enumerate(self.tasks) if name == task]
            at = [float(x[calls, column].mean()) for x in (none, found, every)]
            if at[2] - at[0] > LEAST:
                result[task] = (at[1] - at[0]) / (at[2] - at[0])
        if not result:
            raise NothingToChoose(
                "windowing every head changes nothing on these inputs, so there is nothing to "
                "choose: give longer inputs or a smaller window"
            )
        return result

    def anchors(self) -> tuple[Figures, Figures]:
        """Figures of the model with no windowed head, and with no other."""
        bits = np.zeros(self.size, dtype=bool)
        none, every = self.figures([bits, ~bits])
        return none, every
