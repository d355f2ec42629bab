"""Is the sparse call faster than the dense one, prediction included? Measured, not guessed.

Time is close to linear in density, so two densities give the time at every one. One measurement
serves all sites of the same shape.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from afbs_compile.capture import Layer
from afbs_compile.evaluators import DirectEvaluator, policy_at
from afbs_compile.kernels import dispatch
from afbs_compile.tuner.objective import U_MAX

REPEATS = 3


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds of one call: dense, and sparse as `fixed + per_density · density`."""

    dense: float
    fixed: float
    per_density: float

    def sparse(self, density: float) -> float:
        """Seconds of a sparse call that visits `density` of the visible blocks."""
        return self.fixed + self.per_density * density


def signature(layer: Layer) -> tuple[object, ...]:
    """What decides the speed of a layer at a given density."""
    q, k = layer.q, layer.k
    shapes = tuple(q.shape), tuple(k.shape), q.dtype, q.device.type, layer.mask
    return shapes if layer.data is None else (*shapes, layer.data.kind)


class One:
    """A source of layers that holds just one."""

    def __init__(self, layer: Layer) -> None:
        """Hold `layer`."""
        self.held = layer

    def layer(self, name: str) -> Layer:
        """The layer, whatever the name."""
        return self.held


def measure(layer: Layer, selector: str, compensation: str = "none") -> Speed:
    """Time SDPA and the op on a layer's own tensors, interleaved."""
    heads = layer.q.shape[1]
    direct = DirectEvaluator(One(layer), "timing", heads, selector, compensation=compensation)
    ends = [np.zeros(heads), np.full(heads, U_MAX)]
    policies = [policy_at(1 - 10.0**-u, layer.q.device) for u in ends]
    densities = [direct.density(policy) for policy in policies]
    calls: list[Callable[[], Tensor]] = [
        lambda: dispatch.dense(
            layer.q, layer.k, layer.v, mask=layer.mask, scale=layer.scale, data=layer.data
        ),
        lambda: direct.run(layer, policies[0]),
        lambda: direct.run(layer, policies[1]),
    ]
    dense, low, high = interleaved(calls, layer.q.device)
    spread = densities[1] - densities[0]
    slope = max(0.0, (high - low) / spread) if spread > 0 else 0.0
    return Speed(dense, max(0.0, low - slope * densities[0]), slope)


def interleaved(calls: list[Callable[[], Tensor]], device: torch.device) -> list[float]:
    """Median seconds of each call, run in turn (A B C A B C …) after one warm-up each."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(REPEATS):
        for call, found in zip(calls, times, strict=True):
            synchronise(device)
            start = time.perf_counter()
            call()
            synchronise(device)
            found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in times]


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
