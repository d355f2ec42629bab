"""Do the thresholds of another length hold at this one? Looked at, and backed off where not.

A new length bucket close to a tuned one starts from its thresholds. They are measured on some
query blocks of the new input: heads above the cap back off as in validation, or go dense. If all
heads together no longer keep the budget on the mean error, the bucket is tuned afresh.
"""

import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from afbs_compile.calibrate import site_policy, tuning
from afbs_compile.capture import Layer, Stream
from afbs_compile.evaluators import profiled
from afbs_compile.passes.rewrite import Site
from afbs_compile.policy import Policy, Tuning
from afbs_compile.policy import Site as SitePolicy
from afbs_compile.problem import Problem, cuda_devices, untraced
from afbs_compile.progress import OnProgress
from afbs_compile.timing import Speed, measure, signature
from afbs_compile.tuner.backoff import back_off
from afbs_compile.tuner.objective import FULL, u_of_tau
from afbs_compile.tuner.trace import Trace, Traced
from afbs_compile.tuner.tune import SiteResult

REACH = 2.0  # how many times longer or shorter the other length may be
ROWS = 16  # query blocks that are looked at
MARGIN = 0.9  # of the cap, as in tuning


def neighbour(stored: Policy | None, problem: Problem) -> Tuning | None:
    """The complete tuning with the same options at the closest length within reach, or None."""
    wanted = problem.options.tuning_fingerprint()
    far = {
        distance(tuning.length, problem.length): tuning
        for tuning in (stored.tunings if stored else ())
        if tuning.options == wanted and tuning.complete
    }
    near = [d for d in far if d <= np.log(REACH) + 1e-9]
    return far[min(near)] if near else None


def distance(one: int, other: int) -> float:
    """How far two lengths are apart: the log of their ratio, ≥ 0."""
    return float(abs(np.log(one / other)))


def carry(
    problem: Problem, source: Mapping[str, SitePolicy], on_progress: OnProgress
) -> Tuning | None:
    """A tuning for the problem from the sites of another length, or None if it does not hold.

    Args:
        problem: What is to be tuned; its first input is looked at.
        source: Policies of all its sites at the other length.
        on_progress: Told about every site.
    """
    start, trace = time.perf_counter(), Trace()
    found: dict[str, SitePolicy] = {}
    results: list[SiteResult] = []
    speeds: dict[tuple[object, ...], Speed] = {}
    with torch.random.fork_rng(cuda_devices(problem.inputs)), torch.no_grad(), untraced():
        stream = Stream(problem.gm, problem.inputs[0], problem.sites)
        for n, site in enumerate(problem.sites):
            on_progress(n, len(problem.sites), "validate", site.name)
            layer = stream.layer(site.name)
            result = checked(problem, layer, site, source[site.name], trace)
            if (kind := signature(layer)) not in speeds:
                speeds[kind] = measure(
                    layer, problem.options.selector, problem.options.compensation
                )
            results.append(result)
            found[site.name] = site_policy(site, result, speeds[kind])
        on_progress(len(problem.sites), len(problem.sites), "validate", "")
    mean = float(np.concatenate([result.error for result in results]).mean())
    if mean > problem.options.mean_error_budget:
        return None
    made = tuning(problem, found, trace, time.perf_counter() - start)
    return replace(made, inputs=(f"{problem.length} tokens, validated on {ROWS} query blocks",))


def checked(
    problem: Problem, layer: Layer, site: Site, source: SitePolicy, trace: Trace
) -> SiteResult:
    """A site's thresholds from another length, backed off where this one exceeds the cap."""
    options = problem.options
    evaluator = profiled(
        layer, selector=options.selector, heads=site.heads, compensation=options.compensation,
        most_rows=ROWS,
    )  # fmt: skip
    was_dense = np.array([head.mode == "dense" for head in source.heads])
    u = u_of_tau(np.array([min(head.tau, 1.0) for head in source.heads]))
    cap = np.where(was_dense, np.inf, MARGIN * options.error_cap)
    u, measured, failed = back_off(Traced(evaluator, trace, site.name, "validate"), u, cap, FULL)
    dense = was_dense | failed
    off = np.zeros(site.heads, dtype=np.int64)
    return SiteResult(
        u, dense, np.where(dense, 0.0, measured.error), np.where(dense, 1.0, measured.density),
        off, np.full(site.heads, -np.inf),
    )  # fmt: skip
