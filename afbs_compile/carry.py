"""Do the thresholds of another length hold at this one? Looked at, and backed off where not.

A new length bucket close to a tuned one starts from its thresholds. They are measured on some
query blocks of the new input: heads above the cap back off as in validation, or go dense. If all
heads together no longer keep the budget on the mean error, the bucket is tuned afresh.
"""

import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from afbs_compile.calibrate import site_policy, tuning
from afbs_compile.looks import ROWS, aside, looks, settled, thresholds
from afbs_compile.policy import Policy, Tuning
from afbs_compile.policy import Site as SitePolicy
from afbs_compile.problem import Problem
from afbs_compile.progress import OnProgress
from afbs_compile.tuner.trace import Trace

REACH = 2.0  # how many times longer or shorter the other length may be


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
    errors = []
    with aside(problem):
        for look in looks(problem, source, on_progress):
            u, dense = thresholds(source[look.site.name])
            result = settled(look, u, dense, problem.options, trace)
            errors.append(result.error)
            found[look.site.name] = site_policy(look.site, result, look.speed)
    if float(np.concatenate(errors).mean()) > problem.options.mean_error_budget:
        return None
    made = tuning(problem, found, trace, time.perf_counter() - start)
    return replace(made, inputs=(f"{problem.length} tokens, validated on {ROWS} query blocks",))
