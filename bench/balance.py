"""What do balanced batches and budgets gain? The real sampler and controller, simulated clusters.

Run: python bench/balance.py (or `afbs bench balance`); seconds to minutes, on a CPU.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from afbs_compile.bench import balance_show, harness, script
from afbs_compile.bench.balance_run import BATCHES, Case, cases, row_of, simulate
from afbs_compile.bench.balance_world import MIXTURES, MODELS, SAMPLE_SCATTER, cluster, data
from afbs_compile.commands.errors import CommandError
from afbs_compile.progress import OnProgress, Progress

PAPER_SEEDS = 10
PAPER_STEPS = 100
CHOICES = {
    "--mixtures": tuple(MIXTURES),
    "--densities": ("known", "content"),
    "--sync": ("step", "micro"),
}
NOTES = (
    "simulated: sampler and controller are real, the clock is not; communication costs nothing, "
    "linear layers are assumed to reach 400 TFLOP/s, replicas differ by 1 %, clocks err by 2 %",
    "speedup_random and speedup_sorted: step time of the same seed with random batches, and with "
    "batches sorted by length, over this one; larger is better",
    "kept_ratio: blocks kept over blocks kept at base budgets; quality is not simulated",
    f"densities content: log-normal, 0.35 by source and {SAMPLE_SCATTER} by sample",
    "case ablation: 2 replicas of 4 pipeline stages, 16 samples a step, lengths as ChatQA2's are "
    "described, 32 blocks of 256 tokens: the setting of SparseBalance's table, as far as known",
)
Row = dict[str, Any]


def steps_for(ranks: int, given: int | None) -> int:
    """Global batches of an epoch."""
    return given or max(4, min(24, 768 // ranks))


def grid(args: argparse.Namespace, on_progress: OnProgress) -> Iterator[Row]:
    """All methods on all clusters and mixtures.

    Raises:
        CommandError: An argument names nothing.
    """
    ranks = [int(part) for part in positive(args.ranks, "--ranks")]
    bounds = [bound(part) for part in args.bounds.split(",")]
    mixtures, densities, syncs = (
        listed(getattr(args, option[2:]), option, known) for option, known in CHOICES.items()
    )
    model = MODELS.get(args.model)
    if model is None:
        raise CommandError(f"no model {args.model!r}; choose of {', '.join(MODELS)}")
    worlds = list(itertools.product(mixtures, densities, ranks, range(max(1, args.seeds))))
    for done, (mixture, density, count, seed) in enumerate(worlds):
        on_progress(done, len(worlds), "simulate", f"{mixture}, {count} ranks")
        known = data(mixture, 8 * count * steps_for(count, args.steps), model, seed, density)
        machines = cluster(count, model, seed)
        about = {"case": "grid", "model": args.model, "mixture": mixture, "densities": density,
                 "ranks": count}  # fmt: skip
        for case in cases(syncs, bounds, seed):
            yield about | row_of(case, simulate(case, known, machines))
    on_progress(len(worlds), len(worlds), "simulate", "")


def ablation(seeds: int = PAPER_SEEDS, steps: int = PAPER_STEPS) -> Iterator[Row]:
    """SparseBalance's table: 2 replicas, 4 stages, 2 samples a micro-batch, 16 a step."""
    model = MODELS["qwen2.5-3b"]
    base = Case("random", micro_batches=4, batch_size=2)
    for seed in range(seeds):
        known = data("two-humps", 16 * steps, model, seed)
        machines = cluster(2, model, seed, stages=4)
        about = {"case": "ablation", "model": "qwen2.5-3b", "mixture": "two-humps",
                 "densities": "known", "ranks": 2}  # fmt: skip
        for method in BATCHES:
            case = replace(base, method=method, seed=seed)
            yield about | row_of(case, simulate(case, known, machines))


def compared(rows: list[Row]) -> list[Row]:
    """The rows with what they gain over random and sorted batches of the same world and seed."""
    world = ("case", "mixture", "densities", "ranks", "sync", "seed")
    bases = {
        (method, *(row[name] for name in world)): row["step_ms"]
        for method in ("random", "sorted")
        for row in rows
        if row["method"] == method
    }
    found = [
        row
        | {
            f"speedup_{method}": bases[method, *(row[n] for n in world)] / row["step_ms"]
            for method in ("random", "sorted")
        }
        for row in rows
    ]
    return [{name: short(value) for name, value in row.items()} for row in found]


def short(value: Any) -> Any:
    """A float with five digits that count."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def listed(text: str, option: str, known: tuple[str, ...]) -> list[str]:
    """Names with commas.

    Raises:
        CommandError: One is not known.
    """
    names = [part.strip() for part in text.split(",")]
    if wrong := [name for name in names if name not in known]:
        raise CommandError(f"{option} has no {', '.join(wrong)}; choose of {', '.join(known)}")
    return names


def positive(text: str, option: str) -> list[float]:
    """Numbers above 0 with commas.

    Raises:
        CommandError: One is none.
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) <= 0:
        raise CommandError(f"{option} is {text!r}; give numbers above 0, with commas")
    return found


def bound(text: str) -> tuple[float, float]:
    """LEAST:MOST as two numbers.

    Raises:
        CommandError: They are none, or on the wrong sides of 1.
    """
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError:
        low = high = 0.0
    if not 0 < low <= 1 <= high:
        raise CommandError(f"--bounds has {text!r}; give LEAST:MOST around 1, such as 0.75:1.5")
    return low, high


def run(args: argparse.Namespace, output: Path | None) -> dict[str, Any]:
    """Simulate, and write to `output` and to the plot's file where one is given."""
    with Progress() as progress:
        rows = compared([*grid(args, progress), *ablation(max(1, args.seeds) + 2)])
    document = harness.document("balance", rows, NOTES)
    if output:
        harness.write(document, output)
    if args.plot:
        balance_show.draw(document, args.plot)
    return document


if __name__ == "__main__":
    sys.exit(script.main("balance"))
