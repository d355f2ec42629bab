"""Which thresholds does a setting stand for? Those of its head, or what a tuning finds.

A tuning also decides by the clock which sites are worth running sparse. Quality must not hang on a
clock: here every head runs as its thresholds say, whatever its site's decision is.
"""

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import afbs_compile
from afbs_compile.bench import windows
from afbs_compile.bench.settings import Setting
from afbs_compile.bench.variants import Thresholds
from afbs_compile.bench.windows import Text
from afbs_compile.commands.errors import CommandError
from afbs_compile.demo.model import LanguageModel
from afbs_compile.policy import Head, Policy, bucket_of

DENSE = Head("dense", 1.0)


@dataclass(frozen=True, slots=True)
class Calibration:
    """What tunings read.

    Attributes:
        texts: All texts.
        each: Windows of a text.
        chosen: Names of the texts that are read; None for all.
        folder: Where policies are kept between runs; None forgets them.
    """

    texts: Sequence[Text]
    each: int
    chosen: Sequence[str] | None
    folder: Path | None

    def label(self) -> str:
        """The tuned windows in words, such as `wikitext:2 moby:2`."""
        names = [t.name for t in self.texts] if self.chosen is None else self.chosen
        return " ".join(f"{name}:{self.each}" for name in names)

    def windows(self, length: int) -> Mapping[str, list[Tensor]]:
        """The windows of every text; see `windows.calibration`."""
        return windows.calibration(self.texts, length, self.each, self.chosen)


def thresholds(
    setting: Setting, model: LanguageModel, calibration: Calibration, length: int
) -> Thresholds:
    """The thresholds of a setting at a length; a tuned one is tuned now, or read.

    Raises:
        CommandError: Nothing can be tuned.
    """
    if setting.head is not None:
        return Thresholds(setting.selector, setting.head)
    return of_policy(policy(setting, model, calibration, length), setting, length)


def policy(
    setting: Setting, model: LanguageModel, calibration: Calibration, length: int
) -> Policy:
    """The policy of a tuned setting: read if it is kept, else tuned now.

    Raises:
        CommandError: Nothing can be tuned.
    """
    path = kept_at(setting, model, calibration, length)
    if path and path.is_file():
        return Policy.read(path)
    made = tune(setting, model, calibration, length)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(made.to_json(), encoding="utf-8")
    return made


def of_policy(policy: Policy, setting: Setting, length: int) -> Thresholds:
    """The thresholds of a policy at a length; sites it does not name stay dense.

    Raises:
        CommandError: It has none for the length.
    """
    tuning = policy.find_any(bucket_of(length))
    if tuning is None:
        raise CommandError(f"the policy has no tuning for {length} tokens")
    heads = {name: site.heads for name, site in tuning.sites.items()}
    return Thresholds(setting.selector, DENSE, heads, setting.compensation)


def tune(setting: Setting, model: LanguageModel, calibration: Calibration, length: int) -> Policy:
    """Tune on the calibration windows, in a cache of its own."""
    inputs = [model.inputs(w) for w in windows.in_turn(calibration.windows(length))]
    torch._dynamo.reset()  # else the graphs of many settings meet the limit of recompilations
    with tempfile.TemporaryDirectory() as empty:
        options: dict[str, Any] = {"min_length": 1, "cache_dir": empty, **setting.options}
        try:
            return afbs_compile.tune(model.module, inputs, **options)
        except ValueError as error:
            raise CommandError(f"{setting.name} cannot be tuned: {error}") from error


def kept_at(
    setting: Setting, model: LanguageModel, calibration: Calibration, length: int
) -> Path | None:
    """The policy's file, named after all that it hangs on."""
    if calibration.folder is None:
        return None
    digest = hashlib.sha256()
    for part in (model.name, str(model.module.dtype), setting.name):
        digest.update(f"{part}\n".encode())
    for window in windows.in_turn(calibration.windows(length)):
        digest.update(window.numpy().tobytes())
    return calibration.folder / f"{length}-{digest.hexdigest()[:16]}.json"
