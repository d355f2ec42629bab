"""Do balanced batches and budgets shorten the steps of a real training run, and what of its loss?

`torchrun --nproc-per-node 2 bench/live.py`: a small Llama over bytes from scratch, under DDP, on
documents with long-tailed lengths. NCCL with a GPU for each rank, gloo on CPUs. `live_run` says
what the methods are.
"""

import os
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from afbs_compile.bench import (
    live_data,
    live_rank,
    live_run,
    pretrain_model,
    pretrain_text,
    script,
)
from afbs_compile.bench.ledger import Ledger
from afbs_compile.bench.live_data import Sample
from afbs_compile.bench.live_rank import Case, Rank
from afbs_compile.commands.errors import CommandError
from afbs_compile.commands.training_options import METHODS
from afbs_compile.report import explain
from afbs_compile.training.exchange import ScalarExchange

KEY = ("method", "seed", "model", "ranks", "backend", "steps", "micro_batches", "rows", "budgets",
       "bounds")  # fmt: skip
HELD_OUT = 16  # samples
LAUNCH = "torchrun --nproc-per-node 2 bench/live.py"


def run(args: Namespace, output: Path | None) -> dict[str, Any] | None:
    """Run what is not known yet; kept in `output` run by run. None on all ranks but the first.

    Raises:
        CommandError: An argument is wrong, there are not two ranks, or attention stayed dense.
    """
    methods, bounds = wanted(args), bounds_of(args.bounds)
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise CommandError(f"balance needs two ranks or more; run `{LAUNCH}`")
    device = begin(args.device)
    try:
        first = dist.get_rank() == 0
        ledger = Ledger("live", KEY, output if first else None, args.seconds)
        sources = pretrain_text.read(args.text)
        every = live_data.samples(sources, args.rows, args.shortest, args.longest)
        with tempfile.TemporaryDirectory() as folder:
            rank = made(args, device, every, budgets_of(args.budgets, len(sources)), Path(folder))
            rehearse(args, rank, every, bounds)
            for seed in range(args.seeds):
                measure(args, ledger, rank, every, turned(methods, seed), seed, bounds)
        return ledger.document() if first else None
    finally:
        dist.destroy_process_group()


def begin(wanted: str | None) -> torch.device:
    """Meet the other ranks; the device of this one."""
    kind = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cpu":
        dist.init_process_group("gloo")
        torch.set_num_threads(1)
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise CommandError(f"rank {local} has no GPU of its own; give --device cpu")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")
    return device


def made(
    args: Namespace, device: torch.device, every: list[Sample], budgets: list[float], folder: Path
) -> Rank:
    """Model, cost and exchange of this rank.

    Raises:
        CommandError: Attention stayed dense.
    """
    model = pretrain_model.made(pretrain_model.config(args.model), 0, device)
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    pretrain_model.compiled(model, budgets[0], args.longest, folder, dynamic=True)
    exchange = ScalarExchange()
    cost = live_rank.profile(model, every, args.micro_batches, device)
    told = explain()  # of every layer and length bucket
    if not told.sites or told.rewritten < len(told.sites):
        raise CommandError(f"attention layers stayed dense: {told}")
    wrapped = DistributedDataParallel(model)
    return Rank(model, wrapped, start, device, budgets, exchange, exchange.agree(cost))


def rehearse(
    args: Namespace, rank: Rank, every: list[Sample], bounds: tuple[float, float]
) -> None:
    """A run that counts nowhere: the controllers of the others begin with what it learned."""
    case = Case("controller", args.seeds, args.micro_batches, bounds, args.rate)
    wanted = args.steps * dist.get_world_size() * args.micro_batches
    live_run.rehearse(case, rank, live_data.divided(every, wanted, HELD_OUT, args.seeds))


