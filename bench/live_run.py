"""One training run on this rank: batches and budgets of a method, and what its steps took.

| method | batches inside a global batch | budgets |
|---|---|---|
| random | as they come | of the source |
| length | balanced by length: tokens and their square | of the source |
| sparsity | balanced by the measured cost of tokens and kept blocks | of the source |
| controller | as sparsity | all ranks move to the mean time |
| bubble | as sparsity | the others grow to the slowest rank's time |

Controllers begin with what one learned in a rehearsal, as they would after the first steps of a
long training: costs under DDP, and how far predictions are off.

All methods of a seed see the same global batches, and every micro-batch weighs the same. So the
first three take the same steps but for rounding: they differ in who computes what.
"""

import contextlib
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from afbs_compile.bench.live_data import Sample
from afbs_compile.bench.live_rank import (
    BASE,
    Budgets,
    Case,
    Rank,
    balancer_of,
    loss_of,
    sampler_of,
)
from afbs_compile.bench.pretrain_model import optimizer_of, warm_up
from afbs_compile.training.balancer import Balancer

RISE = 5  # steps in which the learning rate rises
FIRST = 3  # steps that are not counted: the controller learns, memory is allocated


@dataclass(frozen=True, slots=True)
class Step:
    """What a step was on this rank.

    Attributes:
        seconds: From when all ranks were ready until this one's device was idle.
        loss: Its own micro-batches' mean.
        kept: Blocks that all ranks keep, over those of the sources' own budgets.
    """

    seconds: float
    loss: Tensor
    kept: float


def run(case: Case, rank: Rank, samples: list[Sample], held_out: list[Sample]) -> dict[str, Any]:
    """Train from the start, once through the samples; every rank has to call it."""
    balancer, steps = trained(case, rank, samples)
    return measured(balancer, steps) | {
        "train_loss": float(np.mean([one.loss.item() for one in steps[-RISE:]])),
        "held_out": held_out_loss(rank, held_out),
        "tokens": int(sum(s.tokens.shape[0] * s.length for s in samples)),
    }


def trained(case: Case, rank: Rank, samples: list[Sample]) -> tuple[Balancer, list[Step]]:
    """The steps of a run, its balancer when they are over, and the model trained."""
    rank.model.load_state_dict(rank.start)
    optimizer = optimizer_of(rank.model, case.rate)
    budgets = Budgets(rank.model, rank.budgets)
    balancer = balancer_of(case, rank, sampler_of(case, rank, samples), budgets)
    rate = warm_up(case.rate, RISE)
    steps = []
    for number in range(balancer.sampler.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(number)
        wait(rank.device)
        begun = time.perf_counter()
        balancer.begin_step(number)
        loss = step(rank, balancer, optimizer, budgets, samples)
        balancer.end_step()
        settled(rank.device)
        steps.append(Step(time.perf_counter() - begun, loss, kept_ratio(balancer)))
    balancer.flush()
    if balancer.clock:
        balancer.clock.close()
    return balancer, steps


def rehearse(case: Case, rank: Rank, samples: list[Sample]) -> None:
    """Let a controller learn on some samples, and this rank allocate what it needs."""
    balancer = trained(case, rank, samples)[0]
    if balancer.controller:
        rank.taught = balancer.controller.state_dict() | {"held": {}}


def step(
    rank: Rank,
    balancer: Balancer,
    optimizer: torch.optim.AdamW,
    budgets: Budgets,
    samples: list[Sample],
) -> Tensor:
    """One optimizer step of this rank; its mean loss.

    Source by source, since changing budgets takes the host time; long samples first, so that the
    host is ahead when short ones come.
    """
    sampler = balancer.sampler
    mine = [samples[micro[0]] for micro in sampler.step(balancer.number)[sampler.rank]]
    total = torch.zeros((), device=rank.device)
    for micro, sample in enumerate(sorted(mine, key=lambda s: (s.source, -s.length))):
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


def measured(balancer: Balancer, steps: list[Step]) -> dict[str, Any]:
    """Times of all ranks: a step ends when its slowest rank does."""
    every: list[list[float]] = [[] for _ in range(balancer.sampler.world)]
    dist.all_gather_object(every, [one.seconds for one in steps])
    seconds = np.max(every, axis=0)[FIRST:]
    own = np.array([r.seconds for r in balancer.report.records if r.step >= FIRST], dtype=float)
    slowest = np.nanmax(own, axis=1)
    return {
        "step_ms": 1e3 * float(seconds.mean()),
        "own_ms": (1e3 * np.nanmean(own, axis=0)).tolist(),
        "slowest_ms": 1e3 * float(slowest.mean()),
        "bubble": float(1 - np.nanmean(own, axis=1).sum() / slowest.sum()),
        "kept_ratio": float(np.mean([one.kept for one in steps[FIRST:]])),
        "counted": len(seconds),
    }


def held_out_loss(rank: Rank, held_out: list[Sample]) -> float:
    """Mean over samples at the sources' budgets; in the graph that trains, so none compiles."""
    budgets = Budgets(rank.model, rank.budgets)
    losses = []
    for sample in sorted(held_out, key=lambda s: s.source):
        budgets.use(sample.source)
        losses.append(loss_of(rank.model, sample, rank.device).item())
    return float(np.mean(losses))


def wait(device: torch.device) -> None:
    """Until all ranks are here, with nothing left to do."""
    settled(device)
    dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)
    settled(device)


def settled(device: torch.device) -> None:
    """Until this rank's device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
