"""What do all runs of this rank share? Model, budgets, costs, and the batches of a method."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import afbs_compile
from afbs_compile.bench.live_data import Sample
from afbs_compile.bench.pretrain_model import Llama
from afbs_compile.training.balancer import Balancer
from afbs_compile.training.clock import StepClock
from afbs_compile.training.exchange import ScalarExchange
from afbs_compile.training.profile import profiled
from afbs_compile.training.sampler import SparsityAwareBatchSampler
from afbs_compile.tuner.budget_bounds import around
from afbs_compile.tuner.controller import SparsityController
from afbs_compile.tuner.densities import DensityEstimates
from afbs_compile.tuner.step_cost import CostModel
from afbs_compile.tuner.workload import visible_blocks

BASE = 0.25  # what budgets of all sources are told as: only ratios to it matter to the controller
ANCHORS = {"controller": "mean", "bubble": "max"}


@dataclass(slots=True)
class Rank:
    """What all runs of this rank share.

    Attributes:
        model: Compiled.
        wrapped: The same in DDP.
        start: Its first weights.
        device: Where it is.
        budgets: Of every source.
        exchange: Of scalars between ranks.
        cost: Profiled, the same on all ranks.
        taught: A controller's state after the rehearsal; None before.
    """

    model: Llama
    wrapped: DistributedDataParallel
    start: Mapping[str, Tensor]
    device: torch.device
    budgets: list[float]
    exchange: ScalarExchange
    cost: CostModel
    taught: Mapping[str, Any] | None = None

    def fresh_cost(self) -> CostModel:
        """A cost model of its own for a run: it learns."""
        model = CostModel()
        model.load_state_dict(self.cost.state_dict())
        return model


@dataclass(frozen=True, slots=True)
class Case:
    """One run.

    Attributes:
        method: See `live_run`.
        seed: Of the samples and their order.
        micro_batches: Of a rank in a step.
        bounds: Least and largest budget over the source's.
        rate: Of AdamW.
    """

    method: str
    seed: int
    micro_batches: int
    bounds: tuple[float, float]
    rate: float


class Budgets:
    """The budgets of this rank: the source's, times what the controller planned."""

    def __init__(self, model: Llama, base: list[float]) -> None:
        """Begin with the sources' own."""
        self.model, self.base = model, base
        self.factors = dict.fromkeys(model.sites, 1.0)
        self.set: dict[str, float] = {}

    def plan(self, budgets: Mapping[str, float]) -> None:
        """Take the controller's budgets of this step."""
        self.factors = {site: budget / BASE for site, budget in budgets.items()}

    def use(self, source: int) -> None:
        """From the next call on; nothing is done where nothing changes."""
        wanted = {s: min(self.base[source] * f, 1.0) for s, f in self.factors.items()}
        if wanted != self.set:
            afbs_compile.set_budget(self.model, wanted)
            self.set = wanted


def visible_of(model: Llama, length: int, rows: int) -> float:
    """Visible blocks of a sample over all layers."""
    return float(model.sizes.layers * rows * visible_blocks(length))


def loss_of(model: torch.nn.Module, sample: Sample, device: torch.device) -> Tensor:
    """The loss of a sample, in bfloat16 where autocast says so."""
    with torch.autocast(device.type, torch.bfloat16):
        loss: Tensor = model(sample.tokens.to(device).long())
    return loss


def profile(
    model: Llama, samples: list[Sample], micro_batches: int, device: torch.device
) -> CostModel:
    """What steps of some lengths and budgets cost here; compiles all that runs will need."""
    rows = samples[0].tokens.shape[0]
    by_length = {sample.length: sample for sample in samples}
    for sample in by_length.values():
        loss_of(model, sample, device).backward()  # type: ignore[no-untyped-call]
    lengths = sorted(by_length)
    chosen = sorted({lengths[n] for n in np.linspace(0, len(lengths) - 1, 5).astype(int)})
    tokens = {micro_batches * rows * length: length for length in chosen}

    def step(count: int, budget: float) -> None:
        afbs_compile.set_budget(model, dict.fromkeys(model.sites, budget))
        for _ in range(micro_batches):
            loss_of(model, by_length[tokens[count]], device).backward()  # type: ignore[no-untyped-call]
        model.zero_grad()

    def visible(count: int) -> float:
        return micro_batches * visible_of(model, tokens[count], rows)

    cases = [(count, budget) for count in tokens for budget in (0.125, 0.5)]
    return profiled(step, cases, visible, device, repeats=1)


def sampler_of(case: Case, rank: Rank, samples: list[Sample]) -> SparsityAwareBatchSampler:
    """The batches of a method; a visible block counts by its source's budget."""
    rows = samples[0].tokens.shape[0]
    budgets = np.array([rank.budgets[s.source] for s in samples])
    visible = np.array([visible_of(rank.model, s.length, rows) for s in samples])
    aware = case.method not in ("random", "length")
    lengths = [s.length * (rows if aware else 1) for s in samples]
    return SparsityAwareBatchSampler(
        lengths, 1, case.micro_batches, layers=rank.model.sizes.layers,
        visible=visible * budgets / BASE,
        densities=DensityEstimates(np.full(len(samples), BASE if aware else 1.0)),
        cost=rank.fresh_cost() if aware else None,
        assign="deal" if case.method == "random" else "lpt", seed=case.seed, drop_last=True,
    )  # fmt: skip


def balancer_of(
    case: Case, rank: Rank, sampler: SparsityAwareBatchSampler, budgets: Budgets
) -> Balancer:
    """The method's batches and budgets, timed."""
    controller = None
    if case.method in ANCHORS:
        base = [BASE] * rank.model.sizes.layers
        controller = SparsityController(
            around(base, *case.bounds), rank.fresh_cost(), sampler.world, ANCHORS[case.method]
        )
        if rank.taught:
            controller.load_state_dict(rank.taught)
    sites = list(rank.model.sites) if controller else []
    return Balancer(sampler, controller, sites, budgets.plan, rank.exchange, StepClock(rank.model))
