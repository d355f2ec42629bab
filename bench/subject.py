"""What is measured? The model, texts and settings that the command line names, ready to run."""

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from afbs_compile.bench import settings, tuned, windows
from afbs_compile.bench.ledger import Ledger, Row
from afbs_compile.bench.settings import Setting
from afbs_compile.bench.tuned import Calibration
from afbs_compile.bench.variants import Thresholds, Variants
from afbs_compile.bench.windows import Text
from afbs_compile.commands.errors import CommandError
from afbs_compile.demo import model as models
from afbs_compile.demo.model import LanguageModel
from afbs_compile.options import default_cache_dir
from afbs_compile.progress import OnProgress

TUNING_SHARE = 0.6  # of the time: no tuning begins after it, what is tuned must also be measured


@dataclass(frozen=True, slots=True)
class Subject:
    """Everything a benchmark of quality needs.

    Attributes:
        model: The language model.
        variants: It again, dense or under thresholds.
        texts: What it reads.
        lengths: Tokens of a window.
        settings: What is compared.
        calibration: What tunings read.
        dtype: The model's, by name.
    """

    model: LanguageModel
    variants: Variants
    texts: list[Text]
    lengths: list[int]
    settings: list[Setting]
    calibration: Calibration
    dtype: str

    def row(self, setting: Setting, text: Text, tokens: int) -> Row:
        """The fields of a row that say what was measured."""
        return {
            "model": self.model.name,
            "dtype": self.dtype,
            "text": text.name,
            "tokens": tokens,
            "setting": setting.name,
            "family": setting.family,
            "calibration": self.calibration.label() if setting.options else None,
        }


def load(args: Namespace, defaults: Iterable[str]) -> Subject:
    """Read the command line, then the model.

    Raises:
        CommandError: An argument is wrong, or the model or a text cannot be had.
    """
    wanted = settings.settings(args.settings or defaults)
    lengths = sorted(set(windows.numbers(args.tokens, "--tokens")))
    if args.calibration < 1:
        raise CommandError(f"--calibration is {args.calibration}; give at least 1")
    dtype: torch.dtype = getattr(torch, args.dtype)
    if args.model == "smollm2":
        model = models.smollm2(default_cache_dir(), dtype)
    else:
        model = models.from_folder(Path(args.model), dtype)
    if args.name:
        model = replace(model, name=args.name)
    texts = windows.read(args.text, args.windows, model)
    chosen = None if args.calibrate_on is None else args.calibrate_on.split(",")
    calibration = Calibration(texts, args.calibration, chosen, args.policies)
    for length in lengths:  # fail before anything slow
        for text in texts:
            windows.measured(text, length)
        if any(setting.options for setting in wanted):
            calibration.windows(length)
    variants = Variants(model.module)
    return Subject(model, variants, texts, lengths, wanted, calibration, args.dtype)


def thresholds(
    subject: Subject,
    wanted: Iterable[Setting],
    length: int,
    ledger: Ledger,
    on_progress: OnProgress,
) -> dict[str, Thresholds]:
    """Thresholds of settings by name; tunings that the time does not suffice for are noted."""
    every = sorted(wanted, key=lambda s: bool(s.options))
    found = {}
    for done, setting in enumerate(every):
        on_progress(done, len(every), f"thresholds, {length} tokens", setting.name)
        if setting.options and ledger.over(TUNING_SHARE):
            ledger.notes.append(f"not tuned in time: {setting.name} at {length} tokens")
            continue
        found[setting.name] = tuned.thresholds(setting, subject.model, subject.calibration, length)
    on_progress(len(every), len(every), f"thresholds, {length} tokens", "")
    return found


def refusals(variants: Variants) -> list[str]:
    """A note of the attention calls that stayed dense and are not counted."""
    told = [f"{name}: {reason}" for name, reason in variants.refused.items()]
    return [f"dense whatever the setting, and not counted: {', '.join(told)}"] if told else []
