"""What do the rows of `afbs bench generate` say? A line a variant, as Markdown or for people."""

import statistics
from typing import Any

Row = dict[str, Any]
COLUMNS = (
    "variant", "prompts", "same answer", "agreed tokens", "gap", "density", "sites sparse",
    "first token", "sooner", "tuning",
)  # fmt: skip


def groups(rows: list[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """The rows by model, precision, lengths, way of decoding and variant."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = tuple(row[n] for n in ("model", "dtype", "tokens", "new", "decode", "variant"))
        found.setdefault(key, []).append(row)
    return found


def summary(rows: list[Row]) -> Row:
    """One variant's figures over its prompts."""
    ratios = [row["reference_first_s"] / row["first_s"] for row in rows]
    gaps = [row["gap"] for row in rows if row["gap"] is not None]
    last = rows[-1]
    return {
        "prompts": len(rows),
        "same": sum(row["same"] for row in rows) / len(rows),
        "agreed": statistics.fmean(row["agreed"] for row in rows),
        "gap": statistics.median(gaps) if gaps else None,
        "density": statistics.fmean(row["density"] for row in rows),
        "sites": None if last["sites"] is None else f"{last['rewritten']} of {last['sites']}",
        "first_s": statistics.median(row["first_s"] for row in rows),
        "sooner": statistics.median(ratios),
        "tuning_seconds": last["tuning_seconds"],
        "gaining": last["gaining"],
    }


def cells(variant: str, new: int, found: Row) -> list[str]:
    """A variant's figures as text."""
    return [
        variant,
        str(found["prompts"]),
        f"{found['same']:.0%}",
        f"{found['agreed']:.1f} of {new}",
        "–" if found["gap"] is None else f"{found['gap']:.2f}",
        f"{found['density']:.2f}",
        found["sites"] or "–",
        f"{1e3 * found['first_s']:.1f} ms",
        f"{found['sooner']:.2f}×",
        "–" if found["tuning_seconds"] is None else f"{found['tuning_seconds']:.1f} s",
    ]


def line(row: Row) -> str:
    """A row for people who wait."""
    return (
        f"{row['text']} {row['window']} {row['variant']}: {row['agreed']} of {row['new']} tokens "
        f"agree, density {row['density']:.3f}, first token after {1e3 * row['first_s']:.1f} ms"
    )


def lines(document: dict[str, Any]) -> list[str]:
    """The table, one model and length after the other, then what was left out."""
    told: list[str] = []
    heading = None
    for key, rows in groups(document["rows"]).items():
        *about, variant = key
        model, dtype, tokens, new, decode = about
        if heading != about:
            heading = about
            told += [""] * bool(told)
            told += [
                f"{model}, {dtype}, prompts of {tokens} tokens, {new} written, "
                f"decoded {decode}; compared with {rows[0]['reference']}:",
                "",
                f"| {' | '.join(COLUMNS)} |",
                "|---" * len(COLUMNS) + "|",
            ]
        told.append(f"| {' | '.join(cells(variant, new, summary(rows)))} |")
    notes = document.get("notes", [])
    return [*told, *[""] * bool(notes), *(f"- {note}" for note in notes)]


def markdown(document: dict[str, Any]) -> str:
    """The table as Markdown."""
    return "\n".join(lines(document))
