"""How are simulated speed-ups shown? Tables, SparseBalance's ablation beside ours, and a plot."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

# Table I of arXiv 2604.13847 (Qwen2.5-3B, ChatQA2), as reported second-hand
PAPER = {
    "random": 1.00,
    "controller": 1.08,
    "length": 1.23,
    "sparsity": 1.21,
    "length+controller": 1.28,
    "both": 1.35,
}
METHODS = ("random", "sorted", "length", "sparsity", "controller", "length+controller", "both")
Row = dict[str, Any]
Key = tuple[Any, ...]
WORLD = ("mixture", "densities", "sync", "ranks")


def means(
    rows: Iterable[Row], names: tuple[str, ...]
) -> dict[Key, dict[str, tuple[float, float]]]:
    """Mean and standard deviation over seeds of what rows with equal `names` have."""
    groups: dict[Key, list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in names)].append(row)
    columns = ("step_ms", "speedup_random", "speedup_sorted", "imbalance", "kept_ratio")
    return {
        key: {
            name: (float(np.mean(values)), float(np.std(values)))
            for name in columns
            for values in [[row[name] for row in found]]
        }
        for key, found in groups.items()
    }


def grid(document: Mapping[str, Any]) -> dict[Key, dict[str, tuple[float, float]]]:
    """Means of the grid by mixture, densities, sync, ranks, method and bounds."""
    rows = [row for row in document["rows"] if row["case"] == "grid"]
    return means(rows, (*WORLD, "method", "bounds"))


def markdown(document: Mapping[str, Any]) -> str:
    """Speed-up over random and over sorted batches: a line for every world."""
    found = grid(document)
    kinds = sorted({key[4:] for key in found}, key=lambda k: (METHODS.index(k[0]), str(k[1])))
    kinds = [kind for kind in kinds if kind[0] not in ("random", "length+controller")]
    heads = [f"{method}{f' {bounds}' if bounds else ''}" for method, bounds in kinds]
    lines = [
        f"| lengths, densities, wait at, ranks | {' | '.join(heads)} |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for world in dict.fromkeys(key[:4] for key in found):
        mixture, densities, sync, ranks = world
        cells = [cell(found.get((*world, *kind))) for kind in kinds]
        lines.append(f"| {mixture}, {densities}, {sync}, {ranks} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *ablation_markdown(document)])


def cell(values: Mapping[str, tuple[float, float]] | None) -> str:
    """Speed-up over random ± its spread, and over sorted batches."""
    if values is None:
        return "–"
    (mean, spread), (over_sorted, _) = values["speedup_random"], values["speedup_sorted"]
    return f"{mean:.2f} ± {spread:.2f} ({over_sorted:.2f})"


def ablation_markdown(document: Mapping[str, Any]) -> list[str]:
    """The paper's ablation beside ours."""
    rows = [row for row in document["rows"] if row["case"] == "ablation"]
    found = {method: values for (method,), values in means(rows, ("method",)).items()}
    if not found:
        return []
    lines = [
        "| method | SparseBalance | here | imbalance | kept blocks |",
        "|---|---|---|---|---|",
    ]
    for method in METHODS:
        paper = f"{PAPER[method]:.2f}" if method in PAPER else "–"
        values = found[method]
        mean, spread = values["speedup_random"]
        lines.append(
            f"| {method} | {paper} | {mean:.2f} ± {spread:.2f} | {values['imbalance'][0]:.2f} "
            f"| {values['kept_ratio'][0]:.2f}× |"
        )
    return lines


def show(document: Mapping[str, Any]) -> None:
    """Print the tables."""
    from afbs_compile.commands.output import emit_text

    emit_text(markdown(document))


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Speed-up over random batches by ranks, a panel a world; bars are one deviation."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    found = {key: v for key, v in grid(document).items() if key[5] in (None, "0.75–1.5")}
    densities = next(iter(found))[1]
    worlds = list(dict.fromkeys((key[0], key[2]) for key in found))
    figure = Figure(figsize=(3.6 * len(worlds), 3.6), layout="constrained")
    panels = figure.subplots(1, len(worlds), squeeze=False)[0]
    for axes, (mixture, sync) in zip(panels, worlds, strict=True):
        for n, method in enumerate(METHODS[1:]):
            points = sorted(
                (key[3], *values["speedup_random"])
                for key, values in found.items()
                if (key[0], key[1], key[2], key[4]) == (mixture, densities, sync, method)
            )
            ranks, mean, spread = zip(*points, strict=True)
            axes.errorbar(ranks, mean, spread, marker="os^vDP"[n], color=f"C{n}", label=method,
                          linewidth=1, markersize=4)  # fmt: skip
        axes.axhline(1.0, color="0.6", linestyle=":")
        axes.set(xscale="log", xlabel="ranks", title=f"{mixture}, waits: {sync}")
    panels[0].set_ylabel("speed-up over random batches")
    panels[0].legend(fontsize="small")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "balance"}):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=120, metadata=metadata)
