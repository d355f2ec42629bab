"""How are ways to choose windowed heads shown side by side? A table, and scores by ratio."""

from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from afbs_compile.commands.output import console

Row = dict[str, Any]
Cell = tuple[Any, ...]  # model, tokens, window, ratio, calibration
SETTING = ("model", "tokens", "window", "ratio", "calibration")
MEAN = "relative"  # what a loss is now; earlier searches took a mean over the tasks
RANKINGS = ("begin", "middle", "end", "interleaved", "locality", "fisher", "retrieval")


def cells(document: Mapping[str, Any]) -> dict[Cell, dict[str, dict[str, list[Row]]]]:
    """The rows by setting, method and task."""
    found: dict[Cell, dict[str, dict[str, list[Row]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for row in document["rows"]:
        cell = tuple(row[name] for name in SETTING)
        found[cell][row["method"]][row["task"]].append(row)
    return found


def scored(rows: list[Row]) -> str:
    """Mean score, with the deviation over the seeds where there are several."""
    scores = [row["score"] for row in rows]
    spread = f" ±{np.std(scores, ddof=1):.3f}" if len(scores) > 1 else ""
    return f"{np.mean(scores):.3f}{spread}"


def current(document: Mapping[str, Any]) -> dict[Cell, dict[str, dict[str, list[Row]]]]:
    """The cells of the search as it is; results keep those of an earlier one for its ablations."""
    found = cells(document)
    own = {cell: methods for cell, methods in found.items() if cell[-1].endswith(MEAN)}
    return own or found


def markdown(document: Mapping[str, Any]) -> str:
    """BOSCH's divergence on every task beside the best static ranking's, a line a cell."""
    shown = {cell: found for cell, found in current(document).items() if "bosch" in found}
    tasks = list(dict.fromkeys(task for found in shown.values() for task in found["bosch"]))
    lines = [
        f"| tokens | window | ratio | documents | seeds | {' | '.join(tasks)} |",
        "|---" * (5 + len(tasks)) + "|",
    ]
    for (_, tokens, window, ratio, calibration), methods in sorted(shown.items()):
        own, rivals = methods["bosch"], rankings(methods)
        seeds = len({row["seed"] for rows in own.values() for row in rows})
        told = [
            versus(own[task], {n: found[task] for n, found in rivals.items()}) for task in tasks
        ]
        read = documents(calibration)
        lines.append(
            f"| {tokens} | {window} | {ratio:g} | {read} | {seeds} | {' | '.join(told)} |"
        )
    return "\n".join(lines)


def summary(document: Mapping[str, Any]) -> str:
    """By ratio: in how many cells no ranking is better, and KL over that of the rankings."""
    lines = [
        "| ratio | cells | no ranking better | over the best ranking of each task (seeds) "
        "| over the best ranking | worst cell |",
        "|---" * 6 + "|",
    ]
    shown = {cell: found for cell, found in current(document).items() if "bosch" in found}
    for ratio in sorted({cell[3] for cell in shown}):
        own = [relations(found) for cell, found in shown.items() if cell[3] == ratio]
        by_task = [x for each, _, _ in own for x in each]
        spread = float(np.mean([spread for _, _, spread in own]))
        lines.append(
            f"| {ratio:g} | {len(by_task)} | {sum(x <= 1 for x in by_task)} | "
            f"{geometric(by_task):.2f} (±{spread:.2f}) | "
            f"{geometric([x for _, x, _ in own]):.2f} | {max(by_task):.2f} |"
        )
    return "\n".join(lines)


def relations(methods: Mapping[str, dict[str, list[Row]]]) -> tuple[list[float], float, float]:
    """BOSCH's KL over the rankings' in a setting.

    Returns:
        Over the least of each task; the geometric mean over the tasks over that of the ranking
        where it is least; the mean deviation over seeds, relative.
    """
    own, rivals = methods["bosch"], rankings(methods)
    mean = {task: float(np.mean([row["kl"] for row in rows])) for task, rows in own.items()}
    each = {
        name: [float(np.mean([row["kl"] for row in found[task]])) for task in own]
        for name, found in rivals.items()
    }
    by_task = [x / min(one[n] for one in each.values()) for n, x in enumerate(mean.values())]
    best = min(geometric(one) for one in each.values())
    spread = [np.std([r["kl"] for r in rows], ddof=1) / mean[task]
              for task, rows in own.items() if len(rows) > 1]  # fmt: skip
    whole = geometric(list(mean.values())) / best
    return by_task, whole, float(np.mean(spread)) if spread else 0.0


def rankings(methods: Mapping[str, dict[str, list[Row]]]) -> dict[str, dict[str, list[Row]]]:
    """Those of the methods that are static rankings or rules."""
    return {name: found for name, found in methods.items() if name in RANKINGS}


def documents(calibration: str) -> str:
    """How many documents a search read and held out."""
    return calibration.rpartition(" x")[2].partition(", ")[0]


def ablation(document: Mapping[str, Any]) -> str:
    """What a search loses without a part of it: losses over those of the whole search.

    Geometric means over the settings in which both finished; unseen: over the tasks as well.
    """
    searched: dict[tuple[bool, str], list[float]] = defaultdict(list)
    unseen: dict[tuple[bool, str], list[float]] = defaultdict(list)
    now = current(document)
    for cell, methods in cells(document).items():
        if "bosch" not in methods:
            continue
        for name, by_task in methods.items():
            if name == "bosch" or name in (*RANKINGS, "random"):
                continue
            where = cell not in now, name
            for task, rows in by_task.items():
                unseen[where].append(relative(rows, methods["bosch"][task], "kl"))
            searched[where].append(relative(rows, methods["bosch"][task], "loss_searched"))
    lines = [
        "| search | version | settings | cost of what it read | KL of what it did not |",
        "|---" * 5 + "|",
    ]
    for where, ratios in sorted(
        searched.items(), key=lambda item: (item[0][0], geometric(item[1]))
    ):
        before, name = where
        lines.append(
            f"| {name} | {'before' if before else 'now'} | {len(ratios)} | "
            f"{geometric(ratios):.2f} | {geometric(unseen[where]):.2f} |"
        )
    return "\n".join(lines)


def relative(rows: list[Row], own: list[Row], figure: str) -> float:
    """A mean over seeds over that of the whole search."""
    return float(np.mean([r[figure] for r in rows]) / np.mean([r[figure] for r in own]))


def geometric(ratios: list[float]) -> float:
    """Geometric mean."""
    return float(np.exp(np.mean(np.log(ratios))))


def versus(own: list[Row], rivals: Mapping[str, list[Row]]) -> str:
    """Mean KL of BOSCH over seeds, in bold where no rival's is smaller, and the best rival's."""
    kl = float(np.mean([row["kl"] for row in own]))
    best, name = min(
        (float(np.mean([row["kl"] for row in rows])), n) for n, rows in rivals.items()
    )
    mark = "**" if kl <= best else ""
    return f"{mark}{kl:.4f}{mark} ({name} {best:.4f})"


def turnover(document: Mapping[str, Any]) -> list[str]:
    """How many of BOSCH's heads change between neighbouring ratios, beyond what must."""
    chosen: dict[Any, dict[float, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
    for (model, tokens, window, ratio, _), methods in current(document).items():
        for row in methods.get("bosch", {}).get("text", []):
            chosen[model, tokens, window][ratio][row["seed"]] = row["heads"]
    lines = []
    for (model, tokens, window), by_ratio in sorted(chosen.items()):
        told = []
        for low, high in pairwise(sorted(by_ratio)):
            pairs = [(one, by_ratio[high][seed]) for seed, one in by_ratio[low].items()
                     if seed in by_ratio[high]]  # fmt: skip
            if pairs:
                left = [turned(fewer, more) for fewer, more in pairs]
                told.append(f"{low:g} to {high:g} {np.mean(left):.0%}")
        if told:
            lines.append(f"{model}, {tokens} tokens, window {window}: {', '.join(told)}")
    return lines


def turned(fewer: str, more: str) -> float:
    """The share of the heads windowed first that are global with more windowed heads."""
    left = sum(a == "1" and b == "0" for a, b in zip(fewer, more, strict=True))
    return left / max(1, fewer.count("1"))


def show(document: Mapping[str, Any]) -> None:
    """Print a table for every model, length, window and ratio."""
    output = console()
    for (model, tokens, window, ratio, calibration), methods in cells(document).items():
        tasks = list(dict.fromkeys(task for by_task in methods.values() for task in by_task))
        title = f"{model}, {tokens} tokens, window {window}, ratio {ratio:g}; {calibration}"
        table = Table("method", *tasks, "loss", "evaluations", "seeds", title=title)
        for name, by_task in methods.items():
            first = next(iter(by_task.values()))
            loss = np.mean([row["loss_searched"] for row in first])
            evaluations = np.mean([row["evaluations"] for row in first])
            scores = [scored(by_task[task]) if task in by_task else "–" for task in tasks]
            table.add_row(name, *scores, f"{loss:.4f}", f"{evaluations:.0f}", str(len(first)))
        output.print(table)
    output.print("text: −KL; others: mean log-probability of the answer. Larger is better. loss: "
                 "on what was searched, 0 dense, 1 no global head.", markup=False)  # fmt: skip
    for line in [*turnover(document), *document.get("notes", ())]:
        output.print(line, markup=False)


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Score against ratio, a panel for every task; the file's suffix says the format."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = document["rows"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = Figure(figsize=(4.2 * max(1, len(tasks)), 4.2), layout="constrained")
    panels = figure.subplots(1, max(1, len(tasks)), squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=False):
        for n, method in enumerate(methods):
            own = [row for row in rows if row["task"] == task and row["method"] == method]
            ratios = sorted({row["ratio"] for row in own})
            scores = [np.mean([r["score"] for r in own if r["ratio"] == x]) for x in ratios]
            style = {"linewidth": 2.5, "zorder": 3} if method == "bosch" else {"alpha": 0.7}
            axes.plot(ratios, scores, marker="os^vDP*X"[n % 8], label=method, color=f"C{n % 10}",
                      linestyle="-" if n < 10 else ":", **style)  # fmt: skip
        axes.set(xlabel="share of KV groups with a window", ylabel="score", title=task)
    panels[-1].legend(fontsize="x-small")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "hybrid"}):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=120, metadata=metadata)
