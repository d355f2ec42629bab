"""Balanced training with FSDP2. Run: torchrun --nproc-per-node 2 examples/fsdp2.py.

FSDP waits for all ranks in every layer, so micro-batches are balanced one by one (`sync="micro"`),
and nothing is timed in training: waiting would be counted as work. Costs come from the profile.
"""

import common
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from afbs_compile.training.balancer import Balancer
from afbs_compile.training.exchange import ScalarExchange


def main() -> None:
    """Train."""
    args = common.arguments()
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", dist.get_rank()) if cuda else torch.device("cpu")
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    data, model = common.Documents(args.samples), common.made(device)
    cost = ScalarExchange().agree(common.measured(model, device))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    sampler = common.sampler_of(data, args.micro_batches, cost, "micro")
    balancer = Balancer(sampler)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=common.together)
    for epoch in range(args.epochs):
        balancer.next_epoch(epoch)
        batches, total = iter(loader), 0.0
        for step in range(sampler.steps):
            balancer.begin_step(step)
            last = sampler.micro_batches(step) - 1
            for micro in range(last + 1):
                balancer.begin_micro_batch(micro)
                model.set_requires_gradient_sync(micro == last)
                loss = model(next(batches).to(device))
                (loss / (last + 1)).backward()
                total += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            balancer.end_step()
        if dist.get_rank() == 0:
            print(f"epoch {epoch} loss {float(total) / len(sampler):.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
