"""Which way to choose sliding-window heads costs least? BOSCH and the others on unseen documents.

Run: python bench/hybrid.py (or `afbs bench hybrid`). A search reads windows from a text's end and
questions about them; scores are those of other windows and questions.
"""

import math
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from afbs_compile.bench import hybrid_show, script, windows
from afbs_compile.bench.hybrid_setup import Setup, setup
from afbs_compile.bench.ledger import Ledger, Row
from afbs_compile.commands.errors import CommandError
from afbs_compile.commands.hybridize import load
from afbs_compile.hybrid_losses import Losses
from afbs_compile.hybrid_objective import FIGURES
from afbs_compile.hybrid_subject import BEST
from afbs_compile.profiling import Clock
from afbs_compile.progress import OnProgress, Progress
from afbs_compile.rankings import RANKINGS
from afbs_compile.tuner.bosch import Found, Search
from afbs_compile.tuner.heads import Bits, Impossible, text
from afbs_compile.tuner.hybrid_baselines import CHEAP, METHODS, SEEDED, Question

BEST_OF = f"best of {len(RANKINGS)}"
KEY = ("model", "dtype", "texts", "tokens", "window", "sink", "ratio", "method", "budget", "seed",
       "calibration", "task")  # fmt: skip


def run(args: Namespace, output: Path | None) -> dict[str, Any]:
    """Measure what was asked for and is not known yet; kept in `output` row by row.

    Raises:
        CommandError: An argument is wrong, or there is nothing to measure.
    """
    methods = list(METHODS) if args.methods is None else args.methods.split(",")
    if unknown := [name for name in methods if name not in METHODS]:
        raise CommandError(f"no method {', '.join(unknown)}; there are {', '.join(METHODS)}")
    if args.documents < 1 or args.unseen < 1 or args.held < 0 or args.sharing < 1:
        raise CommandError("--documents, --unseen and --sharing are at least 1, --held at least 0")
    name = "hybrid" if torch.cuda.is_available() else "hybrid_cpu"
    ledger = Ledger(name, KEY, output, args.seconds)
    measure(args, methods, ledger)
    ledger.write()
    document = ledger.document()
    if args.plot:
        hybrid_show.draw(document, args.plot)
    return document


def measure(args: Namespace, methods: list[str], ledger: Ledger) -> None:
    """Measure what is missing."""
    model = load(args)
    model = replace(model, name=args.name) if args.name else model
    texts = windows.read(args.text, str(math.ceil(args.unseen / max(1, len(args.text)))), model)
    with Progress() as progress:
        for tokens in windows.numbers(args.tokens, "--tokens"):
            for window in windows.numbers(args.windows, "--windows"):
                ready = setup(model, texts, args, tokens, window)
                with ExitStack() as stores:
                    for one in ready.subjects():
                        stores.enter_context(one.store)
                    for row in rows(ready, methods, ledger, progress):
                        ledger.add(row)


def rows(
    ready: Setup, methods: list[str], ledger: Ledger, on_progress: OnProgress
) -> Iterator[Row]:
    """The rows that are missing."""
    wanted = planned(methods, ready.args)
    for done, (ratio, method, seed) in enumerate(wanted):
        on_progress(done, len(wanted), "methods", f"{method} {ratio:g}, seed {seed}")
        about = slot(ready, ratio, method, seed)
        tasks = ready.args.measure.split(",")
        if all(ledger.has(about | {"task": task}) for task in tasks):
            continue
        if ledger.over():
            ledger.notes.append(f"left out: {method} at {ratio:g}, seed {seed}")
            continue
        begun = time.perf_counter()
        try:
            left = remaining(ledger)
            found, losses = chosen(ready, ratio, method, seed, on_progress, left)
        except Impossible as error:
            ledger.notes.append(f"{method} at {ratio:g}: {error}")
            continue
        if not found.complete:
            ledger.notes.append(f"not finished in time: {method} at {ratio:g}, seed {seed}")
            continue
        cost = {"seconds": time.perf_counter() - begun, "evaluations": found.evaluations}
        for row in judged(ready, found.bits, losses.figures([found.bits])[0], losses):
            yield about | cost | row
    on_progress(len(wanted), len(wanted), "methods", "")


