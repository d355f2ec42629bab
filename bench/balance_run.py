"""How does one way of training fare? The real sampler and controller, on a simulated cluster.

| method | batches | budgets |
|---|---|---|
| `random` | dealt as they come | fixed |
| `sorted` | sorted by length inside the global batch, dealt there and back | fixed |
| `length` | balanced by the square of the length (LPT) | fixed |
| `sparsity` | balanced by predicted cost, densities learned by source | fixed |
| `controller`, `length+controller`, `both` | random, length, sparsity | planned |
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from afbs_compile.bench.balance_world import CLOCK_SCATTER, Cluster, Data
from afbs_compile.training.epoch import Step
from afbs_compile.training.sampler import SparsityAwareBatchSampler, totals
from afbs_compile.tuner.arrays import Floats
from afbs_compile.tuner.balance import Plan
from afbs_compile.tuner.budget_bounds import around
from afbs_compile.tuner.controller import SparsityController
from afbs_compile.tuner.densities import DensityEstimates
from afbs_compile.tuner.step_cost import CostModel

BATCHES = {
    "random": "random",
    "sorted": "sorted",
    "length": "length",
    "sparsity": "sparsity",
    "controller": "random",
    "length+controller": "length",
    "both": "sparsity",
}
ASSIGN = {"random": "deal", "sorted": "snake", "length": "lpt", "sparsity": "lpt"}
BASE = 0.25  # what the controller takes the usual density for: only ratios to it matter here
PROFILE = 24  # units that are timed before a run


@dataclass(frozen=True, slots=True)
class Case:
    """One simulated run.

    Attributes:
        method: See the module.
        sync: "step" or "micro".
        shrink: Least budget over the usual one.
        grow: Largest budget over the usual one.
        anchor: Of the controller.
        micro_batches: Of a rank in a step.
        batch_size: Samples of a micro-batch.
        seed: Of chance.
    """

    method: str
    sync: str = "step"
    shrink: float = 0.75
    grow: float = 1.5
    anchor: str = "mean"
    micro_batches: int = 8
    batch_size: int = 1
    seed: int = 0

    @property
    def controlled(self) -> bool:
        """Whether budgets are planned."""
        return self.method in ("controller", "length+controller", "both")


def simulate(case: Case, known: Data, machines: Cluster) -> dict[str, float]:
    """Means over the second epoch; in the first densities and costs are learned."""
    rng = np.random.default_rng([case.seed, 3])
    cost = profiled(known, machines, rng)
    sampler = sampler_of(case, known, machines.ranks, cost)
    bounds = around([BASE], case.shrink, case.grow)
    controller = (
        SparsityController(bounds, cost, machines.ranks, case.anchor) if case.controlled else None
    )
    seconds, kept, imbalance, planning = [], [], [], []
    for epoch in range(2):
        sampler.densities.commit()
        sampler.set_epoch(epoch)
        for number in range(sampler.steps):
            step = sampler.step(number)
            begun = time.process_time()
            plans = planned(case, step, sampler, controller)
            planning.append(time.process_time() - begun)
            budget = budgets(plans, step)
            times = machines.seconds(step, known, budget)
            learn(step, times, plans, sampler, controller, known, rng)
            if epoch:
                seconds.append(machines.step_seconds(times, case.sync))
                imbalance.append(times.sum(1).max() / times.sum(1).mean())
                usual = totals(step, known.visible * known.density)
                kept.append((usual * budget).sum() / usual.sum())
    return {
        "step_ms": 1e3 * float(np.mean(seconds)),
        "imbalance": float(np.mean(imbalance)),
        "kept_ratio": float(np.mean(kept)),
        "plan_ms": 1e3 * float(np.median(planning)),
        "steps": len(seconds),
    }


def sampler_of(case: Case, known: Data, ranks: int, cost: CostModel) -> SparsityAwareBatchSampler:
    """The batches of a method."""
    batches = BATCHES[case.method]
    aware = batches == "sparsity"
    assign = ASSIGN[batches]
    if case.sync == "micro" and batches == "sorted":
        assign = "deal"  # the sampler sorts: micro-batches side by side are alike
    densities = (
        DensityEstimates(known.prior.copy(), known.source)
        if aware or case.controlled
        else DensityEstimates(np.ones(len(known.lengths)), known.source)
    )
    return SparsityAwareBatchSampler(
        known.lengths, case.batch_size, case.micro_batches, world=ranks, rank=0,
        sync="step" if batches == "random" else case.sync, visible=known.visible,
        densities=densities, cost=cost if aware else squares(), assign=assign, seed=case.seed,
        drop_last=True,
    )  # fmt: skip


def squares() -> CostModel:
    """A model for which only dense attention costs: about the square of the length."""
    blocks = np.array([1e3, 1e4, 1e5, 1e6])
    model = CostModel(ridge=1e-9)
    model.profile(np.zeros(4), blocks, blocks)
    return model


def profiled(known: Data, machines: Cluster, rng: np.random.Generator) -> CostModel:
    """What a short profile on one device finds: single samples at several budgets."""
    chosen = rng.choice(len(known.lengths), PROFILE, replace=False)
    budget = rng.uniform(0.5, 2.0, PROFILE)
    a, b, c = machines.cost
    blocks = known.visible[chosen] * np.minimum(known.density[chosen] * budget, 1.0)
    times = a * known.lengths[chosen] + b * blocks + c
    model = CostModel()
    model.profile(known.lengths[chosen], blocks,
                  times * np.exp(CLOCK_SCATTER * rng.standard_normal(PROFILE)))  # fmt: skip
    return model


def planned(
    case: Case,
    step: Step,
    sampler: SparsityAwareBatchSampler,
    controller: SparsityController | None,
) -> list[Plan]:
    """Plans of the units that wait for each other, from what the sampler expects."""
    if controller is None:
        return []
    tokens = totals(step, sampler.lengths)
    usual = totals(step, sampler.visible * sampler.densities()) / BASE
    if case.sync == "step":
        tokens, usual = tokens.sum(1, keepdims=True), usual.sum(1, keepdims=True)
    return [controller.plan(tokens[:, n], usual[:, n], group=n) for n in range(tokens.shape[1])]


def budgets(plans: list[Plan], step: Step) -> Floats:
    """Budgets over usual ones [R, M]."""
    units = len(step), len(step[0])
    if not plans:
        return np.ones(units)
    columns = np.concatenate([plan.budgets for plan in plans], axis=1) / BASE
    return np.array(np.broadcast_to(columns, units))


def learn(
    step: Step,
    times: Floats,
    plans: list[Plan],
    sampler: SparsityAwareBatchSampler,
    controller: SparsityController | None,
    known: Data,
    rng: np.random.Generator,
) -> None:
    """Tell clocks and densities; a clock times whole steps."""
    if controller and len(plans) == 1:
        noise = np.exp(CLOCK_SCATTER * rng.standard_normal(len(step)))
        controller.observe(plans[0], times.sum(1) * noise)
    samples = [s for rank in step for micro in rank for s in micro]
    sampler.densities.observe(samples, known.density[samples])


def cases(syncs: list[str], bounds: list[tuple[float, float]], seed: int) -> Iterator[Case]:
    """All methods; those without a controller know no bounds."""
    for sync in syncs:
        for method in BATCHES:
            one = Case(method, sync, seed=seed)
            if not one.controlled:
                yield one
                continue
            for shrink, grow in bounds:
                yield Case(method, sync, shrink, grow, seed=seed)


def row_of(case: Case, found: dict[str, float]) -> dict[str, Any]:
    """What a run was and what came out."""
    bounds = f"{case.shrink:g}–{case.grow:g}" if case.controlled else None
    return {
        "setup": "simulated",
        "method": case.method,
        "sync": case.sync,
        "bounds": bounds,
        "anchor": case.anchor if case.controlled else None,
        "micro_batches": case.micro_batches,
        "batch_size": case.batch_size,
        "seed": case.seed,
        "loss": None,
        **found,
    }
