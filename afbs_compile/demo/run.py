"""The demo from end to end: load, compile and tune on one window, measure on another."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from afbs_compile.commands.errors import CommandError
from afbs_compile.demo import model, text
from afbs_compile.demo.measure import Comparison, compare
from afbs_compile.demo.model import LanguageModel
from afbs_compile.options import Options, parse
from afbs_compile.policy import Policy, Tuning, bucket_of
from afbs_compile.progress import Progress
from afbs_compile.report import JOURNAL, CalibrationReport, Report, explain
from afbs_compile.summary import attention_speedup


@dataclass(frozen=True, slots=True)
class Setup:
    """What to run: the model's folder and the text's file (None: the defaults), and options."""

    model: Path | None
    text: Path | None
    tokens: int
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Result:
    """What came out; the field names are those of `afbs demo --json`.

    Attributes:
        sites: Attention calls that were found.
        rewritten: Of these, how many run sparse.
        density: Visited over visible blocks, mean over all sites; dense ones are 1.
        perplexity_dense: On the window that tuning did not see.
        perplexity_sparse: The same, sparse.
        attention_speedup: Dense over sparse seconds of all attention, from the tuning.
        forward_speedup: Dense (`backend="inductor"`) over sparse seconds of the whole forward.
        tuning_seconds: Spent in this process.
        evaluations: Made in this process.
        cache: `hit` or `miss`.
        policy_path: Where the policy is kept, or None if it could not be.
    """

    sites: int
    rewritten: int
    density: float
    perplexity_dense: float
    perplexity_sparse: float
    attention_speedup: float | None
    forward_speedup: float
    tuning_seconds: float
    evaluations: int
    cache: str
    policy_path: str | None


def demo(setup: Setup) -> tuple[Result, Tuning | None]:
    """Run it, with progress on stderr.

    Returns:
        The figures, and what was tuned if it could be kept.

    Raises:
        CommandError: The model or the text cannot be had, or no attention can be tuned.
    """
    language_model, seen, unseen = load(setup)
    JOURNAL.clear()
    sparse = torch.compile(language_model.module, backend="afbs", options=setup.options)
    with torch.no_grad():
        sparse(**seen)
    report = explain()
    if not report.calibrations:
        reasons = "; ".join(report.reasons) or "no attention was found"
        raise CommandError(f"nothing of {language_model.name} can be tuned: {reasons}")
    dense = torch.compile(language_model.module, backend="inductor")
    with Progress() as progress:
        comparison = compare(dense, sparse, unseen, progress)
    tuning = kept(report, parse(setup.options))
    return result(report, tuning, comparison), tuning


def load(setup: Setup) -> tuple[LanguageModel, dict[str, Any], dict[str, Any]]:
    """The model, its call on the window for tuning, and on one that tuning does not see.

    pip and transformers show their own progress on stderr.
    """
    language_model = chosen(setup)
    body = text.read(setup.text) if setup.text else text.default()
    seen, unseen = text.windows(language_model.tokens(body), setup.tokens, 2)
    return language_model, language_model.inputs(seen), language_model.inputs(unseen)


def chosen(setup: Setup) -> LanguageModel:
    """The user's model, or SmolLM2."""
    if setup.model:
        return model.from_folder(setup.model)
    return model.smollm2(parse(setup.options).cache_folder)


def kept(report: Report, options: Options) -> Tuning | None:
    """What was tuned, read from where it is kept: the sites of all graphs of the model."""
    tunings = [found for c in report.calibrations if (found := read(c, options))]
    if not tunings:
        return None
    sites = {name: site for tuning in tunings for name, site in tuning.sites.items()}
    return replace(tunings[0], sites=sites)


def read(calibration: CalibrationReport, options: Options) -> Tuning | None:
    """The stored tuning that a graph took, or None if it could not be stored."""
    if calibration.policy_path is None:
        return None
    policy = Policy.read(Path(calibration.policy_path))
    return policy.find(bucket_of(calibration.length), options.tuning_fingerprint())


def result(report: Report, tuning: Tuning | None, comparison: Comparison) -> Result:
    """All figures together."""
    densities = [
        site.density if site.decision == "sparse" and site.density is not None else 1.0
        for site in report.sites
    ]
    return Result(
        sites=len(report.sites),
        rewritten=report.rewritten,
        density=sum(densities) / len(densities),
        perplexity_dense=comparison.perplexity_dense,
        perplexity_sparse=comparison.perplexity_sparse,
        attention_speedup=attention_speedup(tuning) if tuning else None,
        forward_speedup=comparison.forward_speedup,
        tuning_seconds=sum(c.seconds for c in report.calibrations),
        evaluations=sum(c.evaluations for c in report.calibrations),
        cache="hit" if all(c.cache == "hit" for c in report.calibrations) else "miss",
        policy_path=report.calibrations[-1].policy_path,
    )
