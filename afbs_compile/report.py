"""What happened to the attention of my models? One record of every site seen by this process."""

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from afbs_compile.advice import next_step

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class SiteReport:
    """One attention call of one compiled graph, or of a module that runs without one.

    Attributes:
        name: Module path.
        decision: `sparse`, `dense` (tuned, but stays SDPA) or `refused` (cannot be rewritten).
        reason: Why it is not sparse.
        mask: What its mask was recognised as.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Head dim.
        length: Tokens that it was tuned at.
        density: Mean density over its heads.
        error: Largest measured error of its sparse heads.
        speedup: Dense over sparse seconds, as measured when it was tuned.
        kernel: The attention kernel that it takes, and why not a faster one.
        decided_by: Where its thresholds come from, if they were not tuned.
        calls: How often it was called, where calls are counted: not in compiled graphs.
    """

    name: str
    decision: str
    reason: str | None = None
    mask: str | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    length: int | None = None
    density: float | None = None
    error: float | None = None
    speedup: float | None = None
    kernel: str | None = None
    decided_by: str | None = None
    calls: int | None = None


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """Where a graph's policy came from: `cache` is `hit`, `miss` or `file`."""

    cache: str
    model: str
    length: int
    evaluations: int = 0
    seconds: float = 0.0
    policy_path: str | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that `explain` knows; sites of all graphs in the order of compilation."""

    sites: list[SiteReport]
    calibrations: list[CalibrationReport]

    @property
    def rewritten(self) -> int:
        """Sites that run sparse."""
        return sum(site.decision == "sparse" for site in self.sites)

    @property
    def calibration(self) -> CalibrationReport | None:
        """The latest calibration or cache read."""
        return self.calibrations[-1] if self.calibrations else None

    @property
    def reasons(self) -> Counter[str]:
        """How often each reason kept a site, or a counted call, from running sparse."""
        counts: Counter[str] = Counter()
        for site in self.sites:
            if site.reason:
                counts[site.reason] += site.calls or 1
        return counts

    def __str__(self) -> str:
        """A line a site, and a count of reasons."""
        return "\n".join([self.headline, *self.lines()])

    @property
    def headline(self) -> str:
        """How many sites run sparse."""
        return f"{self.rewritten} of {len(self.sites)} attention sites run sparse"

    def lines(self) -> Iterator[str]:
        """The sites, then the reasons with their next steps."""
        for site in self.sites:
            density = "" if site.density is None else f"  density {site.density:.2f}"
            kernel = f"  {site.kernel}" if site.kernel and site.decision == "sparse" else ""
            calls = "" if site.calls is None else f"  {site.calls} calls"
            why = site.reason or site.decided_by or ""
            yield f"  {site.name}: {site.decision}{density}{kernel}{calls}  {why}".rstrip()
        for reason, count in self.reasons.most_common():
            yield f"  {count} × {reason} → {next_step(reason)}"

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        return {
            "rewritten": self.rewritten,
            "sites": [asdict(site) | {"next_step": next_step(site.reason)} for site in self.sites],
            "reasons": dict(self.reasons),
            "calibrations": [asdict(calibration) for calibration in self.calibrations],
        }

    def __rich__(self) -> "Table":
        """The report as a table, for `rich.print`."""
        from rich.table import Table

        table = Table(title=self.headline, caption=self.caption, caption_justify="left")
        rows = [cells(site) for site in self.sites]
        shown = [name for name in (rows[0] if rows else ()) if any(row[name] for row in rows)]
        for name in shown:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*(row[name] for name in shown))
        return table

    @property
    def caption(self) -> str:
        """Every reason with its count and next step."""
        steps = (
            f"{n} × {reason} → {next_step(reason)}" for reason, n in self.reasons.most_common()
        )
        return "\n".join(steps)


def cells(site: SiteReport) -> dict[str, str]:
    """A row of the table."""
    return {
        "site": site.name,
        "mask": site.mask or "",
        "heads": f"{site.heads}/{site.kv_heads} × {site.head_dim}" if site.heads else "",
        "calls": "" if site.calls is None else str(site.calls),
        "decision": site.decision,
        "density": figure(site.density),
        "error": figure(site.error),
        "speed": "" if site.speedup is None else f"{site.speedup:.2f}×",
        "kernel": (site.kernel or "") if site.decision == "sparse" else "",
        "why": site.reason or site.decided_by or "",
    }


def figure(value: float | None) -> str:
    """A number for the table, or nothing."""
    return "" if value is None else f"{value:.2f}"


@dataclass(slots=True)
class Journal:
    """Collects reports from compilations in any thread."""

    sites: list[SiteReport] = field(default_factory=list)
    calibrations: list[CalibrationReport] = field(default_factory=list)
    calls: Counter[SiteReport] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add_sites(self, sites: list[SiteReport]) -> None:
        """Note the sites of a graph."""
        with self.lock:
            self.sites.extend(sites)

    def add_call(self, site: SiteReport) -> None:
        """Count a call that ran outside a compiled graph; equal ones are one site."""
        with self.lock:
            self.calls[site] += 1

    def add_calibration(self, calibration: CalibrationReport) -> None:
        """Note where a policy came from."""
        with self.lock:
            self.calibrations.append(calibration)

    def report(self) -> Report:
        """A copy of all that was noted."""
        with self.lock:
            counted = [replace(site, calls=n) for site, n in self.calls.items()]
            return Report([*self.sites, *counted], list(self.calibrations))

    def clear(self) -> None:
        """Forget everything."""
        with self.lock:
            self.sites.clear()
            self.calibrations.clear()
            self.calls.clear()


JOURNAL = Journal()


def explain() -> Report:
    """Every attention call that this process saw, and what became of it.

    `print` gives lines, `rich.print` a table, and `to_dict` JSON.
    """
    return JOURNAL.report()
