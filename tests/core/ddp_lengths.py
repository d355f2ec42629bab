"""Two ranks whose lengths change, DDP compiled beside plain DDP, for `test_ddp_lengths.py`.

Run as `python ddp_lengths.py FOLDER`: spawns both ranks. Each writes into FOLDER, as JSON, how far
its gradients lie from plain DDP's and what afbs ran.
"""

import copy
import json
import sys
from pathlib import Path

import rank
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

LENGTHS = ((200, 264, 391, 200), (264, 200, 264, 391))  # of each rank, step by step
LAYERS = 2


def sample(me, step):
    generator = torch.Generator().manual_seed(2 * step + me)
    return torch.randn(1, LENGTHS[me][step], rank.WIDTH, generator=generator)


def gradients(run, model, x):
    """Of a loss in which each element has its own weight, as DDP averages them."""
    model.zero_grad()
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(x.shape[1]))
    ((run(x) * weights).sum() / x.shape[1] ** 0.5).backward()
    return {name: w.grad.clone() for name, w in model.named_parameters()}


def furthest(found, wanted):
    """The largest difference of all weights' gradients, over the largest gradient."""
    assert found.keys() == wanted.keys()
    size = max(x.abs().max() for x in wanted.values())
    return max(((found[name] - x).abs().max() / size).item() for name, x in wanted.items())


def compiled(model, folder):
    """DDP with a bucket a layer, so that DDPOptimizer cuts the graph between them."""
    bytes_of_a_layer = sum(w.nbytes for w in model.layers[0].parameters())
    dist._DEFAULT_FIRST_BUCKET_BYTES = bytes_of_a_layer
    wrapped = DistributedDataParallel(model, bucket_cap_mb=bytes_of_a_layer / 2**20)
    options = {"policy": str(folder / "policy.json"), "min_length": 128}
    return torch.compile(wrapped, backend="afbs", options=options)


def work(me, folder):
    """One rank; graphs run as they are."""
    import afbs_compile
    from afbs_compile import backend, runner
    from afbs_compile.kernels import dispatch

    torch.set_num_threads(1)
    assert torch._dynamo.config.optimize_ddp, "DDPOptimizer is off"
    graphs = []
    backend.inductor = lambda gm, inputs, options: graphs.append(gm) or gm.forward
    runner.later = lambda gm, dynamic, options: gm.forward
    real, passes = dispatch.backward, []
    dispatch.backward = lambda *args, **more: passes.append(step) or real(*args, **more)
    meeting = dist.FileStore(f"{folder}/rendezvous", 2)
    dist.init_process_group("gloo", store=meeting, rank=me, world_size=2)
    model = rank.Model(LAYERS)
    plain = copy.deepcopy(model)
    ours, theirs = compiled(model, folder), DistributedDataParallel(plain)
    apart = []
    for step in range(len(LENGTHS[me])):
        x = sample(me, step)
        wanted = gradients(theirs, plain, x)
        apart.append(furthest(gradients(ours, model, x), wanted))
    found = {"apart": apart, "graphs": len(graphs), "passes": list(passes)}
    found["took"] = afbs_compile.set_budget(model, {f"layers.{n}": 0.3 for n in range(LAYERS)})
    found["less kept"] = furthest(gradients(ours, model, x), wanted)
    (folder / f"{me}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    budgets, lengths = [1.0] * LAYERS, set(LENGTHS[0] + LENGTHS[1])
    policy = rank.policy_of(rank.Model(LAYERS), budgets, lengths)
    (Path(sys.argv[1]) / "policy.json").write_text(policy.to_json())
    torch.multiprocessing.spawn(work, (Path(sys.argv[1]),), nprocs=2)
