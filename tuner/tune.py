"""How are all sites of a model tuned? Explore each, allocate once, refine and validate each.

On the inputs that were measured at high fidelity every head that is not dense has an error
≤ max_error, and the mean over all heads (dense ones count 0) is ≤ mean_error.
"""

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from afbs_compile.tuner.arrays import Bools, Floats, Ints
from afbs_compile.tuner.curves import Curves
from afbs_compile.tuner.incumbent import Incumbent
from afbs_compile.tuner.limit import Limit, least_price
from afbs_compile.tuner.objective import (
    FULL,
    OFF,
    U_MAX,
    Evaluator,
    Fidelity,
    QueryBlocks,
    lambdas_of,
)
from afbs_compile.tuner.prior import Prior
from afbs_compile.tuner.strategies import strategy_of
from afbs_compile.tuner.strategy import Found, Goal, Priced, SitePlan, Strategy
from afbs_compile.tuner.trace import Trace, Traced

MIXES = (0.5, 1.0)  # shares of one tau for all that are tried under a limit

OnProgress = Callable[[int, int, str, str], None]
"""Called after each step with (done, total, phase, site)."""


@dataclass(frozen=True, slots=True, eq=False)
class SiteResult:
    """What was found for the H heads of a site.

    Attributes:
        u: thresholds [H]; U_MAX where dense.
        dense: heads without sparsity [H].
        error: worst error measured at u at high fidelity, validation included [H]; 0 where dense.
        density: largest density measured there [H]; 1 where dense.
        level: index into the evaluator's lambdas [H]; 0 where dense.
        lambda_: that lambda, log2 units [H]; −inf is off.
    """

    u: Floats
    dense: Bools
    error: Floats
    density: Floats
    level: Ints
    lambda_: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """What was found for all sites.

    Attributes:
        sites: by name.
        price: of a unit of error; None where a strategy has none.
        trace: every evaluation.
        damage: what the limit measured of the result; None without one, or if all is dense.
    """

    sites: dict[str, SiteResult]
    price: float | None
    trace: Trace
    damage: float | None = None

    @property
    def mean_error(self) -> float:
        """Over all heads of all sites."""
        return float(np.concatenate([site.error for site in self.sites.values()]).mean())

    @property
    def mean_density(self) -> float:
        """Over all heads of all sites."""
        return float(np.concatenate([site.density for site in self.sites.values()]).mean())


def tune(
    evaluators: Mapping[str, Evaluator],
    goal: Goal,
    strategy: str = "afbs-bo",
    *,
    low: Fidelity = QueryBlocks(1 / 8),  # noqa: B008
    high: Fidelity = FULL,
    prior: Prior | None = None,
    validation: Mapping[str, Evaluator] | None = None,
    on_progress: OnProgress | None = None,
    trace: Trace | None = None,
    found: MutableMapping[str, SiteResult] | None = None,
    limit: Limit[Mapping[str, SiteResult]] | None = None,
) -> Result:
    """Thresholds of all heads of all sites.

    Args:
        evaluators: of each site; each is looked up twice, in order, so that a mapping may make
            it when asked and hold one site's tensors at a time.
        goal: what must hold.
        strategy: a name of `strategies.STRATEGIES`.
        low: fidelity of the exploration.
        high: fidelity of everything else.
        prior: what other layers' profiles look like; AFBS-BO then searches lambda, too.
        validation: evaluators of every site on unseen inputs.
        on_progress: called after each step.
        trace: where evaluations are written, if somebody wants to watch.
        found: takes each site's result at once: what it holds outlives an interrupt.
        limit: what all sites together must keep, instead of a budget on the mean error; needs
            strategy `afbs-bo`. Of the candidates that keep it that of least density is returned;
            if there is none, everything is dense.

    Raises:
        ValueError: an unknown strategy, no site, or one without validation; an evaluator that
            measures nonsense (a note names the site); a limit with a strategy that has no price.
    """
    if limit is not None and strategy != "afbs-bo":
        raise ValueError(f"an end-to-end limit needs strategy 'afbs-bo', got {strategy!r}")
    run = _Run(
        goal,
        strategy_of(strategy, goal, low, high, prior),
        high,
        _validation(evaluators, validation),
        Trace() if trace is None else trace,
        _Progress(2 * len(evaluators), on_progress),
    )
    return run.all_sites(evaluators, {} if found is None else found, limit)


def _validation(
    evaluators: Mapping[str, Evaluator], validation: Mapping[str, Evaluator] | None
) -> Mapping[str, Evaluator]:
    if not evaluators:
        raise ValueError("no site to tune: evaluators is empty")
    if validation is None:
        return {}
    if missing := set(evaluators) - set(validation):
        raise ValueError(f"validation lacks the sites {', '.join(sorted(missing))}")
    return validation


def _site_result(found: Found, dense: Bools, lambdas: tuple[float, ...]) -> SiteResult:
    """What was found, with the heads that are to be dense made so."""
    level = np.where(dense, 0, found.level)
    return SiteResult(
        np.where(dense, U_MAX, found.u),
        dense,
        np.where(dense, 0.0, found.error),
        np.where(dense, 1.0, found.density),
        level,
        np.asarray(lambdas)[level],
    )


