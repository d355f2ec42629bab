"""Which attention sites can have windowed heads? One graph of the model, and its calls."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from afbs_compile.ahead import Recorded, Recorder, call
from afbs_compile.hybrid_objective import Call
from afbs_compile.hybrid_samples import Sample
from afbs_compile.logs import warn
from afbs_compile.options import parse
from afbs_compile.passes.rewrite import Site
from afbs_compile.report import JOURNAL, SiteReport

MANY = 1 << 20


class Unsuitable(ValueError):
    """A model or inputs whose heads cannot be windowed; the message says why."""


def record(model: nn.Module, samples: Sequence[Sample], window: int) -> tuple[list[Call], str]:
    """The calls that samples make, and the model's key.

    Raises:
        Unsuitable: No site can be windowed, or the model compiles to several graphs.
    """
    recorder = Recorder(parse({"min_length": 1}))
    compiled = torch.compile(model, backend=recorder, dynamic=False)
    calls = []
    # every recorder is a backend of its own, and this process may have seen many
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=MANY):
        for sample in samples:
            before = [len(graph.calls) for graph in recorder.graphs]
            call(compiled, sample.inputs)
            made = called(recorder.graphs, before)
            sites = [site for site in made.found.sites if suits(site, window)]
            calls.append(Call(made.gm, made.calls[-1], sites, sample))
    names = {tuple((site.name, site.kv_heads) for site in one.sites) for one in calls}
    if len(names) > 1:
        raise Unsuitable("the samples lead to graphs with different attention calls")
    left_out(recorder.graphs, calls)
    if not calls[0].sites:
        raise Unsuitable(f"no attention call can be windowed: {reasons(recorder.graphs)}")
    return calls, recorder.graphs[-1].layer.key


def called(graphs: Sequence[Recorded], before: Sequence[int]) -> Recorded:
    """The graph that ran once more than before.

    Raises:
        Unsuitable: None with sites did, or several.
    """
    counts = [*before, *[0] * (len(graphs) - len(before))]
    ran = [graph for graph, n in zip(graphs, counts, strict=True) if len(graph.calls) > n]
    if len(ran) != 1 or len(ran[0].calls) != 1 + counts[graphs.index(ran[0])]:
        raise Unsuitable(
            "the model has no attention call that can be rewritten"
            if not ran
            else f"the model compiles to {len(ran)} graphs with attention; windowed heads need "
            "one: remove the graph break (torch._dynamo.explain names it)"
        )
    return ran[0]


def suits(site: Site, window: int) -> bool:
    """Can heads of a site be windowed? A causal one that sees more than the window."""
    return site.mask.causal and not 0 < site.mask.window <= window


def left_out(graphs: Sequence[Recorded], calls: Sequence[Call]) -> None:
    """Say which sites stay as they are."""
    kept = {site.name for one in calls for site in one.sites}
    others = [name for graph in graphs for name in (*graph.found.refused, *names_of(graph))
              if name not in kept]  # fmt: skip
    JOURNAL.add_sites([SiteReport(n, "refused", r) for g in graphs
                       for n, r in g.found.refused.items()])  # fmt: skip
    if others and kept:
        warn(f"{len(set(others))} attention calls cannot be windowed and count as global: "
             f"{', '.join(sorted(set(others))[:3])}")  # fmt: skip


def names_of(graph: Recorded) -> list[str]:
    """The names of a graph's sites."""
    return [site.name for site in graph.found.sites]


def reasons(graphs: Sequence[Recorded]) -> str:
    """Why sites cannot be windowed."""
    told: dict[str, Any] = {reason: None for g in graphs for reason in g.found.refused.values()}
    if any(g.found.sites for g in graphs):
        told["they are not causal, or have a window already"] = None
    return "; ".join(told) or "none was found"
