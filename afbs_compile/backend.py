"""The Dynamo backend `afbs`: find attention, tune it, rewrite it, hand the graph to Inductor.

`torch.compile(model, backend="afbs", options={...})`. Registered as an entry point, so no import
is needed. Options: `afbs_compile.options.Options`; others are Inductor's.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import SymInt
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule
from torch.nn.parallel import DistributedDataParallel

from afbs_compile import logs
from afbs_compile.options import Options, disabled, parse
from afbs_compile.passes.plan import Plan, plan
from afbs_compile.passes.rules import hint
from afbs_compile.report import JOURNAL, SiteReport
from afbs_compile.runner import Runner

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
    if fake(example_inputs) and not inside_ddp():
        return "no real inputs (export or ahead-of-time compilation)"
    if any(isinstance(x, SymInt) and hint(x) is None for x in example_inputs):
        return "a size is known only at run time"
    return None


def fake(example_inputs: Sequence[Any]) -> bool:
    """Are there no real inputs?"""
    return any(isinstance(x, FakeTensor) for x in example_inputs)


def inside_ddp() -> bool:
    """Is this a compilation of DDP's forward? DDPOptimizer gives fake inputs, calls bring real."""
    active = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
    return active is not None


def sparse(
    gm: GraphModule, example_inputs: Sequence[Any], options: Options, found: Plan
) -> Compiled:
    """Tune a graph that has sites, rewrite those that gain, compile.

    What DDPOptimizer cuts out comes with fake inputs: it is compiled as if all sites gained, and
    tuned in the first call. If no site gains, the graph is compiled as it came, not as it was
    planned.
    """
    runner = Runner(gm, options, found, example_inputs)
    inputs = [hint(x) if isinstance(x, SymInt) else x for x in example_inputs]
    queries = runner.shapes.query_length(runner.shapes.sizes(inputs))
    known = queries >= options.min_length and not fake(example_inputs)
    tuning = runner.tuning(inputs) if known else None
    sites = runner.sparse_sites(tuning) if known else runner.sites
    if not (sites or runner.names or runner.shapes.positions):
        return inductor(gm, example_inputs, options)
    runner.first = sites
    policy = [runner.tensor(sites, None).to(runner.device)] if sites else []
    compiled = inductor(runner.rewritten(sites), [*example_inputs, *policy], options)
    runner.variants[tuple(site.name for site in sites)] = compiled
    LOGGER.info("%d of %d sites rewritten", len(sites), len(found.sites))
    if known:
        runner.bind(inputs, tuning, ahead=True)
    return runner


def inductor(gm: GraphModule, example_inputs: Sequence[Any], options: Options) -> Compiled:
    """Inductor, with the user's options for it."""
    return cast(Compiled, compile_fx(gm, list(example_inputs), config_patches=options.inductor))