def _dense(heads: int) -> SiteResult:
    none = Incumbent.none(np.zeros(heads)).found
    return _site_result(none, np.ones(heads, dtype=bool), OFF)


def _all_dense(evaluators: Mapping[str, Evaluator]) -> dict[str, SiteResult]:
    return {site: _dense(evaluators[site].heads) for site in evaluators}


def _keep(found: MutableMapping[str, SiteResult], sites: Mapping[str, SiteResult]) -> None:
    for site, result in sites.items():
        found[site] = result  # a caller's dict may watch its items; update() would pass it by


@dataclass(slots=True)
class _Progress:
    total: int
    on_progress: OnProgress | None
    done: int = 0

    def step(self, phase: str, site: str) -> None:
        self.done += 1
        self.tell(self.done, self.total, phase, site)

    def tell(self, done: int, total: int, phase: str, site: str) -> None:
        if self.on_progress is not None:
            self.on_progress(done, total, phase, site)


@dataclass(frozen=True, slots=True)
class _Run:
    """One search: what its phases share."""

    goal: Goal
    strategy: Strategy
    high: Fidelity
    validation: Mapping[str, Evaluator]
    trace: Trace
    progress: _Progress

    def all_sites(
        self,
        evaluators: Mapping[str, Evaluator],
        found: MutableMapping[str, SiteResult],
        limit: Limit[Mapping[str, SiteResult]] | None,
    ) -> Result:
        if self.goal.budget == 0.0:
            _keep(found, _all_dense(evaluators))
            return Result(_all_dense(evaluators), None, self.trace)
        curves: dict[str, Curves] = {}
        for site in evaluators:
            curves[site] = self.explore(site, evaluators[site], list(curves.values()))
        if limit is not None:
            return self.within(evaluators, curves, limit, found)
        plan = self.strategy.allocate(curves)
        for site in evaluators:
            made = self.finish(site, evaluators[site], plan.sites[site])
            self.progress.step("refine", site)
            found[site] = made
        return Result({site: found[site] for site in evaluators}, plan.price, self.trace)

    def within(
        self,
        evaluators: Mapping[str, Evaluator],
        curves: Mapping[str, Curves],
        limit: Limit[Mapping[str, SiteResult]],
        found: MutableMapping[str, SiteResult],
    ) -> Result:
        """Of the mixes of `tuner.blend` the one that keeps the limit at the least density."""
        strategy = cast(Priced, self.strategy)
        best = Result(_all_dense(evaluators), None, self.trace)
        for done, alike in enumerate(MIXES):
            self.progress.tell(done, len(MIXES), "limit", f"{alike:.0%} one tau for all")

            def candidate(price: float, alike: float = alike) -> Result:
                plan = strategy.allocate(curves, price, alike)
                sites = {
                    site: self.finish(site, evaluators[site], plan.sites[site])
                    for site in evaluators
                }
                return Result(sites, plan.price, self.trace)

            def damage(made: Result) -> float:
                nonlocal best
                measured = limit.damage(made.sites)
                if measured <= limit.most and made.mean_density < best.mean_density:
                    best = replace(made, damage=measured)
                    _keep(found, made.sites)  # an interrupt keeps it
                return measured

            least_price(candidate, Limit(limit.most, damage))
        self.progress.tell(len(MIXES), len(MIXES), "limit", "")
        _keep(found, best.sites)
        return best

    def explore(self, site: str, evaluator: Evaluator, earlier: list[Curves]) -> Curves:
        curves = self.strategy.explore(Traced(evaluator, self.trace, site, "explore"), earlier)
        self.progress.step("explore", site)
        return curves

    def finish(self, site: str, evaluator: Evaluator, plan: SitePlan) -> SiteResult:
        found = self.strategy.refine(Traced(evaluator, self.trace, site, "refine"), plan)
        dense = ~found.feasible
        if site in self.validation:
            found, dense = self.validate(site, evaluator, found)
        return _site_result(found, dense, lambdas_of(evaluator))

    def validate(self, site: str, evaluator: Evaluator, before: Found) -> tuple[Found, Bools]:
        """Back off on unseen inputs, and measure again where thresholds moved."""
        unseen = Traced(self.validation[site], self.trace, site, "validate")
        cap = np.where(before.feasible, self.goal.max_error, np.inf)
        u, measured, failed = self.strategy.validate(unseen, before.u, before.level, cap)
        error, density, dense = before.error, before.density, ~before.feasible | failed
        if np.any(u != before.u):
            traced = Traced(evaluator, self.trace, site, "remeasure")
            again = traced(u, self.high, before.level)
            error, density = again.error, again.density
            dense = dense | (error > self.goal.max_error)
        error, density = np.maximum(error, measured.error), np.maximum(density, measured.density)
        return before._replace(u=u, error=error, density=density), dense
