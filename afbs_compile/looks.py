"""What do thresholds that were tuned elsewhere do to this call? Some query blocks of every site.

What `carry` (another length) and `recheck` (another call) share: a short profile of each site of
one input, and thresholds that back off until each head keeps its cap on it.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from afbs_compile.capture import Stream
from afbs_compile.evaluators import ProfileEvaluator, profiled
from afbs_compile.options import Options
from afbs_compile.passes.rewrite import Site
from afbs_compile.policy import Site as SitePolicy
from afbs_compile.problem import Problem, cuda_devices, untraced
from afbs_compile.progress import OnProgress
from afbs_compile.timing import Speed, measure, signature
from afbs_compile.tuner.arrays import Bools, Floats
from afbs_compile.tuner.backoff import back_off
from afbs_compile.tuner.objective import FULL, u_of_tau
from afbs_compile.tuner.trace import Trace, Traced
from afbs_compile.tuner.tune import SiteResult

ROWS = 16  # query blocks that are looked at
MARGIN = 0.9  # of the cap, as in tuning


@dataclass(frozen=True, slots=True)
class Look:
    """One site of one input: what thresholds do there, and how long its kernels take."""

    site: Site
    evaluator: ProfileEvaluator
    speed: Speed


@contextmanager
def aside(problem: Problem) -> Iterator[None]:
    """Where looks are taken: without gradients, and the caller's random state stays as it is."""
    with torch.random.fork_rng(cuda_devices(problem.inputs)), torch.no_grad(), untraced():
        yield


def looks(problem: Problem, names: Collection[str], on_progress: OnProgress) -> Iterator[Look]:
    """Profile the named sites on the problem's first input, in the graph's order; use `aside`."""
    options = problem.options
    sites = [site for site in problem.sites if site.name in names]
    speeds: dict[tuple[object, ...], Speed] = {}
    stream = Stream(problem.gm, problem.inputs[0], problem.sites)
    for n, site in enumerate(sites):
        on_progress(n, len(sites), "validate", site.name)
        layer = stream.layer(site.name)
        if (kind := signature(layer)) not in speeds:
            speeds[kind] = measure(layer, options.selector, options.compensation)
        evaluator = profiled(
            layer, selector=options.selector, heads=site.heads,
            compensation=options.compensation, most_rows=ROWS,
        )  # fmt: skip
        yield Look(site, evaluator, speeds[kind])
    on_progress(len(sites), len(sites), "validate", "")


def thresholds(policy: SitePolicy) -> tuple[Floats, Bools]:
    """Of a policy: u `[H]`, and which heads are dense."""
    u = u_of_tau(np.array([min(head.tau, 1.0) for head in policy.heads]))
    return u, np.array([head.mode == "dense" for head in policy.heads])


def settled(look: Look, u: Floats, dense: Bools, options: Options, trace: Trace) -> SiteResult:
    """The least u `[H]` from the given one on with which each head keeps its cap; else dense."""
    cap = np.where(dense, np.inf, MARGIN * options.error_cap)
    evaluator = Traced(look.evaluator, trace, look.site.name, "validate")
    u, measured, failed = back_off(evaluator, u, cap, FULL)
    dense = dense | failed
    return SiteResult(
        u, dense, np.where(dense, 0.0, measured.error), np.where(dense, 1.0, measured.density),
        np.zeros(len(u), dtype=np.int64), np.full(len(u), -np.inf),
    )  # fmt: skip
