"""Balanced data-parallel training. Run: torchrun --nproc-per-node 2 examples/ddp.py."""

import contextlib

import common
import torch
import torch.distributed as dist
from rich.console import Console
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from afbs_compile.training.balancer import Balancer
from afbs_compile.training.clock import StepClock
from afbs_compile.training.exchange import ScalarExchange
from afbs_compile.training.report_show import table


def main() -> None:
    """Train, and show who waited for whom."""
    args = common.arguments()
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", dist.get_rank()) if cuda else torch.device("cpu")
    data = common.Documents(args.samples)
    plain, exchange = common.made(device), ScalarExchange()
    cost = exchange.agree(common.measured(plain, device))
    model = DistributedDataParallel(plain)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    sampler = common.sampler_of(data, args.micro_batches, cost, "step")
    balancer = Balancer(sampler, exchange=exchange, clock=StepClock(model))
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=common.together)
    for epoch in range(args.epochs):
        balancer.next_epoch(epoch)
        batches, total = iter(loader), 0.0
        for step in range(sampler.steps):
            balancer.begin_step(step)
            last = sampler.micro_batches(step) - 1
            for micro in range(last + 1):
                with model.no_sync() if micro < last else contextlib.nullcontext():
                    loss = model(next(batches).to(device))
                    (loss / (last + 1)).backward()
                total += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            balancer.end_step()
        if dist.get_rank() == 0:
            print(f"epoch {epoch} loss {float(total) / len(sampler):.4f}")
    balancer.flush()
    if dist.get_rank() == 0:
        Console().print(table(balancer.report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
