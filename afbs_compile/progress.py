"""How far is it? A bar with the time left on stderr, or a log line where nobody looks."""

import logging
import sys
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

LOGGER = logging.getLogger(__name__)


class OnProgress(Protocol):
    """Called as work goes on: `done` of `total` steps of `phase`, now at `site`."""

    def __call__(self, done: float, total: float, phase: str, site: str) -> None:
        """Take note."""


class Progress:
    """An `OnProgress` that shows a bar for every phase while the context is open."""

    def __init__(self, shown: bool | None = None) -> None:
        """Show bars if `shown`; by default if stderr is a terminal."""
        self.shown = sys.stderr.isatty() if shown is None else shown
        self.bars = RichProgress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[site]}", style="dim"),
            console=Console(stderr=True),
            disable=not self.shown,
        )
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        """Start the display."""
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the display and leave the bars where they are."""
        self.bars.stop()

    def __call__(self, done: float, total: float, phase: str, site: str = "") -> None:
        """Move the bar of `phase`, which begins with its first call."""
        if phase not in self.tasks:
            LOGGER.info("%s", phase)
            self.tasks[phase] = self.bars.add_task(phase, total=total, site=site)
        self.bars.update(self.tasks[phase], completed=done, total=total, site=site)
