"""How is recovery shown? What a hybrid has above the dense model trained beside it, by step."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

Row = dict[str, Any]
HYBRID = ("bosch", "random")
PARTS = {1: "all", 2: "new text", 3: "repeated text"}  # columns of a curve


def lost(document: Mapping[str, Any], part: int = 1) -> dict[str, dict[int, np.ndarray]]:
    """Nats a prediction above the dense run of the same seed, at every judged step [n].

    Args:
        document: Of the benchmark.
        part: Column of a curve: 1 all predictions, 2 new text, 3 repeated text.

    Returns:
        By method and seed; seeds without a dense run are left out.
    """
    curves: dict[int, dict[str, np.ndarray]] = defaultdict(dict)
    for row in document["rows"]:
        curves[row["seed"]][row["method"]] = np.array(row["curve"])[:, part]
    return {
        method: {
            seed: found[method] - found["dense"]
            for seed, found in sorted(curves.items())
            if method in found and "dense" in found
        }
        for method in HYBRID
    }


def recovered(curve: np.ndarray) -> float:
    """The share of what was lost before training that is not lost after it."""
    return float(1 - curve[-1] / curve[0])


def spread(values: Iterable[float], digits: int = 4) -> str:
    """Mean and deviation over seeds."""
    known = list(values)
    if not known:
        return "–"
    deviation = f" ± {np.std(known, ddof=1):.{digits}f}" if len(known) > 1 else ""
    return f"{np.mean(known):.{digits}f}{deviation}"


def markdown(document: Mapping[str, Any]) -> str:
    """A line a method and kind of prediction, then what the figures are."""
    rows = document["rows"]
    if not rows:
        return "\n".join(["nothing was measured", *document.get("notes", [])])
    steps = [int(point[0]) for point in rows[0]["curve"]]
    shown = sorted({0, 1, len(steps) // 2, len(steps) - 1} & set(range(len(steps))))
    lines = [
        f"| heads | loss of | {' | '.join(f'lost at step {steps[n]}' for n in shown)} "
        "| recovered | seeds |",
        "|---" * (len(shown) + 4) + "|",
    ]
    for part, name in PARTS.items():
        for method, by_seed in lost(document, part).items():
            curves = list(by_seed.values())
            cells = [spread(curve[n] for curve in curves) for n in shown]
            share = spread(map(recovered, curves), 2)
            lines.append(f"| {method} | {name} | {' | '.join(cells)} | {share} | {len(curves)} |")
    return "\n".join([*lines, "", *about(rows), *document.get("notes", [])])


def about(rows: list[Row]) -> list[str]:
    """What was trained, and what the dense model does meanwhile."""
    one = rows[0]
    dense = [np.array(row["curve"])[:, 1] for row in rows if row["method"] == "dense"]
    own = [
        f"The dense model itself: {dense[0][0]:.4f} before, {spread(c[-1] for c in dense)} after."
    ] if dense else []  # fmt: skip
    return [
        f"{one['model']} ({one['parameters'] / 1e6:.1f} M parameters, {one['base_steps']} steps "
        f"from scratch), {one['texts']}, {one['tokens']} bytes a document, {one['held_out']} "
        f"held out; {one['ratio']:.0%} of the KV heads with a window of {one['window']}, "
        f"{one['steps']} steps of {one['batch']} documents. Nats a byte above the dense model "
        "after as many steps on the same documents, ± the deviation over seeds.",
        *own,
    ]
