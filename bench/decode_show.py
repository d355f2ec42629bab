"""What does a hybrid cache gain? Its rows beside the fastest dense ones, and a table of them."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from afbs_compile.bench.ledger import Row
from afbs_compile.commands.output import console

PROBLEM = ("model", "tokens", "batch")


def compared(rows: list[Row]) -> Iterator[Row]:
    """Every hybrid row beside the fastest dense variant of its problem.

    Speeds are None where nothing dense was measured: it may not fit into the memory.
    """
    for row in rows:
        if row["case"] != "decode" or row["variant"] != "hybrid":
            continue
        problem = [row[name] for name in PROBLEM]
        dense = [
            r for r in rows
            if r["case"] == "decode" and r["variant"] != "hybrid"
            and [r[name] for name in PROBLEM] == problem
        ]  # fmt: skip
        best: Row = max(dense, key=lambda r: r["tokens_per_s"], default={})
        yield {
            **{name: row[name] for name in (*PROBLEM, "ratio", "window", "sink")},
            "ours_tokens_per_s": row["tokens_per_s"],
            "dense_tokens_per_s": best.get("tokens_per_s"),
            "dense": best.get("variant"),
            "kv_bytes": row["kv_bytes"],
            "kv_bytes_dense": best.get("kv_bytes"),
        }


def show(document: dict[str, Any]) -> None:
    """Print the rows."""
    table = Table(title="Generating")
    names = list(document["rows"][0]) if document["rows"] else []
    for name in names:
        table.add_column(name)
    for row in document["rows"]:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    console().print(table)
    for note in document.get("notes", ()):
        console().print(note, markup=False)
