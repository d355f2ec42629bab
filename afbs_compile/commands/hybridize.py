"""`afbs hybridize`: give the heads of a model that can live with it a sliding window."""

from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from afbs_compile.commands.errors import CommandError
from afbs_compile.commands.output import console, emit_json, number
from afbs_compile.commands.picture import write_heatmap
from afbs_compile.commands.tune import write
from afbs_compile.policy import Policy, Tuning
from afbs_compile.summary import in_order

MIB = 1 << 20


def run(args: Namespace) -> int:
    """Search on text and questions about it; the policy goes to a file if asked."""
    import afbs_compile
    from afbs_compile import executors, hybrid_calibration, options
    from afbs_compile.demo import text
    from afbs_compile.hybrid_policy import forecast

    thresholds = Policy.read(args.policy) if args.policy else None
    if args.documents < 1:
        raise CommandError(f"--documents is {args.documents}; give at least 1")
    if args.executor == "torchrun":
        executors.on_own_device(options.torchrun_local_rank())
    model = load(args)
    tokens = model.tokens(text.read(args.text) if args.text else text.default())
    documents = text.windows(tokens, args.tokens, args.documents)
    try:
        asked = hybrid_calibration.samples(
            model, documents, args.tasks.split(","), args.window, args.seed
        )
        policy = afbs_compile.hybridize(
            model.module, asked, ratio=args.ratio, thresholds=thresholds, **wishes(args)
        )
    except ValueError as error:
        raise CommandError(f"{model.name} cannot be made hybrid: {error}") from error
    if args.executor == "torchrun" and options.torchrun_rank():
        return 0  # rank 0 speaks for all
    if args.out:
        write(policy, args.out)
    tuning = policy.tunings[-1]
    if args.heatmap:
        write_heatmap(tuning, args.heatmap, f"{model.name}: heads with a window are dark")
    saved = forecast(tuning, args.forecast)
    if args.json:
        emit_json(told(policy, tuning, saved, args.out))
    else:
        show(tuning, saved, args.out)
    return 0


def load(args: Namespace) -> Any:
    """The model of the command line."""
    from afbs_compile.demo import model
    from afbs_compile.options import default_cache_dir

    dtype = getattr(torch, args.dtype) if args.dtype else None
    if args.model == "smollm2":
        return model.smollm2(args.cache_dir or default_cache_dir(), dtype)
    return model.from_folder(Path(args.model), dtype)


def module(args: Namespace) -> Any:
    """The model of a helper."""
    return load(args).module


def wishes(args: Namespace) -> dict[str, Any]:
    """Options of `afbs_compile.hybridize`; helpers load the model themselves."""
    names = ("window", "sink", "budget", "objective", "prior", "solver", "seed", "seconds",
             "cache_dir", "executor", "workers")  # fmt: skip
    given = {name: getattr(args, name) for name in names}
    return given | {"loader": partial(module, args) if args.executor else None}


def told(
    policy: Policy, tuning: Tuning, saved: dict[str, float], path: Path | None
) -> dict[str, Any]:
    """The result as one JSON object."""
    return {
        "model": policy.model,
        "complete": tuning.complete,
        "evaluations": tuning.evaluations,
        "cost_dense_passes": tuning.cost_dense_passes,
        "seconds": tuning.seconds,
        "kl": tuning.kl,
        "windowed": {site.name: groups(site) for site in in_order(tuning)},
        "forecast": saved,
        "policy_path": str(path) if path else None,
    }


def groups(site: Any) -> list[bool]:
    """Which KV groups of a site are windowed."""
    return [head.mode == "window" for head in site.heads[:: len(site.heads) // site.kv_heads]]


def show(tuning: Tuning, saved: dict[str, float], path: Path | None) -> None:
    """The heads by layer, and what they will save."""
    output = console()
    table = Table("attention site", "KV groups (■ window, · global)")
    for site in in_order(tuning):
        table.add_row(site.name, "".join("■" if bit else "·" for bit in groups(site)))
    output.print(table)
    if not tuning.complete:
        output.print("stopped early; the same command goes on", markup=False)
    output.print(
        f"{tuning.evaluations} choices in {tuning.seconds:.0f} s "
        f"({tuning.cost_dense_passes:.0f} dense passes); KL {number(tuning.kl, 4)} at worst",
        markup=False,
    )
    output.print(
        f"forecast at {saved['length']:.0f} tokens, counted: KV cache "
        f"{saved['kv_bytes'] / MIB:.0f} of {saved['kv_bytes_dense'] / MIB:.0f} MiB a sequence, "
        f"attention reads {saved['decode_reads']:.0%} of it for a token and visits "
        f"{saved['prefill_blocks']:.0%} of the blocks of a prompt",
        markup=False,
    )
    if path:
        use = f'torch.compile(model, backend="afbs", options={{"policy": "{path}"}})'
        output.print(f"use it: {use}, or HybridCache.from_policy", markup=False)
