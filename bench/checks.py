"""Is what was timed right? Relative errors against fp32 on a few random rows, or on one head.

Error is the Frobenius norm of the difference over that of the fp32 result.
"""

import torch
from torch import Tensor

from afbs_compile.bench.problems import BLOCK_M, BLOCK_N, Lists, Problem
from afbs_compile.kernels.lists import to_keep

FORWARD_BAR = 3e-3  # bf16 rounds by 2^-9 at most; so do P and the output
BACKWARD_BAR = 6e-3  # one rounding more on the way: 2.3e-3 to 2.5e-3 are usual
ROWS = 16
CHUNK = 1024  # query rows of a head at a time in the gradients


class WrongResult(Exception):
    """A kernel gave something else than fp32 does: its time means nothing."""


def require(what: str, error: float, bar: float) -> None:
    """Fail loudly.

    Raises:
        WrongResult: The error is above the bar, or no number.
    """
    if not error <= bar:
        raise WrongResult(f"{what}: relative error {error:.2e} is above {bar:.0e}")


def relative(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    found, wanted = found.detach().float(), wanted.detach().float()
    return float((found - wanted).norm() / wanted.norm())


def seen(problem: Problem, keep: Tensor, head: Tensor, i: Tensor) -> Tensor:
    """Bool `[n, L]`: which keys the queries `i` of the heads see under the lists and the mask."""
    length = problem.shape.length
    listed = keep[0, head, i // BLOCK_M].repeat_interleave(BLOCK_N, -1)[:, :length]
    if not problem.shape.causal:
        return listed
    return listed & (torch.arange(length, device=i.device) <= i[:, None])


def forward_error(problem: Problem, lists: Lists, o: Tensor) -> float:
    """Error of `o` `[1, H, L, D]` on random rows of random heads."""
    device = problem.q.device
    generator = torch.Generator(device).manual_seed(2)
    head, i = (
        torch.randint(n, (ROWS,), generator=generator, device=device)
        for n in (problem.heads, problem.shape.length)
    )
    group = problem.heads // problem.k.shape[1]
    q = problem.q[0, head, i].float()
    k, v = (x[0, head // group].float() for x in (problem.k, problem.v))
    scores = torch.einsum("nd,nld->nl", q, k) * problem.scale
    p = scores.masked_fill(~seen(problem, to_keep(*lists), head, i), -torch.inf).softmax(-1)
    return relative(o[0, head, i], torch.einsum("nl,nld->nd", p, v))


def gradients(problem: Problem, lists: Lists, do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fp32 dq of the first group of query heads, dk and dv of the first key head."""
    group = problem.heads // problem.k.shape[1]
    keep = to_keep(*lists)
    k, v = problem.k[0, 0].float(), problem.v[0, 0].float()
    dk, dv, dq = torch.zeros_like(k), torch.zeros_like(v), []
    for h in range(group):
        for start in range(0, problem.shape.length, CHUNK):
            i = torch.arange(start, min(start + CHUNK, problem.shape.length), device=k.device)
            q, g = problem.q[0, h, i].float(), do[0, h, i].float()
            visible = seen(problem, keep, torch.full_like(i, h), i)
            p = (q @ k.T * problem.scale).masked_fill(~visible, -torch.inf).softmax(-1)
            dv += p.T @ g
            ds = p * (g @ v.T - ((p @ v) * g).sum(-1, keepdim=True)) * problem.scale
            dq.append(ds @ k)
            dk += ds.T @ q
    return torch.cat(dq).view(group, *k.shape), dk, dv


def backward_error(
    problem: Problem, lists: Lists, do: Tensor, found: tuple[Tensor, Tensor, Tensor]
) -> float:
    """The largest error of dq, dk and dv over the first key head and its query heads."""
    dq, dk, dv = gradients(problem, lists, do)
    pairs = ((found[0][0, : len(dq)], dq), (found[1][0, 0], dk), (found[2][0, 0], dv))
    return float(torch.tensor([relative(a, b) for a, b in pairs]).max())  # NaN stays NaN
