"""Sparse training with budgets that balance ranks: backend="afbs", the controller, DDP or FSDP2.

Run: torchrun --nproc-per-node 2 examples/sparse.py [--wrap fsdp2]. Nothing is tuned: every head
keeps a quarter of its blocks, or what the controller makes of that. FSDP2 computes in bfloat16.
It waits in every layer, so its micro-batches are planned one by one, and costs are profiled only.
"""

import contextlib
import tempfile
from functools import partial
from pathlib import Path

import common
import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import afbs_compile
from afbs_compile.training.balancer import Balancer
from afbs_compile.training.clock import StepClock
from afbs_compile.training.exchange import ScalarExchange
from afbs_compile.training.profile import profiled
from afbs_compile.training.report_show import table
from afbs_compile.training.scratch import Attention, budget_policy
from afbs_compile.tuner.budget_bounds import around
from afbs_compile.tuner.controller import SparsityController
from afbs_compile.tuner.step_cost import CostModel
from afbs_compile.tuner.workload import visible_blocks

BUDGET, LONGEST = 0.25, 1024
SITES = [f"layers.{n}" for n in range(common.LAYERS)]
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def compiled(model: common.Model, folder: Path, dtype: torch.dtype | None) -> None:
    """Compile every block with afbs, under a policy of budgets; before the model is wrapped."""
    shape = Attention(common.HEADS, common.HEADS, common.DIM // common.HEADS)
    policy = budget_policy(model, dict.fromkeys(SITES, shape), BUDGET, LONGEST, dtype)
    path = folder / "policy.json"
    path.write_text(policy.to_json())
    options = {"policy": str(path), "min_length": 128}
    for layer in model.layers:
        layer.compile(backend="afbs", options=options, dynamic=True)


def wrapped(model: common.Model, wrap: str) -> nn.Module:
    """The model in DDP, or sharded by FSDP2 in bfloat16."""
    if wrap == "ddp":
        return DistributedDataParallel(model)
    mesh = dist.init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=HALF)
    return fully_shard(model, mesh=mesh, mp_policy=HALF)


def measured(model: nn.Module, device: torch.device) -> CostModel:
    """What documents cost here at some budgets; all ranks run it side by side."""

    def step(tokens: int, budget: float) -> None:
        afbs_compile.set_budget(model, dict.fromkeys(SITES, budget))
        run(tokens)

    def run(tokens: int) -> None:
        model(torch.ones(1, tokens, dtype=torch.long, device=device)).backward()
        model.zero_grad()

    run(LONGEST)  # a site takes budgets once it has run
    cases = [(tokens, budget) for tokens in (256, 512, LONGEST) for budget in (0.25, 1.0)]
    return profiled(step, cases, lambda n: common.LAYERS * float(visible_blocks(n)), device)


@contextlib.contextmanager
def summed_later(model: nn.Module, last: bool):  # noqa: ANN201
    """Gradients of all ranks are summed in the last micro-batch only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    with contextlib.nullcontext() if last or isinstance(model, FSDPModule) else model.no_sync():
        yield


def main() -> None:
    """Train, and show what budgets did."""
    parser = common.options()
    parser.add_argument("--wrap", choices=("ddp", "fsdp2"), default="ddp")
    args = parser.parse_args()
    fsdp, cuda = args.wrap == "fsdp2", torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", dist.get_rank()) if cuda else torch.device("cpu")
    data, plain, exchange = common.Documents(args.samples), common.made(device), ScalarExchange()
    with tempfile.TemporaryDirectory() as folder:
        compiled(plain, Path(folder), HALF.param_dtype if fsdp else None)
        model = wrapped(plain, args.wrap)
        cost = exchange.agree(measured(model, device))  # reads the policy
        sampler = common.sampler_of(data, args.micro_batches, cost, "micro" if fsdp else "step")
        bounds = around([BUDGET] * common.LAYERS, 0.5, 2.0)
        balancer = Balancer(
            sampler, SparsityController(bounds, cost, sampler.world), SITES,
            partial(afbs_compile.set_budget, plain), exchange,
            None if fsdp else StepClock(plain),
        )  # fmt: skip
        train(model, balancer, data, args.epochs, device)
    told = afbs_compile.explain()
    if dist.get_rank() == 0:
        print(f"sparse {told.rewritten} of {len(told.sites)}")
        if balancer.clock:
            Console().print(table(balancer.report))
    dist.destroy_process_group()


def train(
    model: nn.Module, balancer: Balancer, data: common.Documents, epochs: int, device: torch.device
) -> None:
    """The loop: plan, accumulate gradients over micro-batches, step, learn."""
    sampler = balancer.sampler
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=common.together)
    for epoch in range(epochs):
        balancer.next_epoch(epoch)
        batches, total, budgets = iter(loader), 0.0, []
        for number in range(sampler.steps):
            plans = balancer.begin_step(number)
            budgets += [
                float(b) for plan in plans for b in (plan.budgets.min(), plan.budgets.max())
            ]
            last = sampler.micro_batches(number) - 1
            for micro in range(last + 1):
                balancer.begin_micro_batch(micro)
                with summed_later(model, micro == last):
                    loss = model(next(batches).to(device))
                    (loss / (last + 1)).backward()
                total += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            balancer.end_step()
        if dist.get_rank() == 0:
            spread = f"{min(budgets):.3f} to {max(budgets):.3f}"
            print(f"epoch {epoch} loss {float(total) / len(sampler):.4f} budgets {spread}")
    balancer.flush()


if __name__ == "__main__":
    main()
