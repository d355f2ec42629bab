"""How is a cost model begun? By timing a few samples of many lengths and budgets here."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from afbs_compile.tuner.step_cost import CostModel


def profiled(
    step: Callable[[int, float], Any],
    cases: Iterable[tuple[int, float]],
    visible: Callable[[int], float],
    device: torch.device | str = "cpu",
    repeats: int = 3,
) -> CostModel:
    """A cost model from the fastest of some runs of each case; rank 0's counts for all.

    Share it before use, so that ranks decide the same: `ScalarExchange.agree`.

    Args:
        step: Runs forward and backward of one sample, given its tokens and budget.
        cases: Tokens and budget of each case; four or more, lengths far apart.
        visible: Visible blocks of all layers for so many tokens.
        device: What is timed; a CPU's processor time, a GPU's time until it is idle.
        repeats: Runs of each case after one that warms up.
    """
    where = torch.device(device)
    wanted = list(cases)
    times = [min(seconds(step, *case, where) for _ in range(repeats + 1)) for case in wanted]
    model = CostModel(name_of(where))
    blocks = [visible(tokens) * budget for tokens, budget in wanted]
    model.profile([tokens for tokens, _ in wanted], blocks, times)
    return model


def seconds(
    step: Callable[[int, float], Any], tokens: int, budget: float, device: torch.device
) -> float:
    """Seconds of one run."""
    clock = time.process_time
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        clock = time.perf_counter
    begun = clock()
    step(tokens, budget)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - begun


def name_of(device: torch.device) -> str:
    """What a cost model is filed under."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
