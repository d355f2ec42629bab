"""What does a model still find in its context when attention is sparse? Needles, keys, copies.

`python bench/retrieval.py`, or `afbs bench retrieval`. An answer is right if every one of its
tokens is the likeliest after those before it: what greedy decoding would write.
"""

import math
import statistics
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from afbs_compile import recall
from afbs_compile.bench import script, subject
from afbs_compile.bench.divergence import divergence
from afbs_compile.bench.ledger import Ledger, Row
from afbs_compile.bench.settings import Setting
from afbs_compile.bench.subject import Subject
from afbs_compile.bench.variants import Thresholds
from afbs_compile.bench.windows import Text
from afbs_compile.commands.errors import CommandError
from afbs_compile.commands.output import console, number
from afbs_compile.progress import Progress
from afbs_compile.recall import TASKS, Problem

KEY = ("model", "dtype", "text", "tokens", "setting", "calibration", "window", "task", "depth")
DEFAULTS = ("dense", "sub8@.95,.9,.8", "mean-n0@.95,.9,.8", "max_error=.05,.1,.2")


def run(args: Namespace, output: Path | None) -> dict[str, Any]:
    """Measure what was asked for and is not known yet; kept in `output` row by row.

    Raises:
        CommandError: An argument is wrong, or there is nothing to measure.
    """
    tasks = [task.strip() for task in args.tasks.split(",")]
    if unknown := [task for task in tasks if task not in TASKS]:
        raise CommandError(f"no task {', '.join(unknown)}; there are {', '.join(TASKS)}")
    name = "retrieval" if torch.cuda.is_available() else "retrieval_cpu"
    ledger = Ledger(name, KEY, output, args.seconds)
    found = subject.load(args, DEFAULTS)
    with Progress() as progress:
        for length in found.lengths:
            known = thresholds(found, tasks, length, ledger, progress)
            for text, window in turns(found):
                progress(window, max(t.windows for t in found.texts), f"{length} tokens")
                for row in measured(found, tasks, length, text, window, known, ledger):
                    ledger.add(row)
    ledger.notes += subject.refusals(found.variants)
    ledger.write()
    return ledger.document()


def turns(found: Subject) -> list[tuple[Text, int]]:
    """Windows of filler: the first of every text, then the second, and so on."""
    most = max(text.windows for text in found.texts)
    return [(text, n) for n in range(most) for text in found.texts if n < text.windows]


def thresholds(
    found: Subject, tasks: list[str], length: int, ledger: Ledger, progress: Progress
) -> dict[str, Thresholds]:
    """Of the settings that any row is missing of."""
    wanted = [s for s in found.settings if any(
        not ledger.has(slot(found, s, text, length, window, task, depth))
        for text, window in turns(found) for task in tasks for depth in recall.DEPTHS
    )]  # fmt: skip
    return subject.thresholds(found, wanted, length, ledger, progress)


def slot(
    found: Subject,
    setting: Setting,
    text: Text,
    length: int,
    window: int,
    task: str,
    depth: float,
) -> Row:
    """The fields that say what a row measures."""
    about = {"window": window, "task": task, "depth": depth}
    return found.row(setting, text, length) | about


def measured(
    found: Subject,
    tasks: list[str],
    length: int,
    text: Text,
    window: int,
    known: dict[str, Thresholds],
    ledger: Ledger,
) -> Iterator[Row]:
    """The rows that are missing of one window of filler."""
    filler = text.tokens[window * length : (window + 1) * length]
    for problem in recall.problems(tasks, found.model.tokens, filler, window):
        about = text, length, window, problem.task, problem.depth
        rows = {s.name: slot(found, s, *about) for s in found.settings if s.name in known}
        left = {name: row for name, row in rows.items() if not ledger.has(row)}
        if not left:
            continue
        if ledger.over():
            at = f"{text.name}, window {window}, {length} tokens"
            ledger.notes.append(f"left out: {at}, from {problem.task} {problem.depth:g} on")
            return
        inputs = found.model.inputs(problem.ids)
        dense = asked(found.variants.dense(inputs), problem)
        for name, row in left.items():
            try:
                logits, density = found.variants.sparse(inputs, known[name])
            except ValueError as error:
                raise CommandError(f"{found.model.name}: {error}") from error
            yield row | {"density": density} | judged(dense, asked(logits, problem), problem)


def asked(logits: Tensor, problem: Problem) -> Tensor:
    """The logits `[answer, V]` that predict the answer, apart from the rest."""
    return logits[-problem.answer - 1 : -1].clone()


def judged(dense: Tensor, sparse: Tensor, problem: Problem) -> Row:
    """Whether both are right, and how far they are apart on the answer."""
    answer = problem.ids[-problem.answer :]
    apart = divergence(dense, sparse, answer)
    return {
        "answer_tokens": problem.answer,
        "dense": right(dense, answer),
        "sparse": right(sparse, answer),
        "agreement": apart.agreement,
        "nll_dense": apart.nll_dense,
        "nll_sparse": apart.nll_sparse,
        "kl": apart.kl,
    }


def right(logits: Tensor, answer: Tensor) -> bool:
    """Whether every token of the answer `[n]` is the likeliest under `[n, V]`."""
    return bool((logits.argmax(-1).cpu() == answer).all())


def show(document: dict[str, Any]) -> None:
    """Print a row for every task and setting."""
    table = Table(title="What is found in the context")
    columns = ("model", "tokens", "task", "setting", "problems", "dense right", "sparse right",
               "kept", "agreement", "KL", "sparsity")  # fmt: skip
    for column in columns:
        table.add_column(column)
    for key, rows in grouped(document["rows"]).items():
        found = summary(rows)
        table.add_row(
            *(str(part) for part in key), str(found["problems"]), str(found["dense"]),
            str(found["sparse"]), number(found["kept"]), number(found["agreement"]),
            f"{found['kl']:.1e}", number(found["sparsity"]),
        )  # fmt: skip
    console().print(table)
    for note in document.get("notes", ()):
        console().print(note, markup=False)


def grouped(rows: list[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """The rows by model, length, task and setting."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("model", "tokens", "task", "setting"))
        found.setdefault(key, []).append(row)
    return found


def summary(rows: list[Row]) -> dict[str, Any]:
    """What is right of some problems; `kept` is the share of dense's right answers that stay.

    A model that fails a problem dense says nothing about sparsity there: `kept` counts only the
    others, and is None where there are none.
    """
    counted = [row for row in rows if row["dense"]]
    return {
        "problems": len(rows),
        "dense": len(counted),
        "sparse": sum(row["sparse"] for row in rows),
        "kept": statistics.fmean(row["sparse"] for row in counted) if counted else None,
        "agreement": statistics.fmean(row["agreement"] for row in rows),
        "kl": math.fsum(row["kl"] for row in rows) / len(rows),
        "sparsity": 1 - statistics.fmean(row["density"] for row in rows),
    }


if __name__ == "__main__":
    sys.exit(script.main("retrieval"))
