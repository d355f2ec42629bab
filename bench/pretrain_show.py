"""How are two training runs shown? A table, and their loss curves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

SMOOTH = 10  # steps that a drawn point averages


def markdown(document: Mapping[str, Any]) -> str:
    """A line a run."""
    lines = [
        "| run | steps | train loss | held-out loss | step | tokens/s | speed-up | memory |",
        "|---" * 8 + "|",
    ]
    rows = document["rows"]
    base = rows[0]["step_ms"]
    for row in rows:
        final = float(np.mean(row["losses"][-SMOOTH:])) if row["losses"] else float("nan")
        held = f"{row['held_out'][-1][1]:.3f}" if row["held_out"] else "–"
        step = row["step_ms"]
        ms, rate, gain = (
            (f"{step:.1f} ms", f"{row['tokens_per_s']:,.0f}", f"{base / step:.2f}x")
            if step and base
            else ("–", "–", "–")
        )
        memory = "–" if row["peak_mib"] is None else f"{row['peak_mib'] / 1024:.1f} GiB"
        lines.append(
            f"| {row['run']} | {row['steps']} | {final:.3f} | {held} | {ms} | {rate} | {gain} "
            f"| {memory} |"
        )
    return "\n".join([*lines, "", *document.get("notes", [])])


def show(document: Mapping[str, Any]) -> None:
    """Print the table."""
    from afbs_compile.commands.output import emit_text

    emit_text(markdown(document))


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Loss over steps and over seconds; dots are held-out."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for color, row in zip(("0.4", "C0"), document["rows"], strict=True):
        seconds = np.arange(1, row["steps"] + 1) * (row["step_ms"] or np.nan) / 1e3
        for axes, at in zip(panels, (np.arange(1, row["steps"] + 1), seconds), strict=True):
            curve = smoothed(row["losses"])
            axes.plot(at[len(at) - len(curve) :], curve, color=color, label=row["run"])
            if row["held_out"]:
                steps, losses = zip(*row["held_out"], strict=True)
                axes.plot(at[np.array(steps) - 1], losses, "o", color=color, markersize=3)
    panels[0].set(xlabel="step", ylabel="loss, nats a byte")
    panels[1].set(xlabel="seconds of training")
    panels[0].legend(fontsize="small")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "pretrain"}):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=120, metadata=metadata)


def smoothed(losses: list[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A running mean over `SMOOTH` steps, or fewer if there are fewer."""
    width = min(SMOOTH, len(losses))
    return (
        np.convolve(losses, np.full(width, 1 / max(width, 1)), "valid") if width else np.empty(0)
    )