def remaining(ledger: Ledger) -> float | None:
    """Seconds until the time is up; None if it never is."""
    if ledger.seconds is None:
        return None
    return max(0.0, ledger.seconds - (time.monotonic() - ledger.begun))


def planned(methods: list[str], args: Namespace) -> list[tuple[float, str, int]]:
    """Ratio, method and seed: what needs no search, then BOSCH, then its rivals seed by seed.

    So a run that is out of time leaves out seeds of rivals, not BOSCH's or a ratio.
    """
    wanted = [
        (float(ratio), method, seed)
        for method in methods
        for seed in range(args.seeds if method in SEEDED else 1)
        for ratio in args.ratios.split(",")
    ]
    return sorted(wanted, key=lambda one: (one[1] not in CHEAP, one[1] != "bosch", one[2]))


def slot(ready: Setup, ratio: float, method: str, seed: int) -> Row:
    """The fields that say what a row measures."""
    args = ready.args
    return {
        "method": method,
        "model": ready.model.name,
        "dtype": str(next(ready.model.module.parameters()).dtype).removeprefix("torch."),
        "texts": ",".join(split.partition("=")[0] for split in args.text) or windows.DEFAULT_TEXT,
        "tokens": ready.tokens,
        "window": ready.window,
        "sink": args.sink,
        "ratio": ratio,
        "budget": args.budget,
        "seed": seed,
        "calibration": f"{args.tasks} x{args.documents}+{args.held}, {args.objective}, "
        f"{BEST_OF if args.prior == BEST else args.prior}, {hybrid_show.MEAN}",
    }


def chosen(
    ready: Setup,
    ratio: float,
    method: str,
    seed: int,
    on_progress: OnProgress,
    seconds: float | None = None,
) -> tuple[Found, Losses]:
    """What a method chooses within so many seconds."""
    wishes = ready.wishes(ratio, seed)
    losses = ready.seen.losses(wishes)
    held = ready.held.losses(wishes) if ready.held else None
    both = [known for known in (losses, held) if known]
    for known in both:
        known.anchors()
        known.clock = Clock.of(seconds)
    priors = ready.seen.priors(wishes)

    def on_best(done: int, budget: int, stage: str, best: float) -> None:
        on_progress(done, budget, f"{method} {ratio:g} seed {seed}", f"{stage} {best:.4f}")

    def ranking(name: str) -> np.ndarray:
        return ready.seen.prior(name, wishes)

    def question() -> Question:
        alone = [replace(known) for known in both]  # as compared as they are now
        wanted = Search(
            ready.seen.evaluator.layout, ratio, wishes.budget, priors[0] if priors else None, seed,
            wishes.solver, others=priors[1:], foresight=ready.seen.foresight(wishes, alone[0]),
        )  # fmt: skip
        return Question(alone[0], wanted, ranking, on_best, alone[1] if held else None)

    by_mean = question()
    for known in both:
        ready.seen.compared(known, priors, wishes)
    with threadpool_limits(1, user_api="blas"):
        found = METHODS[method](replace(question(), geometric=by_mean))
    losses.clock = Clock(None)  # what is chosen is judged
    return found, losses


def judged(ready: Setup, bits: Bits, seen: np.ndarray, losses: Losses) -> Iterator[Row]:
    """A row for every task, from documents that no search has read; `score`: larger is better.

    For text it is −KL, for questions the mean log-probability of the right tokens.
    """
    evaluator = ready.unseen.evaluator
    tasks = [call.sample.task for call in evaluator.calls]
    unseen = Losses(evaluator, evaluator.layout.size, tasks, ready.unseen.store)
    none, ours = unseen.figures([np.zeros_like(bits), bits])
    for task in dict.fromkeys(tasks):
        calls = [n for n, name in enumerate(tasks) if name == task]
        at = dict(zip(FIGURES, ours[calls].mean(0).tolist(), strict=True))
        dense = dict(zip(FIGURES, none[calls].mean(0).tolist(), strict=True))
        yield {
            "task": task,
            "searched": task in ready.args.tasks.split(","),
            "score": -at["kl"] if task == "text" else -at["surprise"],
            **at,
            "surprise_dense": dense["surprise"],
            "right_dense": dense["right"],
            "loss_searched": losses.cost(seen),
            "by_task_searched": losses.by_task(seen),
            "heads": text(bits),
        }


if __name__ == "__main__":
    sys.exit(script.main("hybrid"))
