"""Attention on a GPU against cuDNN, FlashAttention-2 and -4, and FlexAttention.

`python bench/attention.py [--quick]`, or `afbs bench attention`. `docs/benchmarks.md` says what a
row means.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from afbs_compile.bench import cases, harness, problems, script, training
from afbs_compile.bench.baselines import QUICK, THOROUGH, Flex, Notes
from afbs_compile.bench.cases import Bench, Row
from afbs_compile.bench.checks import WrongResult
from afbs_compile.bench.problems import Problem, Shape
from afbs_compile.cli import BENCH_CASES
from afbs_compile.commands.errors import CommandError
from afbs_compile.progress import Progress

NO_DEVICE = (
    "there is no CUDA device here, and the GPU's kernels are what is measured; run it on a "
    "machine with an NVIDIA GPU, and `afbs doctor` there if this is one"
)
MASKS = (False, True)
LENGTHS = (8192, 16384, 32768)
SELECTION_LENGTHS = (*LENGTHS, 65536)
Case = Callable[[Bench, Problem], list[Row]]
FUNCTIONS: dict[str, Case] = {
    "forward": cases.forward,
    "forward_coarse": cases.forward_coarse,
    "selection": cases.selection,
    "whole_op": cases.whole_op,
    "backward": training.backward,
    "forward_backward": training.forward_backward,
    "host": cases.host,
}


@dataclass(frozen=True, slots=True)
class Step:
    """One case of one shape."""

    case: str
    shape: Shape
    kind: str = "randn"
    kept: tuple[float, ...] = ()

    def __str__(self) -> str:
        """For people."""
        return f"{self.case} {self.shape}{'' if self.kind == 'randn' else f' {self.kind}'}"


def plan(wanted: list[str], shapes: list[Shape] | None, quick: bool) -> list[Step]:
    """All steps, those of one shape together, what may disturb others last."""
    masked = [Shape(n, causal) for n in LENGTHS for causal in MASKS]
    every = shapes or masked + [Shape(16384, causal, 64) for causal in MASKS]
    scored = shapes or [Shape(n, causal) for n in SELECTION_LENGTHS for causal in MASKS]
    trained = shapes or [shape for shape in masked if shape.length <= 16384]
    if quick and not shapes:
        every = [shape for shape in every if shape.length <= 16384 and shape.head_dim == 128]
        scored = every
        trained = [shape for shape in every if shape.length == 8192]
    kept = (1.0, 0.25) if quick else (1.0, 0.5, 0.25, 0.1)
    few = kept[1:] if quick else (0.25, 0.1)
    steps = []
    for shape in every:
        steps.append(Step("forward", shape, kept=kept))
        steps.append(Step("whole_op", shape, kept=(1.0, *few)))
        steps.append(Step("whole_op", shape, "clustered", few))
        if shape.length == min(s.length for s in every):
            steps.append(Step("host", shape))
    steps += [Step("selection", shape) for shape in scored]
    for shape in trained:
        steps.append(Step("backward", shape, kept=few))
        steps.append(Step("forward_backward", shape, kept=few))
    steps += [Step("forward_coarse", shape, kept=few) for shape in every]
    return [step for step in steps if step.case.removesuffix("_coarse") in wanted]


def measured(
    steps: list[Step], bench: Bench, seconds: float | None, on_progress: Callable[..., Any]
) -> Iterator[list[Row]]:
    """The rows of every step; none is begun after `seconds`, and what is left out is noted."""
    begun = time.monotonic()
    problem: Problem | None = None
    for done, step in enumerate(steps):
        if seconds is not None and time.monotonic() - begun > seconds:
            names = ", ".join(str(left) for left in steps[done:])
            bench.notes(f"left out after {seconds:g} s: {names}")
            break
        on_progress(done, len(steps), "attention", str(step))
        if problem is None or (problem.shape, problem.kind) != (step.shape, step.kind):
            problem = None  # before the next one takes memory
            problem = problems.make(step.shape, step.kind)
        try:
            yield FUNCTIONS[step.case](dataclasses.replace(bench, kept=step.kept), problem)
        except torch.OutOfMemoryError:
            bench.notes(f"{step} left out: the device's memory is too small")
    on_progress(len(steps), len(steps), "attention", "")


def line(row: Row) -> str:
    """A row for people who wait."""
    mask = "causal" if row["causal"] else "full"
    name = f"d{row['head_dim']} {row['length']} {mask} {row['case']} {row['inputs']}"
    if row["case"] == "host":
        return f"{name} {row['variant']}: {row['host_us']:.0f} us"
    marks = ("cudnn", "fa2", "flex", "fa4")
    over = " ".join(f"{m} x{v:.2f}" for m in marks if (v := row[f"ratio_{m}"]) is not None)
    details = [row["kernel"], row["selector"], row["granularity"], f"kept {row['kept']:.3f}"]
    told = " ".join(str(detail) for detail in details if detail)
    return f"{name} {told}: {row['ours_ms']:.3f} ms, {over}"


def run(args: argparse.Namespace, output: Path | None) -> dict[str, Any]:
    """Measure what was asked for; written to `output` after every step.

    Raises:
        CommandError: There is no CUDA device, an argument is no shape or case, or a kernel
            computes something wrong.
    """
    steps = plan(wanted(args.case), shapes(args.shapes), args.quick)
    if not torch.cuda.is_available():
        raise CommandError(NO_DEVICE)
    rows: list[Row] = []
    with Progress() as progress:

        def tell(text: str) -> None:
            progress.bars.console.print(text, markup=False, highlight=False, soft_wrap=True)

        notes = Notes(tell=tell)
        flex = Flex(QUICK if args.quick else THOROUGH, notes)
        bench = Bench(flex, notes, repeats=7 if args.quick else 9, portable=not args.quick)
        try:
            for found in measured(steps, bench, args.seconds, progress):
                rows += found
                for row in found:
                    tell(line(row))
                if output:
                    harness.write(harness.document("attention", rows, notes.told), output)
        except WrongResult as error:
            raise CommandError(f"{error}; please report it with this command") from error
    document = harness.document("attention", rows, notes.told)
    if output:
        harness.write(document, output)
    return document


def wanted(text: str | None) -> list[str]:
    """The cases of `--case`; all by default."""
    names = list(BENCH_CASES) if text is None else [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in BENCH_CASES]:
        raise CommandError(f"no case {', '.join(unknown)}; there are {', '.join(BENCH_CASES)}")
    return names


def shapes(text: str | None) -> list[Shape] | None:
    """The shapes of `--shapes`, if they were given."""
    try:
        return [Shape.parse(part) for part in text.split(",")] if text else None
    except ValueError as error:
        raise CommandError(str(error)) from error


if __name__ == "__main__":
    sys.exit(script.main("attention"))
