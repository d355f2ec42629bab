"""What does a model say under other thresholds, and how many blocks does it visit?

The graph is the backend's: sites found by `passes.plan`, replaced by `passes.rewrite`. Here it is
interpreted, not compiled: nothing is compiled again for a policy or a selector, the
dense model runs the same operators beside attention, and the blocks of every call are counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter

from afbs_compile.kernels import dispatch
from afbs_compile.kernels import policy_columns as col
from afbs_compile.kernels.geometry import Blocks, Mask, site_visible
from afbs_compile.passes.plan import Plan, plan
from afbs_compile.passes.rewrite import Site, rewrite
from afbs_compile.policy import Head
from afbs_compile.policy_tensor import rows

OP = torch.ops.afbs.attention.default


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What every head does; a site that is not named follows `everywhere`.

    Attributes:
        selector: How block scores are made.
        everywhere: For all heads of sites without an entry of their own.
        sites: By site name, a `Head` a query head.
        compensation: What stands for a block that is left out.
    """

    selector: str
    everywhere: Head
    sites: Mapping[str, tuple[Head, ...]] = field(default_factory=dict)
    compensation: str = "none"

    def tensor(self, sites: Sequence[Site], device: torch.device) -> Tensor:
        """Policies of all sites, float32 `[sites, Hmax, COLUMNS]`."""
        most = max(site.heads for site in sites)
        stacked = torch.zeros(len(sites), most, col.COLUMNS)
        for row, site in enumerate(sites):
            heads = self.sites.get(site.name, (self.everywhere,) * site.heads)
            stacked[row, : site.heads] = rows(heads)
        return stacked.to(device)


@dataclass(slots=True)
class Meter:
    """Blocks that attention visited, and that it could have."""

    kept: float | Tensor = 0.0
    visible: float = 0.0

    def density(self) -> float:
        """Visited over visible blocks of everything so far."""
        return float(self.kept) / self.visible


class Counted(Interpreter):
    """Runs a rewritten graph and counts the blocks of every attention call."""

    def __init__(self, gm: GraphModule, meter: Meter) -> None:
        """Count into `meter`."""
        super().__init__(gm)
        self.meter = meter

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call."""
        if target is OP:
            return attention(self.meter, *args)
        return super().call_function(target, args, kwargs)


def attention(
    meter: Meter,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    causal: bool,
    offset: int,
    window: int,
    scale: float,
    selector: str,
    min_length: int,
    compensation: str = "none",
) -> Tensor:
    """What `afbs::attention` does, with its block lists counted."""
    mask = Mask(causal, offset, window)
    block_m, block_n = dispatch.block_sizes(q.device.type)
    tangent = compensation == "tangent"
    if q.device.type == "cuda":
        o, lse, counts, indices = dispatch.select_and_attend(
            q, k, v, policy, mask=mask, scale=scale, selector=selector
        )
        if tangent:
            o = dispatch.compensated(o, lse, q, k, v, counts, indices, policy, mask, scale)
    else:
        o, counts = dispatch.on_cpu(q, k, v, policy, mask, scale, selector, tangent)
    qb, kb = Blocks.of(q.shape[2], block_m, q.device), Blocks.of(k.shape[2], block_n, q.device)
    meter.kept = meter.kept + counts.sum(dtype=torch.float64)
    meter.visible += float(site_visible(mask, qb, kb).sum()) * q.shape[0] * q.shape[1]
    return o.transpose(1, 2).contiguous().transpose(1, 2)


class Graph:
    """One Dynamo graph that runs under the thresholds its model is set to."""

    def __init__(self, model: "Variants", gm: GraphModule, found: Plan) -> None:
        """Rewrite `gm` when it is first needed, once a selector and compensation."""
        self.model, self.gm, self.sites = model, gm, found.sites
        self.rewritten: dict[tuple[str, str], GraphModule] = {}

    def __call__(self, *args: Any) -> Any:
        """Run it; the arguments are those of Dynamo's graph."""
        thresholds = self.model.thresholds
        if thresholds is None:
            return self.gm(*args)
        device = next(x.device for x in args if isinstance(x, Tensor))
        policy = thresholds.tensor(self.sites, device)
        kind = thresholds.selector, thresholds.compensation
        if kind not in self.rewritten:
            self.rewritten[kind] = rewrite(
                self.gm, self.sites, policy,
                selector=kind[0], min_length=1, compensation=kind[1],
            )  # fmt: skip
        return Counted(self.rewritten[kind], self.model.meter).run(*args, policy)


class Variants:
    """A language model that runs dense or under any thresholds.

    Attributes:
        sites: Names of the attention calls that follow the thresholds, in order.
        refused: Reasons of those that stay dense, by name.
    """

    def __init__(self, module: nn.Module) -> None:
        """Take a model; its graph is captured at the first call."""
        self.sites: list[str] = []
        self.refused: dict[str, str] = {}
        self.thresholds: Thresholds | None = None
        self.meter = Meter()
        self.compiled = torch.compile(module, backend=self.take, dynamic=False)

    def take(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        """The Dynamo backend."""
        found = plan(gm, example_inputs, 1)
        self.sites = list(dict.fromkeys([*self.sites, *(site.name for site in found.sites)]))
        self.refused |= found.refused
        return Graph(self, gm, found) if found.sites else gm.forward

    @torch.no_grad()
    def dense(self, inputs: Mapping[str, Any]) -> Tensor:
        """Logits `[n, V]` of the model as it is, at all n tokens of one sequence."""
        self.thresholds = None
        return self.logits(inputs)

    @torch.no_grad()
    def sparse(self, inputs: Mapping[str, Any], thresholds: Thresholds) -> tuple[Tensor, float]:
        """Logits `[n, V]` under thresholds, and the density of the sites in this very run.

        Raises:
            ValueError: The model has no attention call that could be sparse.
        """
        self.thresholds, self.meter = thresholds, Meter()
        logits = self.logits(inputs)
        if not self.meter.visible:
            told = "; ".join(sorted(set(self.refused.values()))) or "none was found"
            raise ValueError(f"no attention call of the model can be sparse: {told}")
        return logits, self.meter.density()

    def logits(self, inputs: Mapping[str, Any]) -> Tensor:
        """Logits `[n, V]` of the only sequence of a batch."""
        found: Tensor = self.compiled(**inputs).logits[0]
        return found