def measure(
    args: Namespace,
    ledger: Ledger,
    rank: Rank,
    every: list[Sample],
    methods: list[str],
    seed: int,
    bounds: tuple[float, float],
) -> None:
    """The runs of a seed; all ranks begin and leave out the same ones."""
    world = dist.get_world_size()
    held_out = [every[n] for n in live_data.spread(len(every), HELD_OUT)]
    samples = live_data.divided(every, args.steps * world * args.micro_batches, HELD_OUT, seed)
    for method in methods:
        case = Case(method, seed, args.micro_batches, bounds, args.rate)
        named = {
            "method": method, "seed": seed, "model": args.model, "ranks": world,
            "backend": str(dist.get_backend()), "steps": args.steps,
            "micro_batches": args.micro_batches, "rows": args.rows, "budgets": args.budgets,
            "bounds": args.bounds,
        }  # fmt: skip
        todo = agreed("skip" if ledger.has(named) else "late" if ledger.over() else "run")
        if todo == "late" and dist.get_rank() == 0:
            ledger.notes.append(f"left out after {args.seconds:g} s: {method}, seed {seed}")
        if todo != "run":
            continue
        lengths = np.array([sample.length for sample in samples])
        found = live_run.run(case, rank, samples, held_out)
        found |= {"lengths": np.percentile(lengths, [5, 25, 50, 75, 95]).tolist(),
                  "cost": rank.cost.coefficients.tolist()}  # fmt: skip
        ledger.add(named | found)
        if dist.get_rank() == 0:
            sys.stderr.write(line(named | found) + "\n")


def agreed(value: str) -> str:
    """What the first rank says; its clock and its file count."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def line(row: dict[str, Any]) -> str:
    """A row for people who wait."""
    return (
        f"seed {row['seed']} {row['method']}: step {row['step_ms']:.1f} ms, own "
        f"{' / '.join(f'{ms:.1f}' for ms in row['own_ms'])} ms, bubble {row['bubble']:.1%}, kept "
        f"{row['kept_ratio']:.3f}, held-out {row['held_out']:.5f}"
    )


def wanted(args: Namespace) -> list[str]:
    """The methods of `--methods`.

    Raises:
        CommandError: One is unknown, or a count is out of range.
    """
    names = [name.strip() for name in args.methods.split(",")]
    if unknown := [name for name in names if name not in METHODS]:
        raise CommandError(f"no method {', '.join(unknown)}; there are {', '.join(METHODS)}")
    if min(args.rows, args.seeds, args.micro_batches, args.shortest) < 1:
        raise CommandError("--rows, --seeds, --micro-batches and --shortest need 1 or more")
    if args.steps <= live_run.FIRST or args.longest < args.shortest:
        raise CommandError(
            f"--steps needs more than {live_run.FIRST}, --longest no less than --shortest"
        )
    return names


def turned(methods: list[str], seed: int) -> list[str]:
    """Another method comes first in every seed: what drifts favours none."""
    at = seed % len(methods)
    return methods[at:] + methods[:at]


def budgets_of(text: str, sources: int) -> list[float]:
    """The budget of every source.

    Raises:
        CommandError: There is not one for all or one for each, in (0, 1].
    """
    found = decimals(text, ",", "--budgets")
    if len(found) not in (1, sources) or not all(0 < budget <= 1 for budget in found):
        raise CommandError(f"--budgets is {text!r} for {sources} sources; give one, or one each")
    return found * sources if len(found) == 1 else found


def bounds_of(text: str) -> tuple[float, float]:
    """Least and largest budget over the usual one.

    Raises:
        CommandError: They are not two numbers around 1.
    """
    found = decimals(text, ":", "--bounds")
    if len(found) != 2 or not 0 < found[0] <= 1 <= found[1]:
        raise CommandError(f"--bounds is {text!r}; give LOW:HIGH around 1, for example 0.5:2")
    return found[0], found[1]


def decimals(text: str, separator: str, option: str) -> list[float]:
    """Numbers of an option.

    Raises:
        CommandError: A part is no number.
    """
    try:
        return [float(part) for part in text.split(separator)]
    except ValueError as error:
        raise CommandError(f"{option} is {text!r}: {error}") from error


if __name__ == "__main__":
    sys.exit(script.main("live"))
