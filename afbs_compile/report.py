"""What happened to the attention of my models? One record of every site seen by this process."""

import threading
from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class SiteReport:
    """One attention call of one compiled graph.

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
        """How often each reason kept a site from running sparse."""
        return Counter(site.reason for site in self.sites if site.reason)

    def __str__(self) -> str:
        """A line a site, and a count of reasons."""
        lines = [f"{self.rewritten} of {len(self.sites)} attention sites run sparse"]
        for site in self.sites:
            density = "" if site.density is None else f"  density {site.density:.2f}"
            lines.append(f"  {site.name}: {site.decision}{density}  {site.reason or ''}".rstrip())
        lines += [f"  {count} × {reason}" for reason, count in self.reasons.most_common()]
        return "\n".join(lines)


@dataclass(slots=True)
class Journal:
    """Collects reports from compilations in any thread."""

    sites: list[SiteReport] = field(default_factory=list)
    calibrations: list[CalibrationReport] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add_sites(self, sites: list[SiteReport]) -> None:
        """Note the sites of a graph."""
        with self.lock:
            self.sites.extend(sites)

    def add_calibration(self, calibration: CalibrationReport) -> None:
        """Note where a policy came from."""
        with self.lock:
            self.calibrations.append(calibration)

    def report(self) -> Report:
        """A copy of all that was noted."""
        with self.lock:
            return Report(list(self.sites), list(self.calibrations))

    def clear(self) -> None:
        """Forget everything."""
        with self.lock:
            self.sites.clear()
            self.calibrations.clear()


JOURNAL = Journal()


def explain() -> Report:
    """Every attention call seen by the backend in this process, and what became of it."""
    return JOURNAL.report()
