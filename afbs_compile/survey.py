"""What would become of a model's attention? Every call is a candidate or a refusal; no tuning.

Dynamo traces the model on one input, dense; nothing is compiled, measured or kept.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from afbs_compile.ahead import Input, call
from afbs_compile.backend import standing_reason
from afbs_compile.calibrate import describe
from afbs_compile.kernels.on_gpu import kernel_of
from afbs_compile.options import Options
from afbs_compile.passes.plan import plan
from afbs_compile.passes.rewrite import Site
from afbs_compile.passes.sites import value
from afbs_compile.report import Report, SiteReport

CANDIDATE = "can be sparse"


class Surveyor:
    """A Dynamo backend that compiles nothing and notes every attention call."""

    def __init__(self, options: Options) -> None:
        """Judge calls by `options`."""
        self.options = options
        self.sites: list[SiteReport] = []

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        """Take a graph."""
        found = plan(gm, example_inputs, self.options.min_length, self.options.compensation)
        reason = standing_reason(example_inputs, self.options)
        for site in found.sites:
            self.sites.append(
                SiteReport(site.name, "refused", reason) if reason else candidate(site)
            )
        self.sites += [SiteReport(n, "refused", r) for n, r in found.refused.items()]
        return gm.forward


def candidate(site: Site) -> SiteReport:
    """A call that tuning may make sparse."""
    query = value(site.call.query)
    return SiteReport(
        site.name, CANDIDATE, None, describe(site), site.heads, site.kv_heads, site.head_dim,
        length=int(value(site.key).shape[2]),
        kernel=kernel_of(query.device, query.dtype, site.head_dim),
    )  # fmt: skip


def survey(model: nn.Module, given: Input, options: Options) -> Report:
    """Every attention call of a model on one input.

    Args:
        model: Any module; it runs once, dense, under `torch.no_grad`.
        given: A tensor, positional arguments or keyword arguments.
        options: As of `torch.compile`.
    """
    surveyor = Surveyor(options)
    with torch.no_grad():
        call(torch.compile(model, backend=surveyor, dynamic=False), given)
    return Report(surveyor.sites, [])
