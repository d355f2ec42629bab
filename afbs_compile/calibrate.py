"""From real inputs to a tuning: capture, measure, search, decide.

Runs inside the backend's first call. With the `profile` evaluator one forward pass profiles every
layer and the search costs look-ups; with `direct` each phase of the search is a pass of its own.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Self

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from afbs_compile.capture import mask_at
from afbs_compile.damage import Damage, Judge, Limits
from afbs_compile.measurements import LOW, Worst, measurements
from afbs_compile.passes.rewrite import Site
from afbs_compile.policy import Head, Tuning, bucket_of
from afbs_compile.policy import Site as SitePolicy
from afbs_compile.problem import Problem, cuda_devices, untraced
from afbs_compile.profiling import BUDGET, INTERRUPTED, UNFINISHED
from afbs_compile.progress import OnProgress
from afbs_compile.remembered import OutOfTime
from afbs_compile.store import Store
from afbs_compile.timing import Speed, measure
from afbs_compile.tuner.limit import Limit
from afbs_compile.tuner.objective import tau_of_u
from afbs_compile.tuner.strategy import Goal, margin_of
from afbs_compile.tuner.trace import Trace
from afbs_compile.tuner.tune import SiteResult, tune
from afbs_compile.versions import device_name, versions


def calibrate(
    problem: Problem, store: Store, on_progress: OnProgress, found: dict[str, SitePolicy]
) -> Tuning:
    """Tune every site of a problem, or as many as the budget allows.

    Args:
        problem: What is to be tuned.
        store: Where measurements are kept until all are there.
        on_progress: Told about every step.
        found: Takes each site's policy as soon as it is known. After an interrupt it is valid too:
            sites that were not tuned are dense and give one of `profiling.UNFINISHED` as reason.
    """
    start, trace = time.perf_counter(), Trace()
    stopped: str | None = INTERRUPTED  # unless we get to the end
    damage: Damage | None = None
    try:
        with torch.random.fork_rng(cuda_devices(problem.inputs)), torch.no_grad(), untraced():
            stopped, damage = search(problem, store, on_progress, trace, found)
    finally:
        if stopped:
            for site in problem.sites:
                found.setdefault(site.name, pending(site, stopped))
    if stopped == INTERRUPTED:
        raise KeyboardInterrupt
    made = tuning(problem, found, trace, problem.spent_s + time.perf_counter() - start)
    if damage is None:
        return made
    return replace(made, kl=damage.kl, perplexity_increase=damage.perplexity_increase)


def search(
    problem: Problem,
    store: Store,
    on_progress: OnProgress,
    trace: Trace,
    found: dict[str, SitePolicy],
) -> tuple[str | None, Damage | None]:
    """Measure and search; why it ended early, or None, and what was measured end to end."""
    options = problem.options
    measured = measurements(problem, store, on_progress, measure)
    tables = measured.tables
    if not tables[0]:
        return measured.stopped, None
    unseen = tables.pop() if len(tables) > 1 else None
    bound = Bound.of(problem, measured.speeds) if options.limited else None
    try:
        with threadpool_limits(1, user_api="blas"):  # a head's matrices are tiny: threads wait
            result = tune(
                {name: Worst([table[name] for table in tables]) for name in tables[0]},
                Goal(options.error_cap, options.mean_error_budget, margin_of(len(tables))),
                options.strategy,
                low=LOW[options.fidelity],
                validation=unseen,
                on_progress=on_progress,
                trace=trace,
                found=Sink(problem, measured.speeds, found),
                limit=Limit(1.0, bound.share) if bound else None,
            )
    except OutOfTime:
        return BUDGET, None
    return measured.stopped, bound.at(result.damage) if bound else None


@dataclass(frozen=True, slots=True)
class Bound:
    """The user's limits on what all sites do together, as the search asks for them."""

    judge: Judge
    limits: Limits
    sites: dict[str, Site]
    speeds: Mapping[str, Speed]
    seen: dict[float, Damage] = field(default_factory=dict)

    @classmethod
    def of(cls, problem: Problem, speeds: Mapping[str, Speed]) -> Self:
        """Measured on the inputs that are held out, or on all if none is.

        Raises:
            Unmeasurable: The graph's inputs and outputs do not show what is limited.
        """
        options = problem.options
        limits = Limits(options.max_kl, options.max_ppl_increase)
        judge = Judge(
            problem.gm, problem.inputs[-1:], problem.sites, selector=options.selector,
            compensation=options.compensation, perplexity=limits.perplexity_increase is not None,
        )  # fmt: skip
        return cls(judge, limits, {site.name: site for site in problem.sites}, speeds)

    def share(self, found: Mapping[str, SiteResult]) -> float:
        """How much of the limits the policy of these results uses up."""
        policies = {
            name: site_policy(self.sites[name], result, self.speeds[name])
            for name, result in found.items()
        }
        damage = self.judge(policies)
        share = self.limits.share(damage)
        self.seen[share] = damage
        return share

    def at(self, share: float | None) -> Damage | None:
        """What was measured when `share` was; None if everything is dense."""
        return None if share is None else self.seen[share]


