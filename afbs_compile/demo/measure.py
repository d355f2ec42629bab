"""What does sparsity cost and gain? Perplexity, and forward time measured in turns."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from afbs_compile.progress import OnProgress

ROUNDS = 3
CHUNK = 512  # positions a softmax: float32 logits of all at once would fill a laptop

Forward = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Dense against sparse on one window."""

    perplexity_dense: float
    perplexity_sparse: float
    forward_speedup: float


def compare(
    dense: Forward, sparse: Forward, inputs: dict[str, Any], on_progress: OnProgress
) -> Comparison:
    """Perplexity of both on `inputs`, then `ROUNDS` timed rounds in turns (median of ratios)."""
    total = 2 + ROUNDS
    on_progress(0, total, "Measuring", "perplexity, dense")
    perplexity_dense = perplexity(dense, inputs)
    on_progress(1, total, "Measuring", "perplexity, sparse")
    perplexity_sparse = perplexity(sparse, inputs)
    ratios = []
    for done in range(ROUNDS):
        on_progress(2 + done, total, "Measuring", "forward time")
        ratios.append(seconds(dense, inputs) / seconds(sparse, inputs))
    on_progress(total, total, "Measuring", "")
    return Comparison(perplexity_dense, perplexity_sparse, statistics.median(ratios))


@torch.no_grad()
def perplexity(forward: Forward, inputs: dict[str, Any]) -> float:
    """The exponential of the mean surprise at every token of `input_ids` [1, n] but the first."""
    logits: Tensor = forward(**inputs).logits[0, :-1]
    targets = inputs["input_ids"][0, 1:].to(logits.device)
    pairs = zip(torch.split(logits, CHUNK), torch.split(targets, CHUNK), strict=True)
    losses = [cross_entropy(part.float(), at, reduction="sum").double() for part, at in pairs]
    return math.exp(float(torch.stack(losses).sum()) / targets.numel())


@torch.no_grad()
def seconds(forward: Forward, inputs: dict[str, Any]) -> float:
    """Wall-clock time of one forward."""
    device = inputs["input_ids"].device
    synchronise(device)
    start = time.perf_counter()
    forward(**inputs)
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
