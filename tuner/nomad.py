"""Can MADS look for the heads? NOMAD (Le Digabel 2011), which BOSCH's paper seems to use.

NOMAD runs in a process of its own (`nomad_child`): it is LGPL, and when it crashes or hangs, the
search goes on with what was found. It moves in all bits, whatever their number, so the nearest
choice with the right number is evaluated: surplus windows are taken from heads of most prior harm,
missing ones are given to those of least. One evaluation at a time.
"""

import contextlib
import importlib.util
import json
import logging
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from afbs_compile.tuner.heads import Bits, Impossible
from afbs_compile.tuner.solvers import Task

PATIENCE = 120.0  # seconds for the next question
COMMAND = (sys.executable, "-P", str(Path(__file__).with_name("nomad_child.py")))
SEEDS = 10_000  # NOMAD draws as many numbers before it begins
LAST = 500  # characters of what a crash left on stderr
LOG = logging.getLogger(__name__)


def require() -> None:
    """Refuse to begin without NOMAD.

    Raises:
        Impossible: PyNomad is not installed.
    """
    if importlib.util.find_spec("PyNomad") is None:
        raise Impossible(
            'solver "nomad" needs PyNomad, which is not installed; run '
            '`pip install "afbs-compile[nomad]"`, or take solver "lns"'
        )


def mads(task: Task, command: Sequence[str] = COMMAND, patience: float = PATIENCE) -> Bits:
    """The best choice that NOMAD finds.

    Args:
        task: The subset to be improved.
        command: Starts what speaks `nomad_child`'s language.
        patience: Seconds after which a silent child counts as lost.

    Raises:
        Impossible: The child did not ask a single question.
    """
    tally, best = task.tally, task.start
    end = max(0, tally.left - task.budget)
    (least,) = tally([best])
    asked = 0
    with Child(command, patience) as child:
        seed = int(task.rng.integers(SEEDS))
        start = [int(bit) for bit in best[task.free]]
        child.say({"start": start, "seed": seed, "evaluations": max(1, 2 * task.budget)})
        while tally.left > end:
            told = child.hear()
            if told is None or "bits" not in told:
                break
            asked += 1
            bits = nearest(task, np.array(told["bits"], dtype=bool))
            (loss,) = tally([bits])
            if loss < least:
                best, least = bits, loss
            child.say({"loss": float(loss) if np.isfinite(loss) else None})
        else:
            told = {"done": "the budget is spent"}
        if told is None:
            lost = f"NOMAD {child.fate()} after {asked} questions"
            if not asked:
                raise Impossible(f'{lost}; take solver "lns"')
            LOG.warning("%s; the search goes on with what was found", lost)
    return best


def nearest(task: Task, asked: Bits) -> Bits:
    """The choice with the right number of windows that differs least from free bits [F].

    What was asked to differ from the task's start does so as far as the number allows: or else a
    start that follows the prior would be the nearest choice to all of its neighbours.
    """
    harm, before = task.prior[task.free], task.start[task.free]
    changed = asked != before
    wish = np.select([changed & asked, asked, ~changed], [0, 1, 2], 3)
    free = np.zeros(len(asked), dtype=bool)
    free[np.lexsort((harm, wish))[: int(before.sum())]] = True
    bits = task.start.copy()
    bits[task.free] = free
    return bits


class Child:
    """A process that is spoken to in lines of JSON; killed at the end."""

    def __init__(self, command: Sequence[str], patience: float) -> None:
        """Start it."""
        self.patience, self.late = patience, False
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self.lines: queue.Queue[str] = queue.Queue()
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        """Take lines until there are no more; then an empty one."""
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def say(self, told: dict[str, Any]) -> None:
        """Write a line; a child that is gone is noticed by `hear`."""
        assert self.process.stdin
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps(told) + "\n")
            self.process.stdin.flush()

    def hear(self) -> dict[str, Any] | None:
        """The next line; None if the child is gone, silent for too long, or talks nonsense."""
        try:
            found = json.loads(self.lines.get(timeout=self.patience))
        except queue.Empty:
            self.late = True
            return None
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    def fate(self) -> str:
        """What became of a child that says no more."""
        if self.late:
            return f"was silent for {self.patience:g} s"
        try:
            code = self.process.wait(self.patience)
        except subprocess.TimeoutExpired:
            return "spoke no JSON"
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace").strip()[-LAST:]
        return f"ended with code {code}{f' ({said})' if said else ''}"

    def __enter__(self) -> "Child":
        """The child."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()
        self.reader.join()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            if stream:
                with contextlib.suppress(OSError):  # what was not flushed has no reader
                    stream.close()
