"""How long does a whole model take for a long prompt or video, and how much memory?

`python bench/prefill.py`, or `afbs bench prefill`: eager, Inductor and `backend="afbs"` in turn,
on random weights. Attention of random weights is nearly even, so no threshold would leave much
out: every head keeps a fixed share of its visible blocks instead (a budget), chosen by the same
kernels from the same scores. `docs/benchmarks.md` says what a row means.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afbs_compile.bench import forced, harness, script
from afbs_compile.bench.forced import Forced, Heads
from afbs_compile.bench.ledger import Ledger, Row
from afbs_compile.bench.prefill_model import Inputs, Subject, subject
from afbs_compile.commands.errors import CommandError
from afbs_compile.policy import Head
from afbs_compile.progress import Progress
from afbs_compile.report import JOURNAL

KEY = ("model", "layers", "tokens", "variant")
DENSE = ("eager", "inductor")
NO_DEVICE = (
    "there is no CUDA device here, and a GPU's whole forward is what is measured; run it on a "
    "machine with an NVIDIA GPU, or try --model tiny"
)
GIB = 1 << 30
MIN_LENGTH = 128  # shorter calls are not what is asked about
SHORT = 1 << 14  # tokens; longer calls take so long that looking a policy up does not count
Call = Callable[[], Tensor]


def keeping(share: float) -> Heads:
    """Heads that keep this share of their visible blocks; dense ones if it is 1."""
    head = Head("dense", 1.0) if share == 1 else Head("sparse", 1.0, budget=share)
    return lambda site: (head,) * site.heads


def shares(text: str) -> list[float]:
    """The shares of `--kept`.

    Raises:
        CommandError: One is no number in (0, 1].
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise CommandError(f"{error}; --kept takes numbers with commas") from error
    if not all(0 < share <= 1 for share in found):
        raise CommandError("shares are above 0 and at most 1")
    return found


def lengths(text: str) -> list[int]:
    """The lengths of `--tokens`.

    Raises:
        CommandError: One is no positive whole number.
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise CommandError(f"{error}; --tokens takes whole numbers with commas") from error
    if not all(tokens > 0 for tokens in found):
        raise CommandError("lengths are at least 1")
    return found


def first(output: Any) -> Tensor:
    """The tensor that a model's output is about."""
    found: Tensor = output[0] if isinstance(output, tuple) else output.logits
    return found


def peak_of(call: Call) -> tuple[Tensor, float | None]:
    """What a call returns, and the most memory that it had in use, in GiB."""
    if not torch.cuda.is_available():
        return call(), None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    out = call()
    torch.cuda.synchronize()
    return out, torch.cuda.max_memory_allocated() / GIB


def seconds_of(call: Call) -> float:
    """Seconds of a call, on the device where there is one."""
    if torch.cuda.is_available():
        return harness.interleaved({"one": call}, repeats=1, warm_up=0)["one"][0] / 1e3
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


@dataclass(slots=True)
class Variant:
    """One way to run the model on one input.

    Attributes:
        call: Runs it.
        ready: Makes `call` run by this variant's policy.
        row: What is known of it.
        runs: Seconds of every timed run; None if it does not fit into the memory.
        out: What it returned.
    """

    call: Call
    ready: Callable[[], None]
    row: Row
    runs: list[float] | None = field(default_factory=list)
    out: Tensor | None = None

    def start(self) -> None:
        """Compile, look at the memory and keep the output."""
        try:
            self.ready()
            self.call()
            self.out, self.row["peak_gib"] = peak_of(self.call)
        except torch.OutOfMemoryError:
            self.runs, self.row["failure"] = None, "out of memory"

    def run(self, again: bool) -> None:
        """Time one run; with `again` after one that is not timed."""
        if self.runs is None:
            return
        try:
            self.ready()
            if again:  # a policy that was put in looks its sites up in the first call
                self.call()
            self.runs.append(seconds_of(self.call))
        except torch.OutOfMemoryError:  # others hold memory by now
            self.runs, self.row["failure"] = None, "out of memory"


def variants(found: Subject, inputs: Inputs, kept: list[float], force: Forced) -> list[Variant]:
    """All ways; those with a policy share one compiled graph."""
    plain = torch.compile(found.module, dynamic=False)
    ours = torch.compile(
        found.module, backend="afbs", dynamic=False,
        options={"rule": "budget", "min_length": MIN_LENGTH, "cache_dir": force.cache_dir},
    )  # fmt: skip
    modules = {"eager": found.module, "inductor": plain}

    def row(name: str) -> Row:
        return {"variant": name, "peak_gib": None, "failure": None}

    def afbs(share: float) -> Variant:
        return Variant(
            lambda: first(ours(**inputs)),
            lambda: force.move(keeping(share)),
            row(f"afbs {share:g}"),
        )

    def dense(name: str, module: Any) -> Variant:
        return Variant(lambda: first(module(**inputs)), lambda: None, row(name))

    return [dense(*pair) for pair in modules.items()] + [afbs(share) for share in kept]


