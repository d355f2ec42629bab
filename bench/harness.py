"""How long does a call take on this GPU? The one timer, and the one writer of result files.

Variants run in turn (A B A B …) between CUDA events, with the L2 cache flushed before every run;
reported are medians of ratios, so that a clock that drifts drifts for all. Before every run the
device is told to wait, long enough for the host to enqueue the whole call: events then hold
device time alone. What the host needs for a call is measured apart, by `host_us`.
"""

import functools
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch

from afbs_compile.versions import device_name, version, versions

RESULTS = Path(__file__).resolve().parent / "results"
BASELINES = ("flash-attn-4", "nvidia-cutlass-dsl")  # packages that results are compared with
FLUSH_BYTES = 256 << 20  # several times the largest L2
HOLD_MS = 1.5  # head start of the host, at least
LONGEST_HOLD_MS = 25.0  # a call that takes the host longer waits for the device itself
CALIBRATION_CYCLES = 20_000_000
ABSOLUTE = re.compile(r"(?:(?<==)|^)/(?:[^/]+/)*")  # the folders of an absolute path


class Event(Protocol):
    """A moment on the device."""

    def record(self) -> None:
        """Enqueue it."""

    def elapsed_time(self, later: Any, /) -> float:
        """Milliseconds from this event to a later one."""


class Device(Protocol):
    """What timing needs of a device: a queue that runs behind the host."""

    def event(self) -> Event:
        """A new event."""

    def hold(self, milliseconds: float) -> None:
        """Enqueue a wait."""

    def flush(self) -> None:
        """Enqueue what empties the caches."""

    def synchronize(self) -> None:
        """Wait until the queue is empty."""

    def now(self) -> float:
        """The host's clock, in seconds."""


class Cuda:
    """The current CUDA device."""

    def __init__(self) -> None:
        """Take the memory that flushes, and find out how fast the clock ticks."""
        self.scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        sleep(CALIBRATION_CYCLES)
        start, end = self.event(), self.event()
        start.record()
        sleep(CALIBRATION_CYCLES)
        end.record()
        self.synchronize()
        self.cycles_per_ms = CALIBRATION_CYCLES / start.elapsed_time(end)

    def event(self) -> Event:
        """A new event."""
        event: Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        return event

    def hold(self, milliseconds: float) -> None:
        """Enqueue a kernel that does nothing for so long."""
        sleep(int(milliseconds * self.cycles_per_ms))

    def flush(self) -> None:
        """Enqueue a write over more than the L2 cache."""
        self.scratch.zero_()

    def synchronize(self) -> None:
        """Wait until the queue is empty."""
        torch.cuda.synchronize()

    def now(self) -> float:
        """The host's clock, in seconds."""
        return time.perf_counter()


def sleep(cycles: int) -> None:
    """Enqueue a kernel that spins for `cycles` of the device's clock."""
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]


@functools.cache
def cuda() -> Device:
    """The current CUDA device, calibrated once."""
    return Cuda()


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    repeats: int = 9,
    warm_up: int = 2,
    device: Device | None = None,
) -> dict[str, list[float]]:
    """Device milliseconds of every run of every variant.

    Args:
        calls: The variants, by name.
        repeats: Runs of each.
        warm_up: Runs before these; the last one tells how long the host needs.
        device: Where they run; by default the current CUDA device.
    """
    device = device or cuda()
    slowest = max(host_ms(call, warm_up, device) for call in calls.values())
    hold_ms = min(max(HOLD_MS, 2 * slowest), LONGEST_HOLD_MS)
    events: dict[str, list[tuple[Event, Event]]] = {n: [] for n in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start, end = device.event(), device.event()
            device.flush()
            device.hold(hold_ms)
            start.record()
            call()
            end.record()
            events[name].append((start, end))
    device.synchronize()
    return {n: [s.elapsed_time(e) for s, e in pairs] for n, pairs in events.items()}


def host_ms(call: Callable[[], Any], runs: int, device: Device) -> float:
    """Milliseconds that the host needs to enqueue the last of some runs."""
    start = end = 0.0
    for _ in range(runs):
        device.synchronize()
        start = device.now()
        call()
        end = device.now()
    return 1e3 * (end - start)


def host_us(call: Callable[[], Any], calls: int = 20, device: Device | None = None) -> float:
    """Microseconds that the host needs for a call: the median of some behind one long wait."""
    device = device or cuda()
    one = host_ms(call, 3, device)
    device.hold(HOLD_MS + 2 * calls * one)
    times = []
    for _ in range(calls):
        start = device.now()
        call()
        times.append(device.now() - start)
    device.synchronize()
    return 1e6 * statistics.median(times)


def ratio(base: list[float], ours: list[float]) -> tuple[float, float]:
    """Median of base over ours, run by run, and the spread (interquartile range) of the ratios."""
    ratios = [b / o for b, o in zip(base, ours, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return statistics.median(ratios), high - low


def commit() -> str | None:
    """The commit that these files are at: AFBS_COMMIT if it is set, else what git says."""
    if told := os.environ.get("AFBS_COMMIT"):
        return told
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here), "rev-parse"]
    try:
        run = subprocess.run(
            [*git, "--show-prefix", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    prefix, found = run.stdout.splitlines()
    # an installed copy may lie inside the repository of somebody else
    return found if prefix == "bench/" else None


def command() -> str:
    """What was typed, as a shell reads it, without this machine's paths."""
    program, *arguments = sys.argv
    name = Path(program).name
    typed = [name] if name == "afbs" else ["python", program.removeprefix(f"{Path.cwd()}/")]
    while arguments:
        argument = arguments.pop(0)
        if argument == "--output":
            arguments = arguments[1:]
        elif not argument.startswith("--output="):
            typed.append(ABSOLUTE.sub("", argument))
    return shlex.join(typed)


def document(name: str, rows: list[dict[str, Any]], notes: Iterable[str] = ()) -> dict[str, Any]:
    """Rows with all that is needed to judge them.

    Args:
        name: The benchmark.
        rows: What was measured.
        notes: What was not measured, and why.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    others = {package: version(package) for package in BASELINES}
    cudnn = torch.backends.cudnn.version() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    others["cudnn"] = str(cudnn) if cudnn else None
    found = {
        "schema": 1,
        "name": name,
        "command": command(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "versions": versions() | {k: v for k, v in others.items() if v},
        "rows": rows,
    }
    told = list(notes)
    return found | {"notes": told} if told else found


def write(found: dict[str, Any], output: Path | None = None) -> Path:
    """Store a document under its name in `output`, by default among the committed results."""
    folder = output or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{found['name']}.json"
    path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    return path
