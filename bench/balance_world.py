"""What is simulated? Lengths, densities of content, devices, and how long a step takes.

A device's cost is fitted to `results/attention.json` (forward and backward on an H200); linear
layers, which were not measured, count 6 FLOP a parameter and token at `FLOPS`. Communication costs
nothing. What is not known to a balancer, it is not told: densities scatter around their source's
mean, replicas differ in speed, clocks are noisy.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from afbs_compile.bench import harness
from afbs_compile.training.epoch import Step
from afbs_compile.training.sampler import totals
from afbs_compile.tuner.arrays import Floats, Ints
from afbs_compile.tuner.step_cost import CostModel
from afbs_compile.tuner.workload import visible_blocks

FLOPS = 4e14  # of linear layers in training on an H200: an assumption, 40 % of its peak
SOURCES = 8
SOURCE_SCATTER, SAMPLE_SCATTER = 0.35, 0.15  # of log density: assumptions
SPEED_SCATTER, CLOCK_SCATTER = 0.01, 0.02  # of log seconds: assumptions


@dataclass(frozen=True, slots=True)
class Model:
    """The shape of a model: layers, query heads, and parameters of a layer's matrices."""

    layers: int
    heads: int
    parameters: float


MODELS = {
    "qwen2.5-0.5b": Model(24, 14, 14.9e6),
    "qwen2.5-3b": Model(36, 16, 77.1e6),
    "llama-3-8b": Model(32, 32, 218.1e6),
}


def long_tail(rng: np.random.Generator, n: int) -> Floats:
    """Most are short, some very long: lognormal, median 4k, up to 128k tokens."""
    return np.clip(rng.lognormal(np.log(4096), 1.2, n), 512, 131072).round()


def uniform(rng: np.random.Generator, n: int) -> Floats:
    """8k to 64k tokens."""
    return rng.uniform(8192, 65536, n).round()


def two_humps(rng: np.random.Generator, n: int) -> Floats:
    """Below 4k or above 16k tokens, as ChatQA2-Long-SFT is described."""
    short, long = rng.uniform(512, 4096, n), rng.uniform(16384, 32768, n)
    return np.where(rng.random(n) < 0.6, short, long).round()


MIXTURES: dict[str, Callable[[np.random.Generator, int], Floats]] = {
    "long-tail": long_tail,
    "uniform": uniform,
    "two-humps": two_humps,
}


def by_length(lengths: Floats) -> Floats:
    """Density that a threshold keeps, falling with length (measured trend, rounded)."""
    return np.clip(0.6 * (lengths / 4096) ** -0.45, 0.02, 1.0)


def by_count(lengths: Floats) -> Floats:
    """Density of 32 key blocks of 256 tokens for every query: MoBA's setting in the paper."""
    kept = 32 * 256
    return np.where(lengths <= kept, 1.0, kept / lengths * (2 - kept / lengths))


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """N samples.

    Attributes:
        lengths: Tokens [N].
        visible: Visible blocks of all layers and heads [N].
        prior: Density that is expected of a sample's length [N].
        density: Density that it has [N].
        source: Where it comes from [N].
    """

    lengths: Floats
    visible: Floats
    prior: Floats
    density: Floats
    source: Ints


def data(mixture: str, samples: int, model: Model, seed: int, densities: str = "known") -> Data:
    """Samples by chance.

    Args:
        mixture: One of `MIXTURES`.
        samples: How many.
        model: Whose blocks they have.
        seed: Of chance.
        densities: "known": they follow from lengths, as with top-k budgets; "content": they
            scatter around what sources and lengths let expect, as with thresholds.
    """
    rng = np.random.default_rng([seed, 1])
    lengths = MIXTURES[mixture](rng, samples)
    visible = model.layers * model.heads * visible_blocks(lengths)
    source = rng.integers(0, SOURCES, samples)
    prior = (by_count if mixture == "two-humps" else by_length)(lengths)
    scatter = SOURCE_SCATTER * rng.standard_normal(SOURCES)[source]
    scatter += SAMPLE_SCATTER * rng.standard_normal(samples)
    content = np.clip(prior * np.exp(scatter), 0.01, 1.0)
    density = content if densities == "content" else prior
    return Data(lengths, visible, prior, density, source)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Replicas and what work costs them.

    Attributes:
        ranks: Data-parallel replicas.
        speed: Seconds over usual seconds of each [R].
        cost: (a, b, c): seconds a token, a kept block of one head, a micro-batch.
        stages: Pipeline stages of a replica.
    """

    ranks: int
    speed: Floats
    cost: tuple[float, float, float]
    stages: int = 1

    def seconds(self, step: Step, known: Data, budget: Floats) -> Floats:
        """Seconds of every rank and micro-batch [R, M], budgets [R, M] times the usual density."""
        a, b, c = self.cost
        blocks = totals(step, known.visible * known.density) * np.minimum(
            budget, totals(step, known.visible) / totals(step, known.visible * known.density)
        )
        return (a * totals(step, known.lengths) + b * blocks + c) * self.speed[:, None]

    def step_seconds(self, seconds: Floats, sync: str) -> float:
        """Seconds until all have finished [R, M]; a pipeline adds its longest unit per stage."""
        if sync == "micro":
            return float(seconds.max(0).sum())
        fill = (self.stages - 1) * seconds.max(1)
        return float((seconds.sum(1) + fill).max() / self.stages)


def cluster(ranks: int, model: Model, seed: int, stages: int = 1) -> Cluster:
    """Replicas by chance, of devices as they were measured."""
    rng = np.random.default_rng([seed, 2])
    a, b, c = attention_cost()
    cost = (
        model.layers * (6 * model.parameters / FLOPS + a * model.heads),
        b,
        model.layers * c,
    )
    return Cluster(ranks, np.exp(SPEED_SCATTER * rng.standard_normal(ranks)), cost, stages)


def attention_cost(results: Path = harness.RESULTS) -> tuple[float, float, float]:
    """Seconds of one head a token, of a kept block, and of a layer, forward and backward."""
    rows = [row for row in json.loads((results / "attention.json").read_text())["rows"]
            if row["case"] == "forward_backward" and row["head_dim"] == 128]  # fmt: skip
    tokens = [row["heads"] * row["length"] for row in rows]
    model = CostModel()
    model.profile(
        tokens, [kept_blocks(row) for row in rows], [row["ours_ms"] / 1e3 for row in rows]
    )
    a, b, c = model.coefficients.tolist()
    return a, b, c


def kept_blocks(row: dict[str, Any]) -> float:
    """Blocks that a measured call visited."""
    length = row["length"]
    visible = visible_blocks(length) if row["causal"] else (length / 128) * (length / 64)
    return float(row["batch"] * row["heads"] * row["kept"] * visible)