class Sink(dict[str, SiteResult]):
    """Turns each site's result into its policy the moment that it is found."""

    def __init__(
        self, problem: Problem, speeds: Mapping[str, Speed], found: dict[str, SitePolicy]
    ) -> None:
        """Write into `found`."""
        super().__init__()
        self.sites = {site.name: site for site in problem.sites}
        self.speeds, self.found = speeds, found

    def __setitem__(self, name: str, result: SiteResult) -> None:
        """Note a result."""
        super().__setitem__(name, result)
        self.found[name] = site_policy(self.sites[name], result, self.speeds[name])


def site_policy(site: Site, result: SiteResult, speed: Speed) -> SitePolicy:
    """The policy of a site: sparse if that was measured to be faster, else dense."""
    heads = tuple(head_policy(result, n) for n in range(site.heads))
    density = float(np.mean(result.density))
    sparse = speed.sparse(density)
    reason = None
    if result.dense.all():
        reason = "no head is sparse within its error bound"
    elif sparse >= speed.dense:
        reason = f"not faster: {sparse:.2e} s sparse, {speed.dense:.2e} s dense"
    return SitePolicy(
        name=site.name,
        heads=heads,
        kv_heads=site.kv_heads,
        head_dim=site.head_dim,
        mask=describe(site),
        decision="dense" if reason else "sparse",
        reason=reason,
        seconds_dense=speed.dense,
        seconds_sparse=sparse,
    )


def pending(site: Site, reason: str) -> SitePolicy:
    """A site that was not tuned yet: dense."""
    heads = (Head("dense", 1.0),) * site.heads
    return SitePolicy(
        site.name, heads, site.kv_heads, site.head_dim, describe(site), "dense", reason
    )


def finished(policy: SitePolicy) -> bool:
    """Was the site tuned, rather than left for later?"""
    return policy.reason not in UNFINISHED


def head_policy(result: SiteResult, n: int) -> Head:
    """The policy of one head."""
    if result.dense[n]:
        return Head("dense", 1.0, error=0.0, density=1.0)
    tau = float(tau_of_u(float(result.u[n])))
    error, density = float(result.error[n]), float(result.density[n])
    level = float(result.lambda_[n])
    lambda_ = level if math.isfinite(level) else None
    return Head("sparse", tau, lambda_=lambda_, error=error, density=density)


def describe(site: Site) -> str:
    """The site's mask in words; a policy fits only a site with the same ones (`source.fits`)."""
    own = describe_own(site)
    return f"{own} + {site.data.kind}" if site.data else own


def describe_own(site: Site) -> str:
    """The part of the mask that is the same on every call, in words."""
    mask = mask_at(site, 0, 0)
    if not mask.causal:
        return "full"
    words = ["causal"]
    if site.from_end:
        words.append("from the end")
    if mask.offset:
        words.append(f"offset {mask.offset}")
    if mask.window:
        words.append(f"window {mask.window}")
    return ", ".join(words)


def tuning(
    problem: Problem, found: Mapping[str, SitePolicy], trace: Trace, seconds: float
) -> Tuning:
    """What was found, as a document."""
    return Tuning(
        bucket=bucket_of(problem.length),
        length=problem.length,
        options=problem.options.tuning_fingerprint(),
        complete=all(s.name in found and finished(found[s.name]) for s in problem.sites),
        evaluations=trace.evaluations,
        cost_dense_passes=trace.cost,
        seconds=seconds,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        device=device_name(problem.device),
        versions=versions(),
        inputs=tuple(describe_inputs(problem)),
        sites={name: replace(s, weights=problem.weights.get(name)) for name, s in found.items()},
    )


def describe_inputs(problem: Problem) -> Iterator[str]:
    """A line for every set of inputs."""
    for n, _ in enumerate(problem.inputs):
        held_out = len(problem.inputs) > 1 and n == len(problem.inputs) - 1
        yield f"{problem.length} tokens, {'held out' if held_out else 'calibration'}"
