"""From real inputs to a tuning: capture, measure, search, decide.

Runs inside the backend's first call. With the `profile` evaluator one forward pass profiles every
layer and the search costs look-ups; with `direct` each phase of the search is a pass of its own.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule

from afbs_compile.capture import Stream, mask_at
from afbs_compile.evaluators import DirectEvaluator, profiled
from afbs_compile.options import Options
from afbs_compile.passes.rewrite import Site
from afbs_compile.policy import Head, Tuning, bucket_of
from afbs_compile.policy import Site as SitePolicy
from afbs_compile.progress import OnProgress
from afbs_compile.timing import Speed, measure, signature
from afbs_compile.tuner.objective import (
    Evaluator,
    Fidelity,
    QueryBlocks,
    SequenceLength,
    tau_of_u,
)
from afbs_compile.tuner.strategy import Goal
from afbs_compile.tuner.trace import Trace
from afbs_compile.tuner.tune import SiteResult, tune
from afbs_compile.versions import device_name, versions

LOW: dict[str, Fidelity] = {
    "query-blocks": QueryBlocks(1 / 8),
    "sequence-length": SequenceLength(1 / 4),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """What is to be tuned.

    Attributes:
        gm: Dynamo's graph, not rewritten.
        inputs: One or more sets of real inputs; with two or more the last is held out.
        sites: The sites to tune.
        options: The user's wishes.
        length: Tokens; names the bucket.
    """

    gm: GraphModule
    inputs: Sequence[Sequence[Any]]
    sites: Sequence[Site]
    options: Options
    length: int


def calibrate(problem: Problem, on_progress: OnProgress, found: dict[str, SitePolicy]) -> Tuning:
    """Tune every site of a problem.

    Args:
        problem: What is to be tuned.
        on_progress: Told about every step.
        found: Takes each site's policy as soon as it is known; valid after an interrupt.
    """
    start, trace, options = time.perf_counter(), Trace(), problem.options
    devices = cuda_devices(problem.inputs)
    with torch.random.fork_rng(devices), torch.no_grad(), outside_tracing():
        streams = [Stream(problem.gm, inputs, problem.sites) for inputs in problem.inputs]
        evaluators, speeds = measured(problem, streams, on_progress)
        sink = Sink(problem, speeds, found)
        tune(
            evaluators[0],
            Goal(options.max_error, options.mean_error_budget),
            options.strategy,
            low=LOW[options.fidelity],
            validation=evaluators[1] if len(evaluators) > 1 else None,
            on_progress=on_progress,
            trace=trace,
            found=sink,
        )
    return tuning(problem, found, trace, time.perf_counter() - start)


def measured(
    problem: Problem, streams: list[Stream], on_progress: OnProgress
) -> tuple[list[Mapping[str, Evaluator]], dict[str, Speed]]:
    """Evaluators of the calibration inputs and, if there are any, of the held-out ones.

    Walks the layers once: profiles them and times one layer of every shape.
    """
    options, sites = problem.options, problem.sites
    tables: list[dict[str, Evaluator]] = [{} for _ in streams]
    speeds: dict[tuple[object, ...], Speed] = {}
    by_site: dict[str, Speed] = {}
    for n, site in enumerate(sites):
        on_progress(n, len(sites), "profile", site.name)
        for stream, table in zip(streams, tables, strict=True):
            layer = stream.layer(site.name)
            if options.evaluator == "profile":
                table[site.name] = profiled(
                    layer, selector=options.selector, heads=site.heads, low=LOW[options.fidelity],
                    compensation=options.compensation,
                )  # fmt: skip
            else:
                table[site.name] = DirectEvaluator(
                    stream, site.name, site.heads, options.selector, options.compensation
                )
        if (kind := signature(layer)) not in speeds:
            speeds[kind] = measure(layer, options.selector, options.compensation)
        by_site[site.name] = speeds[kind]
    on_progress(len(sites), len(sites), "profile", "")
    unseen = [tables.pop()] if len(tables) > 1 else []
    together = {site.name: Worst([t[site.name] for t in tables]) for site in sites}
    return [together, *unseen], by_site


@dataclass(frozen=True, slots=True)
class Worst:
    """Several inputs as one evaluator: the worst error, the mean density."""

    evaluators: Sequence[Evaluator]

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.evaluators[0].heads

    def __call__(self, u: Any, fidelity: Fidelity) -> Any:
        """Measure on every input."""
        found = [evaluate(u, fidelity) for evaluate in self.evaluators]
        error = np.max([m.error for m in found], axis=0)
        return type(found[0])(error, np.mean([m.density for m in found], axis=0))


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


def head_policy(result: SiteResult, n: int) -> Head:
    """The policy of one head."""
    if result.dense[n]:
        return Head("dense", 1.0, error=0.0, density=1.0)
    tau = float(tau_of_u(float(result.u[n])))
    error, density = float(result.error[n]), float(result.density[n])
    return Head("sparse", tau, error=error, density=density)


def describe(site: Site) -> str:
    """The site's mask in words; a policy fits only a site with the same ones."""
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
    tensors = [x for x in problem.inputs[0] if isinstance(x, torch.Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    return Tuning(
        bucket=bucket_of(problem.length),
        length=problem.length,
        options=problem.options.tuning_fingerprint(),
        complete=all(site.name in found for site in problem.sites),
        evaluations=trace.evaluations,
        cost_dense_passes=trace.cost,
        seconds=seconds,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        device=device_name(device),
        versions=versions(),
        inputs=tuple(describe_inputs(problem)),
        sites=dict(found),
    )


def describe_inputs(problem: Problem) -> Iterator[str]:
    """A line for every set of inputs."""
    for n, _ in enumerate(problem.inputs):
        held_out = len(problem.inputs) > 1 and n == len(problem.inputs) - 1
        yield f"{problem.length} tokens, {'held out' if held_out else 'calibration'}"


def cuda_devices(inputs: Sequence[Sequence[Any]]) -> list[int]:
    """Indices of the CUDA devices that inputs live on."""
    tensors = [x for group in inputs for x in group if isinstance(x, torch.Tensor)]
    return sorted({t.device.index for t in tensors if t.device.type == "cuda"})


def outside_tracing() -> Any:
    """Hide Dynamo's tracing context: kernels that compile on first use must not inherit it."""
    return torch._guards.tracing(None)
