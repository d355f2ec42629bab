"""How long does a call take on this GPU? The one timer, and the one writer of result files.

Variants run in turn (A B A B …) between CUDA events, with the L2 cache flushed before every run;
reported are medians of ratios, so that a clock that drifts drifts for all.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from afbs_compile.versions import device_name, versions

RESULTS = Path(__file__).parent / "results"
FLUSH_BYTES = 256 << 20  # several times the largest L2


def interleaved(
    calls: Mapping[str, Callable[[], Any]], repeats: int = 9, warm_up: int = 2
) -> dict[str, list[float]]:
    """Milliseconds of every run of every variant."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(warm_up):
        for call in calls.values():
            call()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {n: [s.elapsed_time(e) for s, e in pairs] for n, pairs in events.items()}


def ratio(base: list[float], ours: list[float]) -> tuple[float, float]:
    """Median of base over ours, run by run, and the spread (interquartile range) of the ratios."""
    ratios = [b / o for b, o in zip(base, ours, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return statistics.median(ratios), high - low


def write(name: str, rows: list[dict[str, Any]]) -> Path:
    """Store rows with all that is needed to judge them."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    document = {
        "schema": 1,
        "name": name,
        "command": " ".join(["python", *sys.argv]),
        "commit": commit or None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "versions": versions(),
        "rows": rows,
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    return path
