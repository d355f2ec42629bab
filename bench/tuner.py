"""How good is which strategy, and what does it cost? All of them on the same layers of a model.

Run: python bench/tuner.py --model DIR --text FILE --unseen FILE (or `afbs bench tuner`)
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from afbs_compile.bench import harness, script, tuner_show
from afbs_compile.bench.tuner_sites import SHORT, Sites, Subject, subject
from afbs_compile.commands.errors import CommandError
from afbs_compile.demo import model as models
from afbs_compile.demo import text as texts
from afbs_compile.options import STRATEGIES, parse
from afbs_compile.progress import OnProgress, Progress
from afbs_compile.tuner.landscape import Landscape, landscape_of
from afbs_compile.tuner.objective import FULL, Fidelity, QueryBlocks
from afbs_compile.tuner.prior import Prior
from afbs_compile.tuner.strategy import Found, Goal
from afbs_compile.tuner.trace import Trace, Traced
from afbs_compile.tuner.tune import SiteResult, tune

RANDOM = ("afbs-bo", "afbs-bo-paper", "random")  # strategies that a seed changes
MARGIN = 1.1  # by how much an unseen window may be over max_error at most
NOTES = (
    "evaluations and high_evaluations: points measured, mean over the heads; a head that is done "
    "and measured again for the others' sake counts once",
    "cost_dense_passes: of one window, mean over the tuned layers; every lock-step call counts "
    "for all heads, and the probe layers' profiles are shared among the tuned layers alone",
    "gap: sparsity lost to the exhaustive optimum over (u, lambda); gap_tau: over u alone",
    "no search validates on the unseen windows; they only say what is over the cap",
)
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One search: with `probes`, AFBS-BO has a prior and searches lambda."""

    strategy: str
    probes: bool
    max_error: float
    documents: int
    seed: int

    @property
    def low(self) -> Fidelity:
        """Short sequences for the paper's recipe, query blocks for the others."""
        return SHORT if self.strategy == "afbs-bo-paper" else QueryBlocks(1 / 8)


def cases(
    strategies: Sequence[str], errors: Sequence[float], documents: Sequence[int], seeds: int
) -> list[Case]:
    """All searches; those that know no chance run once."""
    return [
        Case(strategy, probes, error, count, seed)
        for count in documents
        for error in errors
        for strategy in strategies
        for probes in ((False, True) if strategy == "afbs-bo" else (False,))
        for seed in range(seeds if strategy in RANDOM else 1)
    ]


def rows(subject: Subject, wanted: Sequence[Case], on_progress: OnProgress) -> Iterator[Row]:
    """A row for every search."""
    optima: dict[int, dict[str, Landscape]] = {}
    for done, case in enumerate(wanted):
        on_progress(done, len(wanted), "search", f"{case.strategy} {case.max_error:g}")
        sites = subject.calibration[case.documents]
        if case.documents not in optima:
            optima[case.documents] = {n: landscape_of(site, FULL) for n, site in sites.items()}
        yield row(subject, case, optima[case.documents])
    on_progress(len(wanted), len(wanted), "search", "")


def row(subject: Subject, case: Case, optima: dict[str, Landscape]) -> Row:
    """Search, count, and look at unseen windows."""
    sites, trace = subject.calibration[case.documents], Trace()
    goal = Goal(case.max_error, seed=case.seed)
    begun = time.perf_counter()
    prior = made(subject.probes[case.documents], goal, trace) if case.probes else None
    probe_cost = trace.cost
    found = tune(sites, goal, case.strategy, low=case.low, prior=prior, trace=trace)
    seconds = time.perf_counter() - begun
    heads = sum(site.heads for site in sites.values())
    best, best_tau = (
        mean_sparsity([table.best(np.full(len(table.error), goal.cap)) for table in tables])
        for tables in (list(optima.values()), [off(table) for table in optima.values()])
    )
    over = unseen_over(subject.unseen, found.sites, case.max_error)
    return {
        "strategy": case.strategy,
        "probes": len(subject.probes[case.documents]) if case.probes else 0,
        "model": subject.model,
        "tokens": subject.tokens,
        "documents": case.documents,
        "layers": len(sites),
        "heads": heads,
        "max_error": case.max_error,
        "seed": case.seed,
        "evaluations": trace.points() / heads,
        "high_evaluations": trace.points(FULL) / heads,
        "cost_dense_passes": trace.cost / len(sites),
        "probe_cost_dense_passes": probe_cost / len(sites),
        "seconds": seconds,
        "sparsity": 1.0 - found.mean_density,
        "gap": best - (1.0 - found.mean_density),
        "gap_tau": best_tau - (1.0 - found.mean_density),
        "heldout_over": float(np.mean(over > 1.0)),
        "heldout_over_1_1": float(np.mean(over > MARGIN)),
    }


def made(probes: Sites, goal: Goal, trace: Trace) -> Prior:
    """The prior of the probe layers; their profiles are charged."""
    tables = [landscape_of(Traced(p, trace, name, "probe"), FULL) for name, p in probes.items()]
    return Prior.of(tables, goal.max_error)


def off(table: Landscape) -> Landscape:
    """The same without lambda."""
    return Landscape(table.lambdas[:1], table.error[:, :1], table.density[:, :1])


def mean_sparsity(found: Sequence[Found]) -> float:
    """Over all heads; infeasible ones are dense."""
    return float(np.mean(np.concatenate([f.feasible * (1.0 - f.density) for f in found])))


def unseen_over(unseen: Sites, found: dict[str, SiteResult], max_error: float) -> np.ndarray:
    """Error on unseen windows as a multiple of the cap, of every head; 0 where dense."""
    shares = []
    for name, result in found.items():
        measured = unseen[name](result.u, FULL, result.level)
        shares.append(np.where(result.dense, 0.0, measured.error / max_error))
    return np.concatenate(shares)


def numbers(text: str, option: str, kind: type) -> list[Any]:
    """Positive numbers with commas."""
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(number > 0 for number in found):
        raise CommandError(f"{option} is {text!r}; give numbers above 0, with commas")
    return found


def measure(args: argparse.Namespace, on_progress: OnProgress) -> list[Row]:
    """Load, profile, search.

    Raises:
        CommandError: An argument, the model or a text is none.
    """
    strategies = [name.strip() for name in args.strategies.split(",")]
    if unknown := [name for name in strategies if name not in STRATEGIES]:
        raise CommandError(f"no strategy {', '.join(unknown)}; choose of {', '.join(STRATEGIES)}")
    documents = numbers(args.documents, "--documents", int)
    errors = numbers(args.max_errors, "--max-errors", float)
    wanted = cases(strategies, errors, documents, max(1, args.seeds))
    model = models.from_folder(args.model) if args.model else models.smollm2(parse().cache_folder)
    seen = model.tokens(texts.read(args.text) if args.text else texts.default())
    if args.unseen:
        windows = texts.windows(seen, args.tokens, max(documents))
        windows += texts.windows(model.tokens(texts.read(args.unseen)), args.tokens, 1)
    else:
        windows = texts.windows(seen, args.tokens, max(documents) + 1)
    return list(rows(subject(model, windows, documents, args.layers, on_progress),
                     wanted, on_progress))  # fmt: skip


def run(args: argparse.Namespace, output: Path | None) -> dict[str, Any]:
    """Measure, and write to `output` and to the plot's file where one is given."""
    with Progress() as progress:
        document = harness.document("tuner", measure(args, progress), NOTES)
    if output:
        harness.write(document, output)
    if args.plot:
        tuner_show.draw(document, args.plot)
    return document


if __name__ == "__main__":
    sys.exit(script.main("tuner"))
