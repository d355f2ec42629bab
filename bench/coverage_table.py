"""What do the rows of the coverage matrix say? Which are wrong, and a table a model."""

from typing import Any

EXACT = 1e-5  # of the largest output, float32
EXACT_GRADIENT = 1e-4  # of the largest gradient: sums over all tokens, in another order
MAX_ERROR = 0.2  # of a head, as tuned
SLACK = 1.01  # a profile and a kernel add up in different orders
BARS = {
    "kept_error": EXACT,
    "policy_error": EXACT,
    "grad_error": EXACT_GRADIENT,
    "head_error": SLACK * MAX_ERROR,
}
HALF = 2.0  # how much further from float32 than dense half precision we may be
ROUNDING = 2**-8  # of the largest output: one step of bfloat16, whatever dense does
ORACLE = 2e-2  # half precision: attention's weights are rounded elsewhere in plain torch
Row = dict[str, Any]


def bars(row: Row) -> dict[str, float]:
    """The largest error of every kind that is right for a row."""
    if row.get("dtype", "float32") == "float32":
        return BARS
    half = {
        name: HALF * (row[dense] or 0) + ROUNDING
        for name, dense in (("kept_error", "dense_error"), ("grad_error", "dense_grad_error"))
    }
    return BARS | half | {"policy_error": ORACLE}


def wrong(row: Row) -> str | None:
    """What is wrong with a row, or None."""
    if row["failure"]:
        return str(row["failure"])
    for column, bar in bars(row).items():
        if row[column] is not None and not row[column] <= bar:
            return f"{column} {row[column]:.1e}"
    if "not seen" in row["reasons"]:
        return f"{row['reasons']['not seen']} attention calls were not seen"
    if row["graphs"] is not None and row["graphs"] > row["graphs_dense"]:
        return f"{row['graphs']} graphs, {row['graphs_dense']} without us"
    return None


def coverage(document: dict[str, Any]) -> str:
    """A line a model, then every reason."""
    rows: list[Row] = document["rows"]
    lines = [
        "| model | cells | sites sparse | error, all kept | error, tau fixed | largest error of a "
        "head, tuned to 0.2 | graphs more | wrong |",
        "|---|---|---|---|---|---|---|---|",
    ]
    models = dict.fromkeys(row["model"] for row in rows)
    lines += [line(model, [row for row in rows if row["model"] == model]) for model in models]
    sites, sparse = total(rows, "sites"), total(rows, "rewritten")
    share = f" ({sparse / sites:.1%})" if sites else ""
    bad = sum(bool(wrong(row)) for row in rows)
    about = (
        f"{sparse} of {sites} sites run sparse{share}; besides, {total(rows, 'short')} calls that "
        f"decode one token stay dense. {len(rows)} cells, {bad} wrong."
    )
    where = f"{document['device']}, torch {document['versions']['torch']}, {document['date'][:10]}"
    notes = [f"- {note}" for note in document.get("notes", [])]
    told = [*lines, "", about, "", *reasons(rows), *notes]
    return "\n".join([*told, "", f"{where}, `{document['command']}`"])


def line(model: str, rows: list[Row]) -> str:
    """One model's."""
    bad = sum(bool(wrong(row)) for row in rows)
    more = sum((row["graphs"] or 0) - (row["graphs_dense"] or 0) for row in rows)
    cells = [
        model,
        str(len(rows)),
        f"{total(rows, 'rewritten')} of {total(rows, 'sites')}",
        kept(rows),
        largest(rows, "policy_error"),
        largest(rows, "head_error"),
        str(max(more, 0)),
        str(bad or "–"),
    ]
    return f"| {' | '.join(cells)} |"


def kept(rows: list[Row]) -> str:
    """The largest error with every block kept; in half precision dense's beside it."""
    ours = largest(rows, "kept_error", "grad_error")
    if all(row.get("dtype", "float32") == "float32" for row in rows):
        return ours
    return f"{ours} (dense {largest(rows, 'dense_error', 'dense_grad_error')})"


def total(rows: list[Row], column: str) -> int:
    """Sum of a count."""
    return sum(row[column] or 0 for row in rows)


def largest(rows: list[Row], *columns: str) -> str:
    """The largest of some errors, or a dash."""
    values = [row[c] for row in rows for c in columns if row.get(c) is not None]
    return f"{max(values):.1e}" if values else "–"


def reasons(rows: list[Row]) -> list[str]:
    """Every reason for a site that is not sparse, the most frequent first."""
    counts: dict[str, int] = {}
    models: dict[str, set[str]] = {}
    for row in rows:
        for reason, count in row["reasons"].items():
            counts[reason] = counts.get(reason, 0) + count
            models.setdefault(reason, set()).add(row["model"])
    order = sorted(counts, key=lambda r: -counts[r])
    return [f"- {counts[r]} × {r} ({', '.join(sorted(models[r]))})" for r in order]