def measured(found: Subject, tokens: int, kept: list[float], repeats: int) -> list[Row]:
    """The rows of one length: medians of interleaved runs; one that does not fit says so."""
    torch._dynamo.reset()
    inputs = found.inputs(tokens)
    with torch.no_grad(), forced.forced(keeping(kept[0]), "inductor") as force:
        ways = variants(found, inputs, kept, force)
        for way in ways:
            way.start()
        # every policy that is put in reports all sites again
        sparse = len({s.name for s in JOURNAL.report().sites if s.decision == "sparse"})
        for _ in range(repeats):
            for way in ways:
                way.run(again=tokens <= SHORT)
    for way in ways:
        way.row["rewritten"] = 0 if way.row["variant"] in DENSE else sparse
        way.row["seconds"] = statistics.median(way.runs) if way.runs else None
        for base in ways[: len(DENSE)]:
            way.row[f"over_{base.row['variant']}"] = median_ratio(base.runs, way.runs)
        way.row["error"] = distance(way.out, ways[0].out)
    return [way.row for way in ways]


def median_ratio(base: list[float] | None, ours: list[float] | None) -> float | None:
    """Median of base over ours, run by run; None if one did not run."""
    if not base or not ours:
        return None
    return statistics.median(b / o for b, o in zip(base, ours, strict=True))


def distance(found: Tensor | None, wanted: Tensor | None) -> float | None:
    """How far an output is from eager's, relative; None where one is missing."""
    if found is None or wanted is None:
        return None
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def line(row: Row) -> str:
    """A row for people who wait."""
    if row["failure"]:
        return f"{row['model']} {row['tokens']} {row['variant']}: {row['failure']}"
    over = ", ".join(
        f"x{row[f'over_{base}']:.2f} over {base}" for base in DENSE if row[f"over_{base}"]
    )
    memory = "" if row["peak_gib"] is None else f", {row['peak_gib']:.1f} GiB"
    return (
        f"{row['model']} {row['tokens']} {row['variant']}: {row['seconds']:.3f} s, {over}"
        f"{memory}, error {row['error'] or 0:.1e}, {row['rewritten']} sites"
    )


def run(args: argparse.Namespace, output: Path | None) -> dict[str, Any]:
    """Measure what was asked for; written to `output` after every length.

    Raises:
        CommandError: There is no CUDA device, or an argument cannot be read.
    """
    wanted, kept = lengths(args.tokens), shares(args.kept)
    cuda = torch.cuda.is_available()
    if not cuda and not args.model.startswith("tiny"):
        raise CommandError(NO_DEVICE)
    device = torch.device("cuda" if cuda else "cpu")
    found = subject(args.model, args.layers, device, torch.bfloat16 if cuda else torch.float32)
    ledger = Ledger("prefill", KEY, output, args.seconds)
    about = {"model": args.model, "layers": args.layers, "repeats": args.repeats}
    with Progress() as progress:
        for done, tokens in enumerate(wanted):
            if ledger.has(about | {"tokens": tokens, "variant": "eager"}):
                continue
            if ledger.over():
                left = ", ".join(map(str, wanted[done:]))
                ledger.notes.append(f"left out for want of time: {left} tokens")
                break
            progress(done, len(wanted), "prefill", f"{tokens} tokens")
            for row in measured(found, tokens, kept, args.repeats):
                ledger.add(about | {"tokens": tokens} | row)
                progress.bars.console.print(
                    line(ledger.rows[-1]), markup=False, highlight=False, soft_wrap=True
                )
        progress(len(wanted), len(wanted), "prefill", "")
    ledger.write()
    return ledger.document()


def table(document: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | tokens | variant | seconds | over Inductor | over eager | peak GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        cells = [
            row["failure"] or f"{row['seconds']:.3g}",
            *(
                "–" if row[name] is None else f"{row[name]:.2f}×"
                for name in ("over_inductor", "over_eager")
            ),
            "–" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}",
        ]
        lines.append(
            f"| {row['model']} | {row['tokens']} | {row['variant']} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(script.main("prefill"))
