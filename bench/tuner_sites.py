"""On what are strategies compared? Attention layers of a real model, profiled on windows of text.

A profile answers every threshold at every level exactly, so strategies that would run attention
are replayed on it: what they are told is what they would measure, and their calls are counted.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from afbs_compile.ahead import Recorder, problems
from afbs_compile.capture import Layer, Stream
from afbs_compile.commands.errors import CommandError
from afbs_compile.demo.model import LanguageModel
from afbs_compile.evaluators import profiled
from afbs_compile.kernels import dispatch
from afbs_compile.options import parse
from afbs_compile.progress import OnProgress
from afbs_compile.tuner.arrays import Floats, Ints
from afbs_compile.tuner.objective import (
    Evaluator,
    Fidelity,
    Measured,
    SequenceLength,
    lambdas_of,
    measure,
)

LAMBDAS = (-math.inf, -10.0, -7.0, -5.0, -4.0, -3.0, -2.0, -1.0)
SHORT = SequenceLength(1 / 4)  # the paper's fidelity
PROBES = (1 / 4, 3 / 4)  # of the depth: layers whose profiles are the prior of the others


@dataclass(frozen=True, slots=True)
class Documents:
    """Several windows as one evaluator: the worst error, the mean density.

    Attributes:
        windows: Evaluators of each.
        profile_cost: Dense passes that the profile of a window costs, measured.
    """

    windows: Sequence[Evaluator]
    profile_cost: float

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.windows[0].heads

    @property
    def lambdas(self) -> tuple[float, ...]:
        """Levels of lambda."""
        return lambdas_of(self.windows[0])

    def __call__(self, u: Floats, fidelity: Fidelity, level: Ints | None = None) -> Measured:
        """Measure on every window."""
        found = [measure(window, u, fidelity, level) for window in self.windows]
        error = np.max([one.error for one in found], axis=0)
        return Measured(error, np.mean([one.density for one in found], axis=0))


Sites = Mapping[str, Documents]


@dataclass(frozen=True, slots=True)
class Subject:
    """What strategies are compared on.

    Attributes:
        model: Its name.
        tokens: Of a window.
        calibration: The tuned sites, by number of calibration windows.
        probes: The probe layers, by number of calibration windows.
        unseen: The tuned sites on windows that no search sees.
    """

    model: str
    tokens: int
    calibration: Mapping[int, Sites]
    probes: Mapping[int, Sites]
    unseen: Sites


def chosen(sites: int, layers: int) -> tuple[list[int], list[int]]:
    """Which of a model's sites are tuned, spread over its depth, and which two are probes.

    Raises:
        CommandError: The model has too few.
    """
    count = layers + len(PROBES)
    if layers < 1 or count > sites:
        raise CommandError(f"--layers is {layers}; the model has {sites} and 2 are probes")
    spread = [int((n + 0.5) * sites / count) for n in range(count)]
    probes = [spread[int(share * count)] for share in PROBES]
    return [n for n in spread if n not in probes], probes


def subject(
    model: LanguageModel,
    windows: Sequence[torch.Tensor],
    documents: Sequence[int],
    layers: int,
    on_progress: OnProgress,
) -> Subject:
    """Profile a model's layers; the first max(documents) windows are to calibrate on.

    Raises:
        CommandError: The model has no attention that can be profiled, or too few layers.
    """
    recorder = Recorder(parse({"min_length": 1}))
    compiled = torch.compile(model.module, backend=recorder)
    with torch.no_grad():
        for window in windows:
            compiled(**model.inputs(window))
    found = problems(recorder)
    if not found:
        raise CommandError(f"no attention of {model.name} can be tuned")
    problem = max((one for one, _ in found), key=lambda one: len(one.sites))
    tuned, probes = chosen(len(problem.sites), layers)
    tables: dict[int, list[Evaluator]] = {n: [] for n in sorted(tuned + probes)}
    costs: list[float] = []
    for done, inputs in enumerate(problem.inputs):
        stream = Stream(problem.gm, inputs, problem.sites)
        for n, table in tables.items():
            on_progress(done, len(problem.inputs), "profile", problem.sites[n].name)
            layer = stream.layer(problem.sites[n].name)
            profile, cost = priced(layer, problem.sites[n].heads)
            table.append(profile)
            costs.append(cost)
    on_progress(len(problem.inputs), len(problem.inputs), "profile", "")
    names = {n: problem.sites[n].name for n in tables}
    cost, most = float(np.median(costs)), max(documents)

    def over(which: Sequence[int], span: slice) -> Sites:
        return {names[n]: Documents(tables[n][span], cost) for n in which}

    return Subject(
        model.name,
        len(windows[0]),
        {count: over(tuned, slice(count)) for count in documents},
        {count: over(probes, slice(count)) for count in documents},
        over(tuned, slice(most, None)),
    )


def priced(layer: Layer, heads: int) -> tuple[Evaluator, float]:
    """A layer's profile at all levels, and what it took in dense passes."""
    begun = time.perf_counter()
    dispatch.dense(layer.q, layer.k, layer.v, mask=layer.mask, scale=layer.scale)
    settle(layer)
    middle = time.perf_counter()
    found = profiled(layer, selector="sub8", heads=heads, low=SHORT, lambdas=LAMBDAS)
    settle(layer)
    return found, (time.perf_counter() - middle) / (middle - begun)


def settle(layer: Layer) -> None:
    """Wait for a GPU."""
    if layer.q.is_cuda:
        torch.cuda.synchronize()
