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


def markdown(document: Mapping[str, Any]) -> str:
    """BOSCH's divergence on every task beside the best static ranking's, a line a cell."""
    tasks = list(dict.fromkeys(row["task"] for row in document["rows"]))
    lines = [
        f"| tokens | window | ratio | documents, mean | seeds | {' | '.join(tasks)} |",
        "|---" * (5 + len(tasks)) + "|",
    ]
    for (_, tokens, window, ratio, calibration), methods in sorted(cells(document).items()):
        own = methods.get("bosch")
        if own is None:
            continue
        rivals = {name: found for name, found in methods.items() if name in RANKINGS}
        seeds = len({row["seed"] for rows in own.values() for row in rows})
        told = [
            versus(own[task], {n: found[task] for n, found in rivals.items()}) for task in tasks
        ]
        read = documents(calibration)
        lines.append(
            f"| {tokens} | {window} | {ratio:g} | {read} | {seeds} | {' | '.join(told)} |"
        )
    return "\n".join(lines)


def documents(calibration: str) -> str:
    """How many documents a search read and held out, and how it averaged over tasks."""
    read, _, rest = calibration.rpartition(" x")[2].partition(", ")
    return f"{read}, {rest.rpartition(', ')[2]}"


def ablation(document: Mapping[str, Any]) -> str:
    """What a search loses without a part of it: losses over those of the whole search.

    Geometric means over the settings in which both finished; unseen: over the tasks as well.
    """
    searched: dict[str, list[float]] = defaultdict(list)
    unseen: dict[str, list[float]] = defaultdict(list)
    for methods in cells(document).values():
        if "bosch" not in methods:
            continue
        for name, by_task in methods.items():
            if name == "bosch" or name in (*RANKINGS, "random"):
                continue
            for task, rows in by_task.items():
                own = methods["bosch"][task]
                unseen[name].append(relative(rows, own, "kl"))
            searched[name].append(relative(rows, own, "loss_searched"))
    lines = [
        "| search | settings | loss on what it read | KL on what it did not |",
        "|---" * 4 + "|",
    ]
    for name, ratios in sorted(searched.items(), key=lambda item: float(geometric(item[1]))):
        lines.append(
            f"| {name} | {len(ratios)} | {geometric(ratios):.2f} | {geometric(unseen[name]):.2f} |"
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
    chosen: dict[Any, dict[float, str]] = defaultdict(dict)
    for row in document["rows"]:
        if row["method"] == "bosch":
            where = (row["model"], row["tokens"], row["window"], row["calibration"], row["seed"])
            chosen[where][row["ratio"]] = row["heads"]
    lines = []
    for (model, tokens, window, _, seed), by_ratio in chosen.items():
        ratios = sorted(by_ratio)
        for low, high in pairwise(ratios):
            fewer, more = by_ratio[low], by_ratio[high]
            left = sum(a == "1" and b == "0" for a, b in zip(fewer, more, strict=True))
            share = left / max(1, fewer.count("1"))
            lines.append(
                f"{model}, {tokens} tokens, window {window}, seed {seed}: "
                f"{share:.0%} of the windowed heads at {low:g} are global at {high:g}"
            )
    return lines


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
