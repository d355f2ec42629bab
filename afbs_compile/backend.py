"""The Dynamo backend `afbs`: find attention, tune it, rewrite it, hand the graph to Inductor.

`torch.compile(model, backend="afbs", options={...})`. Registered as an entry point, so no import
is needed. Options: `afbs_compile.options.Options`; others are Inductor's.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import SymInt
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule

from afbs_compile import logs
from afbs_compile.calibrate import describe
from afbs_compile.kernels.dispatch import kernel_of
from afbs_compile.options import Options, disabled, parse
from afbs_compile.passes.plan import Plan, plan
from afbs_compile.passes.rewrite import Site, rewrite
from afbs_compile.passes.rules import hint
from afbs_compile.passes.sites import value
from afbs_compile.policy import Tuning
from afbs_compile.report import JOURNAL, SiteReport
from afbs_compile.runner import Runner
from afbs_compile.source import Unusable

LOGGER = logging.getLogger(__name__)
Compiled = Callable[..., Any]


def afbs(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compile one Dynamo graph with its attention made sparse.

    Args:
        gm: Dynamo's graph.
        example_inputs: Its real inputs (`SymInt` for symbolic sizes).
        mode: Inductor's preset.
        options: Ours (`afbs_compile.options.Options`) and Inductor's.

    Returns:
        A callable with the graph's signature.

    Raises:
        ValueError: For options that do not exist or are out of range.
    """
    logs.configure()
    wishes = parse(options, mode)
    found = plan(gm, example_inputs, wishes.min_length, wishes.compensation)
    reason = standing_reason(example_inputs, wishes)
    if reason:
        found = Plan(gm, [], found.refused | {s.name: reason for s in found.sites}, [])
    JOURNAL.add_sites([SiteReport(n, "refused", r) for n, r in found.refused.items()])
    if not found.sites:
        return inductor(gm, example_inputs, wishes)
    return sparse(gm, example_inputs, wishes, found)


def standing_reason(example_inputs: Sequence[Any], options: Options) -> str | None:
    """A reason that keeps all sites of a graph dense."""
    if disabled():
        return "AFBS_DISABLE is set"
    if options.error_cap == 0:
        return "max_error is 0"
    if any(isinstance(x, FakeTensor) for x in example_inputs):
        return "no real inputs (export or ahead-of-time compilation)"
    if any(isinstance(x, SymInt) and hint(x) is None for x in example_inputs):
        return "a size is known only at run time"
    return None


def sparse(
    gm: GraphModule, example_inputs: Sequence[Any], options: Options, found: Plan
) -> Compiled:
    """Tune a graph that has sites, rewrite those that gain, compile.

    If none gains, the graph is compiled as it came, not as it was planned.
    """
    runner = Runner(found.gm, options, found, example_inputs)
    inputs = [hint(x) if isinstance(x, SymInt) else x for x in example_inputs]
    length = runner.shapes.length(runner.shapes.sizes(inputs))
    if length >= options.min_length:
        try:
            tuning = runner.tuning(inputs, length)
            JOURNAL.add_sites([site_report(site, tuning) for site in found.sites])
            runner.settle(tuning, inputs)
        except Unusable as reason:
            JOURNAL.add_sites([SiteReport(s.name, "dense", str(reason)) for s in found.sites])
            runner.settle(None, inputs)
    if not runner.sites:
        return inductor(gm, example_inputs, options)
    policy = runner.tensor(None)
    rewritten = rewrite(
        found.gm, runner.sites, policy, selector=options.selector, min_length=options.min_length,
        compensation=options.compensation,
    )  # fmt: skip
    LOGGER.info("%d of %d sites rewritten", len(runner.sites), len(found.sites))
    runner.compiled = inductor(rewritten, [*example_inputs, policy], options)
    return runner


def inductor(gm: GraphModule, example_inputs: Sequence[Any], options: Options) -> Compiled:
    """Inductor, with the user's options for it."""
    return cast(Compiled, compile_fx(gm, list(example_inputs), config_patches=options.inductor))


def site_report(site: Site, tuning: Tuning) -> SiteReport:
    """What became of a tuned site."""
    policy = tuning.sites.get(site.name)
    query = value(site.call.query)
    known = SiteReport(
        site.name, "dense", "not in the policy", describe(site),
        site.heads, site.kv_heads, site.head_dim, tuning.length,
        kernel=kernel_of(query.device, query.dtype, site.head_dim, bool(site.data)),
    )  # fmt: skip
    if policy is None:
        return known
    densities = [h.density for h in policy.heads if h.density is not None]
    errors = [h.error for h in policy.heads if h.error is not None]
    speeds = (policy.seconds_dense, policy.seconds_sparse)
    return replace(
        known,
        decision=policy.decision,
        reason=policy.reason,
        density=sum(densities) / len(densities) if densities else None,
        error=max(errors, default=None),
        speedup=speeds[0] / speeds[1] if speeds[0] and speeds[1] else None,
    )
