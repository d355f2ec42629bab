"""Where do a command's results go? To stdout, as one JSON object or for people."""

import json
import sys
from typing import Any

from rich.console import Console


def emit_json(result: Any) -> None:
    """Print one JSON value with sorted keys."""
    json.dump(result, sys.stdout, sort_keys=True, indent=1, allow_nan=False)
    sys.stdout.write("\n")


def emit_text(line: str) -> None:
    """Print one line."""
    sys.stdout.write(f"{line}\n")


def console() -> Console:
    """What prints tables for people; not narrower than a table where no terminal is."""
    return Console(highlight=False) if sys.stdout.isatty() else Console(width=120)


def number(value: float | None, digits: int = 2) -> str:
    """A number for a table, or a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def milliseconds(seconds: float | None) -> str:
    """A time for a table, or a dash."""
    return number(None if seconds is None else 1000 * seconds)
