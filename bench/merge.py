"""Make one result of several: parts of a benchmark that processes measured side by side.

`python bench/merge.py NAME FOLDER…` reads `FOLDER/NAME.json` of each and stores `NAME.json` among
the committed results, or in `--output`. Rows of the same key are kept once, the first of them.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afbs_compile.bench import harness
from afbs_compile.commands.errors import CommandError

SAME = ("name", "commit", "device", "versions", "schema")  # else the parts are no one benchmark


def merged(parts: Sequence[dict[str, Any]], key: Sequence[str]) -> dict[str, Any]:
    """One document of several.

    Args:
        parts: Documents of the same benchmark, commit and device.
        key: Fields that tell rows apart.

    Raises:
        CommandError: They are not of the same benchmark, commit or device.
    """
    first = parts[0]
    for part in parts[1:]:
        if differ := [name for name in SAME if part.get(name) != first.get(name)]:
            raise CommandError(f"the parts differ in {', '.join(differ)}; measure them alike")
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for part in parts:
        for row in part["rows"]:
            rows.setdefault(tuple(row[name] for name in key), row)
    made = first | {
        "rows": list(rows.values()),
        "command": "; ".join(dict.fromkeys(part["command"] for part in parts)),
        "date": max(part["date"] for part in parts),
    }
    notes = list(dict.fromkeys(note for part in parts for note in part.get("notes", ())))
    return made | {"notes": notes} if notes else made


def read(path: Path) -> dict[str, Any]:
    """The document of one part.

    Raises:
        CommandError: It cannot be read.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CommandError(f"{path} cannot be merged: {error}; name finished parts") from error
    return found


def main(given: Sequence[str] | None = None) -> int:
    """Read, merge and store; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="of the result file, without .json")
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, help="the folder (default: bench/results)")
    args = parser.parse_args(given)
    module = importlib.import_module(f"afbs_compile.bench.{args.name.removesuffix('_cpu')}")
    try:
        parts = [read(folder / f"{args.name}.json") for folder in args.folders]
        found = merged(parts, module.KEY)
    except CommandError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    path = harness.write(found, args.output)
    sys.stdout.write(f"{path}: {len(found['rows'])} rows of {len(parts)} parts\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
