"""How are live runs shown? Methods side by side, means and deviations over seeds."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from afbs_compile.commands.training_options import METHODS

Row = dict[str, Any]
SAME = ("random", "length", "sparsity")  # the same steps, but for rounding
BASES = ("random", "length", "sparsity")


def markdown(document: Mapping[str, Any]) -> str:
    """A table a setting, a line a method; speed-ups are of the same seed."""
    settings = {setting(row): None for row in document["rows"]}
    tables = [table([r for r in document["rows"] if setting(r) == one]) for one in settings]
    return "\n\n".join([*tables, *document.get("notes", [])])


def setting(row: Row) -> str:
    """What rows of one table share, for people."""
    return (
        f"{row['ranks']} ranks ({row['backend']}), {row['micro_batches']} micro-batches of "
        f"{row['rows']} documents each, {row['steps']} steps"
    )


def table(found: list[Row]) -> str:
    """The rows of one setting."""
    rows: dict[str, dict[int, Row]] = {method: {} for method in METHODS}
    for row in found:
        rows[row["method"]][row["seed"]] = row
    lines = [
        f"{setting(found[0])}:",
        "",
        "| method | step | waiting | over random | over length | over sparsity | kept blocks "
        "| held-out loss |",
        "|---" * 8 + "|",
    ]
    lines += [line(method, rows) for method in METHODS if rows[method]]
    return "\n".join([*lines, "", *apart(rows)])


def line(method: str, rows: Mapping[str, Mapping[int, Row]]) -> str:
    """One method."""
    own = rows[method]
    ratios = [
        told(
            [rows[base][s]["step_ms"] / own[s]["step_ms"] for s in own if s in rows[base]],
            "{:.3f}",
        )
        for base in BASES
    ]
    cells = [
        told([r["step_ms"] for r in own.values()], "{:.1f}") + " ms",
        told([100 * r["bubble"] for r in own.values()], "{:.1f}") + " %",
        *ratios,
        told([r["kept_ratio"] for r in own.values()], "{:.3f}"),
        told([r["held_out"] for r in own.values()], "{:.4f}"),
    ]
    return f"| {method} | {' | '.join(cells)} |"


def gains(base: Mapping[int, Row], own: Mapping[int, Row]) -> list[float]:
    """Step time over step time of the seeds that both have."""
    return [base[seed]["step_ms"] / own[seed]["step_ms"] for seed in own if seed in base]


def told(values: list[float], form: str) -> str:
    """Mean ± standard deviation, or a dash."""
    if not values:
        return "–"
    return f"{form.format(np.mean(values))} ± {form.format(np.std(values))}"


def apart(rows: Mapping[str, Mapping[int, Row]]) -> list[str]:
    """How far methods with the same steps ended apart, for rounding's sake."""
    seeds = set.intersection(*[set(rows[method]) for method in SAME])
    if not seeds:
        return []
    losses = [[rows[method][seed]["held_out"] for method in SAME] for seed in sorted(seeds)]
    most = max(max(found) - min(found) for found in losses)
    return [f"Held-out losses of {', '.join(SAME)} are at most {most:.1e} apart in a seed."]


def show(document: Mapping[str, Any]) -> None:
    """Print the table."""
    from afbs_compile.commands.output import emit_text

    emit_text(markdown(document))
