"""One training run on this rank: batches and budgets of a method, and what its steps took.

| method | batches inside a global batch | budgets |
|---|---|---|
| random | as they come | of the source |
| length | balanced by length: tokens and their square | of the source |
| sparsity | balanced by the measured cost of tokens and kept blocks | of the source |
| controller | as sparsity | all ranks move to the mean time |
| bubble | as sparsity | the others grow to the slowest rank's time |

All methods of a seed see the same global batches, and every micro-batch weighs the same. So the
first three take the same steps but for rounding: they differ in who computes what.
"""

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import afbs_compile
from afbs_compile.bench.live_data import Sample
from afbs_compile.bench.pretrain_model import Llama, optimizer_of, warm_up
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
RISE = 5  # steps in which the learning rate rises
FIRST = 3  # steps that are not counted: the controller learns, memory is allocated
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
    """

    model: Llama
    wrapped: DistributedDataParallel
    start: Mapping[str, Tensor]
    device: torch.device
    budgets: list[float]
    exchange: ScalarExchange
    cost: CostModel

    def fresh_cost(self) -> CostModel:
        """A cost model of its own for a run: it learns."""
        model = CostModel()
        model.load_state_dict(self.cost.state_dict())
        return model


@dataclass(frozen=True, slots=True)
class Case:
    """One run.

    Attributes:
        method: See the module.
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
    return profiled(step, cases, visible, device)


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
    sites = list(rank.model.sites) if controller else []
    return Balancer(sampler, controller, sites, budgets.plan, rank.exchange, StepClock(rank.model))


def run(case: Case, rank: Rank, samples: list[Sample], held_out: list[Sample]) -> dict[str, Any]:
    """Train from the start, once through the samples; every rank has to call it."""
    rank.model.load_state_dict(rank.start)
    optimizer = optimizer_of(rank.model, case.rate)
    budgets = Budgets(rank.model, rank.budgets)
    sampler = sampler_of(case, rank, samples)
    balancer = balancer_of(case, rank, sampler, budgets)
    rate = warm_up(case.rate, RISE)
    seconds, losses, kept = [], [], []
    for number in range(sampler.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(number)
        wait(rank.device)
        begun = time.perf_counter()
        balancer.begin_step(number)
        losses.append(step(rank, balancer, optimizer, budgets, samples))
        balancer.end_step()
        settled(rank.device)
        seconds.append(time.perf_counter() - begun)
        kept.append(kept_ratio(balancer))
    balancer.flush()
    if balancer.clock:
        balancer.clock.close()
    budgets.factors = dict.fromkeys(rank.model.sites, 1.0)
    return measured(balancer, seconds, kept) | {
        "train_loss": float(np.mean([loss.item() for loss in losses[-RISE:]])),
        "held_out": held_out_loss(rank, budgets, held_out),
        "tokens": int(sum(s.tokens.shape[0] * s.length for s in samples)),
    }


def step(
    rank: Rank,
    balancer: Balancer,
    optimizer: torch.optim.AdamW,
    budgets: Budgets,
    samples: list[Sample],
) -> Tensor:
    """One optimizer step of this rank, source by source: budgets change seldom. Its mean loss."""
    sampler = balancer.sampler
    mine = [samples[micro[0]] for micro in sampler.step(balancer.number)[sampler.rank]]
    total = torch.zeros((), device=rank.device)
    for micro, sample in enumerate(sorted(mine, key=lambda s: (s.source, s.length))):
        budgets.use(sample.source)
        last = micro == len(mine) - 1
        with contextlib.nullcontext() if last else rank.wrapped.no_sync():
            loss = loss_of(rank.wrapped, sample, rank.device) / len(mine)
            loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_(rank.model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def kept_ratio(balancer: Balancer) -> float:
    """Blocks that all ranks keep in the step, over those of the sources' own budgets."""
    if not balancer.plans:
        return 1.0
    kept = sum(plan.work.blocks(plan.budgets).sum() for plan in balancer.plans)
    base = sum((BASE * plan.work.visible).sum() for plan in balancer.plans)
    return float(kept / base)


def measured(balancer: Balancer, seconds: list[float], kept: list[float]) -> dict[str, Any]:
    """Times of all ranks: a step ends when its slowest rank does."""
    every: list[list[float]] = [[] for _ in range(balancer.sampler.world)]
    dist.all_gather_object(every, seconds)
    steps = np.max(every, axis=0)[FIRST:]
    own = np.array([r.seconds for r in balancer.report.records if r.step >= FIRST], dtype=float)
    slowest = np.nanmax(own, axis=1)
    return {
        "step_ms": 1e3 * float(steps.mean()),
        "own_ms": (1e3 * np.nanmean(own, axis=0)).tolist(),
        "slowest_ms": 1e3 * float(slowest.mean()),
        "bubble": float(1 - np.nanmean(own, axis=1).sum() / slowest.sum()),
        "kept_ratio": float(np.mean(kept[FIRST:])),
        "counted": len(steps),
    }


def held_out_loss(rank: Rank, budgets: Budgets, held_out: list[Sample]) -> float:
    """Mean over samples at the sources' budgets; in the graph that trains, so none compiles."""
    losses = []
    for sample in held_out:
        budgets.use(sample.source)
        losses.append(loss_of(rank.model, sample, rank.device).item())
    return float(np.mean(losses))


def wait(device: torch.device) -> None:
    """Until all ranks are here, with nothing left to do."""
    settled(device)
    dist.barrier()
    settled(device)


def settled(device: torch.device) -> None:
    """Until this rank's device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
