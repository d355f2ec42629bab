"""How fast is a long prompt when heads have windows? `afbs::attention` beside dense cuDNN."""

from typing import Any

import torch
from torch import Tensor

from afbs_compile import policy_tensor
from afbs_compile.bench import baselines, harness, problems
from afbs_compile.bench.checks import FORWARD_BAR, relative, require
from afbs_compile.bench.problems import Problem, Shape
from afbs_compile.kernels import op  # noqa: F401  registers afbs::attention
from afbs_compile.kernels.geometry import token_visible
from afbs_compile.policy import Head

ROWS = 16


def prompt(
    config: Any,
    tokens: int,
    ratio: float,
    window: int,
    sink: int,
    like: Tensor,
    repeats: int,
) -> dict[str, float]:
    """Times of one layer's attention to a prompt, a share of whose KV heads has a window.

    Raises:
        WrongResult: Random rows differ from fp32.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    shape = Shape(tokens, True, config.hidden_size // heads, kv_heads)
    problem = problems.make(shape, heads=heads, device=like.device.type, dtype=like.dtype)
    few = round(ratio * kv_heads) * (heads // kv_heads)
    windowed = Head("window", 1.0, window=window, sink=sink)
    policy = policy_tensor.rows(
        [windowed] * few + [Head("dense", 1.0)] * (heads - few), like.device
    )

    def ours() -> Tensor:
        found: Tensor = torch.ops.afbs.attention(
            problem.q, problem.k, problem.v, policy, True, 0, 0, problem.scale, "sub8", 0
        )
        return found

    require("afbs::attention with windows", error(problem, policy, ours()), FORWARD_BAR)
    calls = {"ours": ours, "cudnn": baselines.cudnn(problem)}
    runs = harness.interleaved(calls, repeats=repeats)
    over, spread = harness.ratio(runs["cudnn"], runs["ours"])
    times = {f"{name}_ms": sorted(found)[len(found) // 2] for name, found in runs.items()}
    return times | {"ratio_cudnn": over, "spread": spread}


def error(problem: Problem, policy: Tensor, o: Tensor) -> float:
    """Error of `o` `[1, H, L, D]` on random rows of all heads."""
    length, group = problem.shape.length, problem.heads // problem.k.shape[1]
    generator = torch.Generator(o.device).manual_seed(2)
    i = torch.randint(length, (ROWS,), generator=generator, device=o.device)
    seen = token_visible(problem.mask, policy, i, torch.arange(length, device=o.device))
    wanted = []
    for h in range(problem.heads):  # one at a time: all keys in fp32 take memory
        k, v = (x[0, h // group].float() for x in (problem.k, problem.v))
        scores = problem.q[0, h, i].float() @ k.T * problem.scale
        wanted.append(scores.masked_fill(~seen[h], -torch.inf).softmax(-1) @ v)
    return relative(o[0, :, i], torch.stack(wanted))
