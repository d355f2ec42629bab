"""Do a tuning's thresholds hold on one more call? Measured, and backed off where not.

With `calibration_calls` above 1 a running program goes on measuring while it serves: every further
call is looked at as a held-out input. Thresholds only ever become more careful, so after n calls
each head is as careful as any of them asked for. If inputs are exchangeable, the next one asks for
more with probability 1 / (n + 1) at most (conformal prediction, Vovk et al. 2005).
"""

import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from afbs_compile.calibrate import Bound, site_policy
from afbs_compile.looks import ROWS, Look, aside, looks, settled, thresholds
from afbs_compile.options import Options
from afbs_compile.policy import Head, Tuning
from afbs_compile.policy import Site as SitePolicy
from afbs_compile.problem import Problem
from afbs_compile.progress import OnProgress
from afbs_compile.tuner.backoff import STEP
from afbs_compile.tuner.objective import U_MAX
from afbs_compile.tuner.trace import Trace
from afbs_compile.tuner.tune import SiteResult

ROUNDS = 8  # of raising all thresholds together: the mass left out shrinks to a sixth

Results = dict[str, SiteResult]


def recheck(problem: Problem, known: Tuning, on_progress: OnProgress) -> Tuning:
    """The tuning after one more call.

    Args:
        problem: The call; its first input is looked at.
        known: What served it; sites that it leaves dense stay dense.
        on_progress: Told about every site.
    """
    start, trace = time.perf_counter(), Trace()
    sparse = {n: site for n, site in known.sites.items() if site.decision == "sparse"}
    with aside(problem):
        seen = {look.site.name: look for look in looks(problem, sparse, on_progress)}
        results = search(problem, seen, sparse, trace)
    sites = {
        name: remembering(
            site_policy(seen[name].site, found, seen[name].speed), sparse[name], known
        )
        for name, found in results.items()
    }
    return replace(
        known,
        sites={**known.sites, **sites},
        evaluations=known.evaluations + trace.evaluations,
        cost_dense_passes=known.cost_dense_passes + trace.cost,
        seconds=known.seconds + time.perf_counter() - start,
        inputs=(*known.inputs, f"{problem.length} tokens, checked on {ROWS} query blocks"),
    )


def search(
    problem: Problem, seen: Mapping[str, Look], sparse: Mapping[str, SitePolicy], trace: Trace
) -> Results:
    """Thresholds that keep what is promised on this input, none less careful than before."""
    speeds = {name: look.speed for name, look in seen.items()}
    bound = Bound.of(problem, speeds) if problem.options.limited and seen else None
    results, well = careful(problem.options, seen, sparse, trace, ROUNDS, bound)
    return results if well else cut(results, problem.options, bound)


def careful(
    options: Options,
    seen: Mapping[str, Look],
    sparse: Mapping[str, SitePolicy],
    trace: Trace,
    rounds: int,
    bound: Bound | None = None,
) -> tuple[Results, bool]:
    """Thresholds raised together, at most so many steps, and whether the promise is kept then."""
    results = {
        name: settled(look, *thresholds(sparse[name]), options, trace)
        for name, look in seen.items()
    }
    for _ in range(rounds):
        if kept(results, options, bound):
            return results, True
        results = {n: raised(seen[n], found, options, trace) for n, found in results.items()}
    return results, kept(results, options, bound)


def kept(results: Mapping[str, SiteResult], options: Options, bound: Bound | None) -> bool:
    """Do all heads together keep what is promised of them on this input?"""
    if not results:
        return True
    if bound is not None:
        return bound.share(results) <= 1.0
    return mean_error(results) <= options.mean_error_budget


def mean_error(results: Mapping[str, SiteResult]) -> float:
    """Of all heads; a dense one has none."""
    return float(np.concatenate([found.error for found in results.values()]).mean())


def raised(look: Look, found: SiteResult, options: Options, trace: Trace) -> SiteResult:
    """The site with every threshold a step more careful."""
    return settled(look, np.minimum(found.u + STEP, U_MAX), found.dense, options, trace)


def cut(results: Results, options: Options, bound: Bound | None) -> Results:
    """The heads with the largest errors made dense until the rest keeps the promise."""
    worst = sorted(
        (-error, name, head)
        for name, found in results.items()
        for head, error in enumerate(found.error)
        if not found.dense[head]
    )
    # an end-to-end measurement is a whole run of the model: few of them
    total = len(worst)
    counts = range(1, total) if bound is None else [total // 2, total - total // 4]
    for count in counts:
        fewer = without(results, [(name, head) for _, name, head in worst[:count]])
        if kept(fewer, options, bound):
            return fewer
    return without(results, [(name, head) for _, name, head in worst])


def without(results: Results, heads: list[tuple[str, int]]) -> Results:
    """The results with some heads dense."""
    gone = {name: [h for n, h in heads if n == name] for name in results}
    return {name: dense_at(found, gone[name]) for name, found in results.items()}


def dense_at(found: SiteResult, heads: list[int]) -> SiteResult:
    """A result with some heads dense."""
    dense, error, density = found.dense.copy(), found.error.copy(), found.density.copy()
    dense[heads], error[heads], density[heads] = True, 0.0, 1.0
    return replace(found, dense=dense, error=error, density=density)


def remembering(new: SitePolicy, old: SitePolicy, known: Tuning) -> SitePolicy:
    """The new policy with the largest error of all calls, and their mean density."""
    heads = (
        worse(now, before, len(known.inputs))
        for now, before in zip(new.heads, old.heads, strict=True)
    )
    return replace(new, heads=tuple(heads))


def worse(now: Head, before: Head, calls: int) -> Head:
    """A head after one more call. Lambda is off from now on: it was not measured."""
    if now.error is None or now.density is None or before.error is None or before.density is None:
        return now
    error = max(now.error, before.error)
    if now.mode == "dense" or now.tau > before.tau + 1e-9:
        return now if now.mode == "dense" else replace(now, error=error)
    density = (calls * before.density + now.density) / (calls + 1)
    return replace(now, tau=before.tau, error=error, density=density)
