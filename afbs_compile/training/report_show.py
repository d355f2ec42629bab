"""How is a straggler report shown? A table, and a plot of waiting and budgets over time."""

from pathlib import Path

import numpy as np
from rich.table import Table

from afbs_compile.training.report import StragglerReport

SHOWN = 32  # replicas that the table lists: the slowest ones
COLUMNS = ("replica", "steps", "seconds", "waits", "slowest in", "budget")


def table(report: StragglerReport) -> Table:
    """Replicas, the busiest first, with what they waited."""
    summary = report.summary()
    rows = sorted(summary["replicas"], key=lambda row: -(row["seconds"] or 0.0))
    made = Table(*COLUMNS, title=f"{summary['steps']} steps", title_justify="left")
    for row in rows[:SHOWN]:
        made.add_row(
            str(row["replica"]),
            str(row["steps"]),
            shown(row["seconds"], "{:.4g} s"),
            shown(row["bubble"], "{:.1%}"),
            shown(row["slowest_in"], "{:.0%}"),
            shown(row["budget"], "{:.3f}"),
        )
    hidden = len(rows) - SHOWN
    made.caption = (
        f"step {shown(summary['step_seconds'], '{:.4g} s')}, waiting "
        f"{shown(summary['bubble'], '{:.1%}')} of all replicas' time, mean budget "
        f"{shown(summary['budget'], '{:.3f}')}, {summary['at_base']} steps at base budgets"
        + (f"; {hidden} faster replicas are not listed" if hidden > 0 else "")
    )
    return made


def shown(value: float | None, form: str) -> str:
    """A number, or a dash."""
    return "–" if value is None else form.format(value)


def draw(report: StragglerReport, path: Path) -> None:
    """Seconds, bubble and budgets over steps; the file's suffix says the format.

    Raises:
        ValueError: No step was timed.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    timed = [record for record in report.records if record.slowest is not None]
    if not timed:
        raise ValueError("no step was timed: there is nothing to draw")
    seconds = np.array([[np.nan if s is None else s for s in r.seconds] for r in timed])
    figure = Figure(figsize=(7.0, 6.5), layout="constrained")
    times, waits, budgets = figure.subplots(3, 1, sharex=True)
    steps = np.arange(len(timed))
    times.fill_between(steps, np.nanmin(seconds, 1), np.nanmax(seconds, 1), alpha=0.3,
                       label="fastest to slowest")  # fmt: skip
    times.plot(steps, np.nanmean(seconds, 1), label="mean")
    targets = [np.nan if r.target is None else r.target for r in timed]
    if np.isfinite(targets).any():
        times.plot(steps, targets, color="0.3", linestyle=":", label="planned")
    times.set(ylabel="seconds", ylim=(0.0, None))
    times.legend(fontsize="small")
    waits.plot(steps, [100 * (r.bubble or 0.0) for r in timed], color="C3")
    waits.set(ylabel="waiting, %", ylim=(0.0, None))
    known = [(n, r.budget) for n, r in enumerate(timed) if r.budget is not None]
    if known:
        at, values = [n for n, _ in known], np.array([budget for _, budget in known])
        budgets.fill_between(at, values.min(1), values.max(1), alpha=0.3, color="C2")
        budgets.plot(at, values.mean(1), color="C2")
    budgets.set(xlabel="step", ylabel="budget, share of blocks", ylim=(0.0, None))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "stragglers"}):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=120, metadata=metadata)
