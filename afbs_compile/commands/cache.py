"""`afbs cache`: list, check and delete stored policies."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from rich.table import Table

from afbs_compile import cache
from afbs_compile.cache import Entry
from afbs_compile.commands.errors import CommandError
from afbs_compile.commands.output import console, emit_json, emit_text, number


def run(args: Namespace) -> int:
    """Do the action that was asked for."""
    actions = {"ls": ls, "path": path, "verify": verify, "rm": rm}
    return actions[args.action](args)


def ls(args: Namespace) -> int:
    """List what is kept."""
    entries = cache.entries(args.cache_dir)
    if args.json:
        emit_json({"path": str(cache.folder(args.cache_dir)), "entries": list(map(row, entries))})
        return 0
    table = Table(title=str(cache.folder(args.cache_dir)))
    for column in ("key", "model", "tokens", "density", "size"):
        table.add_column(column)
    for entry in entries:
        table.add_row(entry.key, *cells(entry), f"{entry.size_bytes / 1024:.0f} KiB")
    console().print(table)
    return 0


def cells(entry: Entry) -> tuple[str, str, str]:
    """Name, lengths and densities of an entry for the table."""
    if entry.policy is None:
        return "cannot be used", "–", "–"
    tunings = entry.policy.tunings
    lengths = ", ".join(str(tuning.length) for tuning in tunings)
    return entry.policy.model_name or "–", lengths, ", ".join(number(t.density) for t in tunings)


def row(entry: Entry) -> dict[str, Any]:
    """An entry as JSON."""
    tunings = entry.policy.tunings if entry.policy else ()
    return {
        "key": entry.key,
        "file": str(entry.path),
        "size_bytes": entry.size_bytes,
        "model_name": entry.policy.model_name if entry.policy else None,
        "tunings": [{"length": t.length, "density": t.density} for t in tunings],
        "problem": entry.problem,
    }


def path(args: Namespace) -> int:
    """Print the folder."""
    folder = str(cache.folder(args.cache_dir))
    if args.json:
        emit_json({"path": folder})
    else:
        emit_text(folder)
    return 0


def verify(args: Namespace) -> int:
    """Check every file."""
    entries = cache.entries(args.cache_dir)
    bad = [entry for entry in entries if entry.problem]
    if args.json:
        problems = {entry.key: entry.problem for entry in bad}
        emit_json({"checked": len(entries), "problems": problems})
    else:
        for entry in bad:
            emit_text(f"{entry.key}: {entry.problem}")
        emit_text(f"{len(entries)} checked, {len(bad)} cannot be used")
    return 1 if bad else 0


def rm(args: Namespace) -> int:
    """Delete one policy or all."""
    gone = deleted(args.key, args.cache_dir)
    if args.json:
        emit_json({"removed": [str(file) for file in gone]})
    else:
        for file in gone:
            emit_text(f"removed {file}")
    return 0


def deleted(key: str | None, cache_dir: Path | None) -> list[Path]:
    """The files that went, or CommandError."""
    try:
        gone = cache.remove(key, cache_dir) if key else cache.clear(cache_dir)
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    if key and not gone:
        raise CommandError(f"nothing is kept of {key!r}; see `afbs cache ls`")
    return gone
