"""Do the thresholds of another length hold at this one? Looked at, and backed off where not.

A new length bucket close to a tuned one starts from its thresholds. They are measured on some
query blocks of the new input: heads above the cap back off as in validation, or go dense, and all
back off together where the budget on the mean error is exceeded. If that takes more than a few
steps, the bucket is tuned afresh.
"""

import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from afbs_compile.calibrate import site_policy, tuning
from afbs_compile.looks import ROWS, aside, looks
from afbs_compile.policy import Policy, Tuning
from afbs_compile.policy import Site as SitePolicy
from afbs_compile.problem import Problem
from afbs_compile.progress import OnProgress
from afbs_compile.recheck import careful
from afbs_compile.tuner.trace import Trace

REACH = 2.0  # how many times longer or shorter the other length may be
STEPS = 2  # of all thresholds together; a tuning finds something better than more of them


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
    with aside(problem):
        seen = {look.site.name: look for look in looks(problem, source, on_progress)}
        results, well = careful(problem.options, seen, source, trace, STEPS)
    if not well:
        return None
    found = {n: site_policy(seen[n].site, result, seen[n].speed) for n, result in results.items()}
    made = tuning(problem, found, trace, time.perf_counter() - start)
    return replace(made, inputs=(f"{problem.length} tokens, validated on {ROWS} query blocks",))
