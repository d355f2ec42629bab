"""How are strategies shown side by side? A table for every goal, and sparsity against cost."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from afbs_compile.commands.output import console

Row = dict[str, Any]
MEANS = (
    "high_evaluations", "evaluations", "cost_dense_passes", "sparsity", "gap", "heldout_over",
    "heldout_over_1_1", "seconds",
)  # fmt: skip
FORMATS = ("{:.1f}", "{:.1f}", "{:.1f}", "{:.4f}", "{:+.4f}", "{:.0%}", "{:.0%}", "{:.1f}")
HEADS = ("strategy", "at high", "all", "cost", "sparsity", "gap", "over", "> 1.1", "seconds")


def label(row: Row) -> str:
    """A strategy's name, and whether probe layers helped it."""
    return f"{row['strategy']} + {row['probes']} probes" if row["probes"] else row["strategy"]


def means(document: Mapping[str, Any]) -> dict[tuple[int, float], dict[str, dict[str, float]]]:
    """Means over the seeds, by (documents, max_error) and label."""
    groups: dict[tuple[int, float], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in document["rows"]:
        groups[row["documents"], row["max_error"]][label(row)].append(row)
    return {
        goal: {
            name: {column: float(np.mean([row[column] for row in rows])) for column in MEANS}
            for name, rows in strategies.items()
        }
        for goal, strategies in groups.items()
    }


def show(document: Mapping[str, Any]) -> None:
    """Print a table for every goal; evaluations are per head, cost is per layer."""
    output = console()
    for (documents, max_error), strategies in means(document).items():
        windows = f"{documents} window{'s' if documents > 1 else ''}"
        table = Table(*HEADS, title=f"max_error {max_error:g}, calibrated on {windows}")
        for name, values in strategies.items():
            cells = zip(FORMATS, (values[column] for column in MEANS), strict=True)
            table.add_row(name, *(form.format(value) for form, value in cells))
        output.print(table)


def markdown(document: Mapping[str, Any]) -> str:
    """One table, a row a strategy: means over all goals."""
    goals = means(document)
    names = list(dict.fromkeys(name for goal in goals.values() for name in goal))
    lines = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    for name in names:
        every = [goal[name] for goal in goals.values() if name in goal]
        cells = (
            form.format(float(np.mean([values[column] for values in every])))
            for form, column in zip(FORMATS, MEANS, strict=True)
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Sparsity against cost, a panel for every goal; the file's suffix says the format."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    goals = means(document)
    size = (4.6 * len(goals), 4.0)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(goals), squeeze=False)[0]
    for axes, ((documents, max_error), strategies) in zip(panels, goals.items(), strict=True):
        optimum = max(values["sparsity"] + values["gap"] for values in strategies.values())
        axes.axhline(optimum, color="0.6", linestyle=":", label="optimum")
        for n, (name, values) in enumerate(strategies.items()):
            at = values["cost_dense_passes"], values["sparsity"]
            axes.plot(*at, "os^vDP*X"[n % 8], color=f"C{n}", label=name)
        axes.set(xscale="log", xlabel="dense passes a layer", ylabel="sparsity",
                 title=f"max_error {max_error:g}, {documents} window(s)")  # fmt: skip
    panels[0].legend(fontsize="small")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "tuner"}):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=120, metadata=metadata)
