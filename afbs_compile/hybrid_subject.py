"""What is made hybrid, and as what? A model and samples, ready to be evaluated, and wishes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from afbs_compile.hybrid_calls import Unsuitable, record
from afbs_compile.hybrid_losses import OBJECTIVES, Losses
from afbs_compile.hybrid_objective import Call, Evaluator
from afbs_compile.hybrid_policy import KIND
from afbs_compile.hybrid_samples import Sample
from afbs_compile.options import default_cache_dir
from afbs_compile.passes.sites import value
from afbs_compile.profiling import POLL_SECONDS
from afbs_compile.rankings import CURVATURE, DRAWS, RANKINGS, SLOPES, forms, of_forms, ranking
from afbs_compile.store import Store, digest, input_digest
from afbs_compile.tuner import curvature
from afbs_compile.tuner.foresight import Foresight
from afbs_compile.tuner.heads import lowest
from afbs_compile.tuner.solvers import Solver
from afbs_compile.versions import device_name, versions

KEPT_ON_CPU = 4 << 30  # bytes that runs may be resumed from
KEPT_ON_GPU = 0.4  # of the memory that is free
BEST = "best"  # of all rankings, the one whose own choice costs least
PRIORS = (*RANKINGS, BEST, "none")


@dataclass(frozen=True, slots=True)
class Wishes:
    """What `hybridize` was asked for; see there."""

    ratio: float
    window: int = 1024
    sink: int = 4
    budget: int = 600
    objective: str = "kl"
    prior: str = CURVATURE
    solver: str | Solver = "lns"
    seed: int = 0
    levels: tuple[int, ...] | None = None
    seconds: float | None = None
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        """Check what needs no model.

        Raises:
            ValueError: Something is out of range.
        """
        if self.window < 1:
            raise ValueError(f"window is {self.window}; needed: at least 1 key")
        if self.sink < 0:
            raise ValueError(f"sink is {self.sink}; needed: at least 0 tokens")
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio is {self.ratio}; needed: a share of the heads, from 0 to 1")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"no objective {self.objective!r}; there are {', '.join(OBJECTIVES)}")
        if self.prior not in PRIORS:
            raise ValueError(f"no prior {self.prior!r}; there are {', '.join(PRIORS)}")


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A model that is to be made hybrid, ready to be evaluated.

    Attributes:
        key: The model's.
        name: Its class.
        evaluator: Runs choices of heads on the samples.
        store: Where evaluations are kept.
        length: Tokens of the longest call.
    """

    key: str
    name: str
    evaluator: Evaluator
    store: Store
    length: int

    def losses(self, wishes: Wishes) -> Losses:
        """The objective of a search."""
        return Losses(
            self.evaluator, self.evaluator.layout.size,
            [call.sample.task for call in self.evaluator.calls], self.store,
            wishes.objective,
        )  # fmt: skip

    def priors(self, wishes: Wishes) -> list[np.ndarray]:
        """The rankings that a search begins with; none if it was asked for none."""
        names = {BEST: RANKINGS, "none": ()}.get(wishes.prior, (wishes.prior,))
        return [self.prior(name, wishes) for name in names]

    def compared(self, losses: Losses, priors: Sequence[np.ndarray], wishes: Wishes) -> None:
        """Let a loss be relative to what rankings would choose, by single heads if there are any.

        Raises:
            Stop: The time is over.
        """
        size = losses.size
        count = self.evaluator.layout.share(wishes.ratio)
        if priors and 0 < count < size:
            rivals = priors[1:] if len(priors) > 1 else priors  # the first is `curvature`
            losses.compare([lowest(one, np.arange(size), count, size) for one in rivals])

    def foresight(self, wishes: Wishes, losses: Losses) -> Foresight | None:
        """What a search by KL knows beforehand, if curvature is among what it begins with."""
        if wishes.prior not in (CURVATURE, BEST) or wishes.objective != "kl":
            return None
        tasks = list(dict.fromkeys(losses.tasks))
        told = [tasks.index(task) for task in losses.counting()]
        known = curvature.units(self.kept("forms", forms, wishes)[told])
        return Foresight(known, losses.costs, losses.join)

    def prior(self, name: str, wishes: Wishes) -> np.ndarray:
        """A static ranking [N]."""
        count = self.evaluator.layout.share(wishes.ratio)
        if name in SLOPES:
            return of_forms(name, self.kept("forms", forms, wishes), count)
        return self.kept(name, partial(ranking, name), wishes)

    def kept(self, name: str, measure: Callable[..., np.ndarray], wishes: Wishes) -> np.ndarray:
        """What rankings are made of, kept like evaluations."""
        asked = {"window": wishes.window, "sink": wishes.sink}

        def measured() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
            return {}, {"harm": measure(self.evaluator, **asked)}

        about = {"ranking": name, "draws": DRAWS}  # a seed changes the search alone
        while (known := self.store.once(about, measured)) is None:
            time.sleep(POLL_SECONDS)
        return np.asarray(known[1]["harm"], dtype=np.float64)


def subject(
    model: nn.Module, samples: Sequence[Sample], wishes: Wishes, share: float = 1.0
) -> Subject:
    """A model and samples, ready to be evaluated.

    Args:
        model: Any module with logits among its outputs.
        samples: Calls of it.
        wishes: Window, sinks and cache folder count.
        share: Of the memory that one search may take to resume from, where several share it.

    Raises:
        Unsuitable: It has no head that can be windowed.
    """
    calls, key = record(model, samples, wishes.window)
    first = next(x.device for x in calls[0].args if isinstance(x, Tensor))
    evaluator = Evaluator(
        calls, window=wishes.window, sink=wishes.sink,
        memory_bytes=int(share * memory_bytes(first)),
    )  # fmt: skip
    store = Store(
        key,
        {"kind": KIND, "window": wishes.window, "sink": wishes.sink},
        {
            "graphs": digest([call.gm.code for call in calls]),
            "samples": [of_sample(call) for call in calls],
            "device": device_name(first),
            "versions": versions(),
        },
        wishes.cache_dir or default_cache_dir(),
    )
    length = max(int(value(site.key).shape[2]) for call in calls for site in call.sites)
    if length <= wishes.window + wishes.sink:
        raise Unsuitable(
            f"the longest input has {length} tokens, which a window of {wishes.window} and "
            f"{wishes.sink} sink tokens see whole: give longer inputs or a smaller window"
        )
    return Subject(key, type(model).__name__, evaluator, store, length)


def of_sample(call: Call) -> str:
    """A digest of a call and of what counts in it."""
    sample = call.sample
    return input_digest([*call.args, sample.task, sample.counted, sample.targets, sample.answers])


def memory_bytes(device: torch.device) -> int:
    """What may be kept to resume runs from."""
    if device.type == "cuda":
        return int(KEPT_ON_GPU * torch.cuda.mem_get_info(device)[0])
    return KEPT_ON_CPU
