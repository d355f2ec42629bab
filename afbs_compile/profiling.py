"""Which sites are profiled, by whom, and when is it enough? A walk over jobs that can be shared.

A job is the profile of one site on one input. Every worker runs the model through by itself, does
the jobs that nobody else has, and skips the rest; afterwards it waits for what is missing, and
does what dead workers left behind. The walk ends early when the budget does, or at Ctrl-C.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from afbs_compile.capture import Layer, Stream
from afbs_compile.evaluators import ProfileEvaluator, profiled
from afbs_compile.passes.rewrite import Site
from afbs_compile.progress import OnProgress
from afbs_compile.store import About, Arrays, Store, from_arrays, to_arrays
from afbs_compile.timing import signature
from afbs_compile.tuner.objective import Evaluator, Fidelity

BUDGET, INTERRUPTED = "tuning budget", "tuning was interrupted"
UNFINISHED = (BUDGET, INTERRUPTED)  # reasons of sites that a later start tunes
POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Clock:
    """When must profiling end? `deadline` in seconds of `time.monotonic`, or None."""

    deadline: float | None

    @staticmethod
    def of(budget_s: float | None) -> "Clock":
        """The clock of a budget that begins now."""
        return Clock(None if budget_s is None else time.monotonic() + budget_s)

    def over(self) -> bool:
        """Has the budget ended?"""
        return self.deadline is not None and time.monotonic() >= self.deadline


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What one job found: the evaluator, and the kind of the layer that decides its speed."""

    evaluator: ProfileEvaluator
    kind: str


@dataclass(slots=True)
class Walk:
    """One worker's way over the sites.

    Attributes:
        sites: In the graph's order.
        streams: One for every set of inputs.
        inputs: Their digests.
        store: Where jobs are kept.
        selector: How block scores are made.
        compensation: What stands for a block that is left out.
        low: The cheap fidelity of the search.
        clock: When to end.
        on_progress: Told about every site.
        keep: Whether tables stay in memory; a helper has no use for them.
        interrupted: Whether it only collects.
        found: By site and number of the input.
        stopped: Why it ended early, or None.
        measured: Jobs that this worker did itself.
    """

    sites: Sequence[Site]
    streams: Sequence[Stream]
    inputs: Sequence[str]
    store: Store
    selector: str
    compensation: str
    low: Fidelity
    clock: Clock
    on_progress: OnProgress
    keep: bool = True
    interrupted: bool = False
    found: dict[tuple[str, int], Found] = field(default_factory=dict)
    stopped: str | None = None
    measured: int = 0

    def run(self) -> None:
        """Do and collect jobs until all are there, or until it is enough."""
        try:
            left = self.once_over(self.sites)
            if self.interrupted:
                self.stopped = INTERRUPTED
            while left and self.keep and not self.stopped:
                if self.clock.over():
                    self.stopped = BUDGET
                    break
                time.sleep(POLL_SECONDS)
                left = self.once_over(left)
        except KeyboardInterrupt:
            self.stopped = INTERRUPTED
        self.on_progress(self.done(), len(self.sites), "profile", "")

    def once_over(self, sites: Sequence[Site]) -> list[Site]:
        """Go over some sites once; those that others are at, or that the budget left out.

        A worker measures one site at least, so that every start gets on.
        """
        left: list[Site] = []
        for n, site in enumerate(sites):
            if self.measured and self.clock.over():
                self.stopped = BUDGET
                return [*left, *sites[n:]]
            self.on_progress(self.done(), len(self.sites), "profile", site.name)
            known = [self.attempt(site, n) for n in range(len(self.streams))]
            if not all(known):
                left.append(site)
        return left

    def attempt(self, site: Site, n: int) -> bool:
        """Do or collect one job; False if somebody else is at it."""
        if (site.name, n) in self.found:
            return True
        about = job(site, self.inputs[n])
        if self.interrupted:
            known = self.store.load(about)
        else:
            known = self.store.once(about, lambda: self.measure(site, n))
        if known is None:
            return False
        if self.keep:
            values, arrays = known
            kind = values.pop("kind")
            evaluator = ProfileEvaluator(**from_arrays(values, arrays))
            self.found[site.name, n] = Found(evaluator, kind)
        return True

    def measure(self, site: Site, n: int) -> tuple[About, Arrays]:
        """Profile a site on one input."""
        layer = self.streams[n].layer(site.name)
        evaluator = profiled(
            layer, selector=self.selector, heads=site.heads, low=self.low,
            compensation=self.compensation,
        )  # fmt: skip
        self.measured += 1
        values, arrays = to_arrays(evaluator)
        return values | {"kind": kind_of(layer)}, arrays

    def done(self) -> int:
        """How many sites are known on all inputs."""
        return len(self.complete())

    def complete(self) -> list[Site]:
        """The sites that are known on all inputs."""
        every = range(len(self.streams))
        return [s for s in self.sites if all((s.name, n) in self.found for n in every)]

    def tables(self) -> list[dict[str, Evaluator]]:
        """For every set of inputs, the evaluators of the complete sites."""
        return [
            {site.name: self.found[site.name, n].evaluator for site in self.complete()}
            for n in range(len(self.streams))
        ]


def job(site: Site, digest: str) -> About:
    """All that tells the job of a site, on the input with this digest, from others."""
    return {
        "site": site.name,
        "input": digest,
        "heads": site.heads,
        "kv_heads": site.kv_heads,
        "head_dim": site.head_dim,
        "mask": [repr(site.mask), site.from_end, site.data.kind],
        "scale": site.scale,
    }


def kind_of(layer: Layer) -> str:
    """What decides a layer's speed at a given density, as text."""
    return repr(signature(layer))
