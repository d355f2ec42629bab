"""What does sparsity cost a language model? Perplexity and KL by setting, on windows of texts.

`python bench/quality.py`, or `afbs bench quality`. `docs/benchmarks.md` says what a row means.
"""

import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from afbs_compile.bench import script, settings, subject, windows
from afbs_compile.bench.divergence import divergence
from afbs_compile.bench.ledger import Ledger, Row
from afbs_compile.bench.settings import Setting
from afbs_compile.bench.subject import Subject
from afbs_compile.bench.variants import Thresholds
from afbs_compile.bench.windows import Text
from afbs_compile.commands.errors import CommandError
from afbs_compile.progress import OnProgress, Progress

KEY = ("model", "dtype", "text", "tokens", "setting", "calibration", "window")


@dataclass(frozen=True, slots=True)
class Step:
    """One window of one text, and the settings that it is still to be read under."""

    text: Text
    window: int
    settings: list[Setting]


def name() -> str:
    """Of the result file: figures of a GPU and of a processor stand side by side."""
    return "quality" if torch.cuda.is_available() else "quality_cpu"


def run(args: Namespace, output: Path | None) -> dict[str, Any]:
    """Measure what was asked for and is not known yet; kept in `output` row by row.

    Raises:
        CommandError: An argument is wrong, or there is nothing to measure.
    """
    ledger = Ledger(name(), KEY, output, args.seconds)
    found = subject.load(args, settings.DEFAULTS)
    with Progress() as progress:

        def tell(text: str) -> None:
            progress.bars.console.print(text, markup=False, highlight=False, soft_wrap=True)

        for length in found.lengths:
            for row in measured(found, length, ledger, progress):
                ledger.add(row)
                tell(line(row))
    ledger.notes += subject.refusals(found.variants)
    ledger.write()
    return ledger.document()


def measured(
    found: Subject, length: int, ledger: Ledger, on_progress: OnProgress
) -> Iterator[Row]:
    """The rows of one length that are missing, a window of every text after the other."""
    steps = missing(found, length, ledger)
    wanted = {setting.name: setting for step in steps for setting in step.settings}
    if not steps:
        return
    known = subject.thresholds(found, wanted.values(), length, ledger, on_progress)
    for done, step in enumerate(steps):
        if ledger.over():
            left = sum(len(s.settings) for s in steps[done:])
            ledger.notes.append(f"left out for want of time: {left} rows of {length} tokens")
            return
        at = f"{step.text.name}, window {step.window}"
        on_progress(done, len(steps), f"windows, {length} tokens", at)
        yield from read(found, length, step, known, ledger)
    on_progress(len(steps), len(steps), f"windows, {length} tokens", "")


def missing(found: Subject, length: int, ledger: Ledger) -> list[Step]:
    """What is still to be measured at a length: first windows of all texts first."""
    steps = []
    for window in range(max(text.windows for text in found.texts)):
        for text in found.texts:
            if window < text.windows:
                left = [
                    setting
                    for setting in found.settings
                    if not ledger.has(found.row(setting, text, length) | {"window": window})
                ]
                steps += [Step(text, window, left)] * bool(left)
    return steps


def read(
    found: Subject, length: int, step: Step, known: dict[str, Thresholds], ledger: Ledger
) -> Iterator[Row]:
    """The rows of one window: dense once, then every setting."""
    tokens = windows.measured(step.text, length)[step.window]
    inputs = found.model.inputs(tokens)
    dense = found.variants.dense(inputs)[:-1]
    for setting in step.settings:
        if setting.name not in known:
            continue
        if ledger.over():
            at = f"{step.text.name}, window {step.window}, {length} tokens"
            ledger.notes.append(f"left out for want of time: {setting.name} and later, {at}")
            return
        try:
            sparse, density = found.variants.sparse(inputs, known[setting.name])
        except ValueError as error:
            raise CommandError(f"{found.model.name}: {error}") from error
        apart = divergence(dense, sparse[:-1], tokens[1:])
        yield found.row(setting, step.text, length) | {
            "window": step.window,
            "density": density,
            "perplexity_dense": apart.perplexity_dense,
            "perplexity_sparse": apart.perplexity_sparse,
            "kl": apart.kl,
            "agreement": apart.agreement,
        }


def line(row: Row) -> str:
    """A row for people who wait."""
    change = 100 * (row["perplexity_sparse"] / row["perplexity_dense"] - 1)
    return (
        f"{row['text']} {row['window']} {row['tokens']} {row['setting']}: density "
        f"{row['density']:.3f}, perplexity {row['perplexity_dense']:.3f} {change:+.2f} %, "
        f"KL {row['kl']:.2e}"
    )


if __name__ == "__main__":
    sys.exit(script.main("quality"))
