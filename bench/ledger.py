"""What is measured already? A result file that grows row by row and can be taken up again."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from afbs_compile.bench import harness
from afbs_compile.commands.errors import CommandError
from afbs_compile.versions import device_name

Row = dict[str, Any]


@dataclass(slots=True)
class Ledger:
    """Rows of one benchmark.

    Attributes:
        name: Of the result file.
        key: Fields that tell rows apart.
        output: Folder of the file; None keeps nothing.
        seconds: Begin nothing new after so many; None never stops.
        rows: All, those of earlier runs included.
        notes: What was not measured, and why.
        begun: When, by the host's monotonic clock.
    """

    name: str
    key: Sequence[str]
    output: Path | None
    seconds: float | None
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    begun: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """Read the rows of an earlier run.

        Raises:
            CommandError: They cannot be read, or are another device's.
        """
        path = self.output / f"{self.name}.json" if self.output else None
        if path and path.exists():
            self.rows = earlier(path)

    def has(self, row: Row) -> bool:
        """Whether a row with these key fields is known."""
        wanted = self.slot(row)
        return any(self.slot(known) == wanted for known in self.rows)

    def add(self, row: Row) -> None:
        """Take a row and keep it."""
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        """Store all rows."""
        if self.output:
            harness.write(self.document(), self.output)

    def document(self) -> dict[str, Any]:
        """All rows with what is needed to judge them."""
        return harness.document(self.name, self.rows, self.notes)

    def over(self, share: float = 1.0) -> bool:
        """Whether a share of the time is up."""
        return self.seconds is not None and time.monotonic() - self.begun >= share * self.seconds

    def slot(self, row: Row) -> tuple[Any, ...]:
        """The key fields of a row."""
        return tuple(row[name] for name in self.key)


def earlier(path: Path) -> list[Row]:
    """The rows of a result file of this device.

    Raises:
        CommandError: It cannot be read, or is another device's.
    """
    advice = "give another --output, or move the file away"
    try:
        found = json.loads(path.read_text())
        rows, device = list(found["rows"]), found["device"]
    except (OSError, ValueError, KeyError) as error:
        raise CommandError(f"{path} cannot be continued: {error!r}; {advice}") from error
    here = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if device != here:
        raise CommandError(f"{path} was measured on {device}, this is {here}; {advice}")
    return rows
