"""Balanced training with Accelerate. Run: accelerate launch examples/accelerated.py (or torchrun).

The loader is not given to `prepare`: the sampler knows its rank already.
"""

import contextlib

import common
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from afbs_compile.training.balancer import Balancer
from afbs_compile.training.clock import StepClock
from afbs_compile.training.exchange import ScalarExchange


def main() -> None:
    """Train."""
    args = common.arguments()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    device, data = accelerator.device, common.Documents(args.samples)
    plain, exchange = common.made(device), ScalarExchange()
    cost = exchange.agree(common.measured(plain, device))
    model, optimizer = accelerator.prepare(plain, torch.optim.AdamW(plain.parameters(), 3e-3))
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
                with accelerator.no_sync(model) if micro < last else contextlib.nullcontext():
                    loss = model(next(batches).to(device))
                    accelerator.backward(loss / (last + 1))
                total += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            balancer.end_step()
        accelerator.print(f"epoch {epoch} loss {float(total) / len(sampler):.4f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
