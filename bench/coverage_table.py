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
Row = dict[str, Any]


def wrong(row: Row) -> str | None:
    """What is wrong with a row, or None."""
    if row["failure"]:
        return str(row["failure"])
    for column, bar in BARS.items():
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
        largest(rows, "kept_error", "grad_error"),
        largest(rows, "policy_error"),
        largest(rows, "head_error"),
        str(max(more, 0)),
        str(bad or "–"),
    ]
    return f"| {' | '.join(cells)} |"


def total(rows: list[Row], column: str) -> int:
    """Sum of a count."""
    return sum(row[column] or 0 for row in rows)


def largest(rows: list[Row], *columns: str) -> str:
    """The largest of some errors, or a dash."""
    values = [row[c] for row in rows for c in columns if row[c] is not None]
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
