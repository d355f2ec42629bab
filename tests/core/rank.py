"""One rank of a distributed training run of a small model, for `test_distributed.py`.

Run as `python rank.py FOLDER WRAP SCOPE INNER STEPS`; rank and world come from the environment.
Writes losses, graphs and outputs as JSON into FOLDER. Also the model and its reference.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from afbs_compile.identity import model_key, rows_of
from afbs_compile.policy import Head, Policy, Site, Tuning, bucket_of
from afbs_compile.weights import site_keys

LENGTH, LAYERS, HEADS, DIM = 328, 12, 2, 32
WIDTH, CHANGES, RATE = HEADS * DIM, 50, 0.002


class Block(nn.Module):
    """Causal self-attention with a residual."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.qkv.weight.data *= 3

    def project(self, x):
        x = self.qkv(F.layer_norm(x, x.shape[-1:]))
        return [t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in x.chunk(3, -1)]

    def forward(self, x):
        out = F.scaled_dot_product_attention(*self.project(x), is_causal=True)
        return x + self.out(out.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Twelve of them, if no other number is given."""

    def __init__(self, layers=LAYERS):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.ModuleList([Block() for _ in range(layers)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def policy_of(model, budgets, lengths=(LENGTH,)):
    """Every layer sparse by its budget, at the lengths of some buckets."""
    sites = {}
    for n, (block, budget) in enumerate(zip(model.layers, budgets, strict=True)):
        weights = site_keys(rows_of(block.named_parameters()), ["function"])["function"]
        heads = (Head("sparse", 0.5, neighbours=0, budget=budget),) * HEADS
        name = f"layers.{n}"
        sites[name] = Site(name, heads, HEADS, DIM, "causal", "sparse", weights=weights)
    tunings = {
        bucket_of(length): Tuning(bucket_of(length), length, {}, True, 0, 0.0, 0.0, "", "cpu", {},
                                  (), sites)
        for length in lengths
    }  # fmt: skip
    return Policy(model_key(model.named_parameters()), None, tuple(tunings.values()))


def sample(n):
    return torch.randn(1, LENGTH, WIDTH, generator=torch.Generator().manual_seed(n))


def loss_of(out):
    return (out - 1).square().mean()


def wrapped(model, wrap, scope, options):
    """The model, compiled and distributed in one of the ways that people use."""
    if scope == "block":
        for block in model.layers:
            block.compile(backend="afbs", options=options)
    if wrap == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for block in model.layers:
            fully_shard(block)
        fully_shard(model)
    else:
        torch._dynamo.config.optimize_ddp = wrap == "ddp"
        first = 2 * WIDTH * 4 * WIDTH * 4 / 2**20  # a few layers a bucket
        dist._DEFAULT_FIRST_BUCKET_BYTES = int(first * 2**20)
        model = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=first)
    return model if scope == "block" else torch.compile(model, backend="afbs", options=options)


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def train(model, x, steps):
    """Losses of some steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for _ in range(steps):
        loss = loss_of(model(x))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(folder, wrap, scope, inner, steps):
    import afbs_compile
    from afbs_compile import backend, runner
    from afbs_compile.kernels import dispatch

    torch.set_num_threads(1)
    dispatch.fused_scores = lambda *_: None
    if inner == "eager":
        backend.inductor = lambda gm, inputs, options: gm.forward
        runner.later = lambda gm, dynamic, options: gm.forward
    meeting = dist.FileStore(f"{folder}/rendezvous", 2)
    dist.init_process_group("gloo", store=meeting, rank=int(os.environ["RANK"]), world_size=2)
    options = {"policy": str(folder / "policy.json"), "min_length": 128}
    model = Model()
    run, x = wrapped(model, wrap, scope, options), sample(dist.get_rank())
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        found = {"losses": train(run, x, steps)}
        before = graphs()
        for step in range(CHANGES if steps > 2 else 0):
            budgets = {f"layers.{n}": 0.2 + (step + n) % 9 / 20 for n in range(LAYERS)}
            found["took"] = afbs_compile.set_budget(model, budgets)
            out = run(x)
        found |= {"graphs": graphs() - before, "sites": afbs_compile.explain().rewritten}
        found["last"] = loss_of(out).item() if steps > 2 else None
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:5], int(sys.argv[5]))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may outlive the interpreter
