"""What would every tau cost? Exact error and density of all thresholds from one dense pass.

For a query block, block partials `exp(S_j - max) V_j` are summed in the order in which the
selector would keep the blocks (forced first, then by score), so that the output after keeping n
blocks is a prefix sum. Its distance to the dense output is the error of every tau that keeps n
blocks. One pass costs a few dense ones and replaces every further evaluation of tau.

A lambda level leaves a kept block out of the sums too if no row's largest score in it comes within
lambda of the row's largest score of all. A kernel compares with the largest score *so far* and
leaves out fewer: it errs less than its profile, and saves less.

With compensation the tangents of blocks that are not kept stand in the same sums; what lambda
leaves out is kept, and has none.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afbs_compile.kernels import policy_columns as col
from afbs_compile.kernels.compensation import known
from afbs_compile.kernels.data_mask import DataMask, blocked
from afbs_compile.kernels.geometry import Blocks, Mask, head_visible
from afbs_compile.kernels.profile_rows import row_errors, rows_of
from afbs_compile.kernels.scores import block_scores
from afbs_compile.kernels.selection import forced_blocks

LOGGER = logging.getLogger(__name__)
OFF = (-math.inf,)
MOST_DIM = 256


@dataclass(frozen=True, slots=True)
class Profile:
    """Tables of R profiled query blocks, N = most blocks any of them could drop.

    Attributes:
        rows: int64 `[R]`, which query blocks.
        error: fp32 `[Z, B, H, R, N + 1]`, Σ|o − o*| after keeping the forced and the n best
            blocks, at each of Z lambda levels.
        computed: int32 `[Z, B, H, R, N + 1]`, those kept that lambda does not leave out.
        before: fp32 `[B, H, R, N]`, score mass ranked before the n-th droppable block; +inf pads.
        norm: fp32 `[B, H, R]`, Σ|o*|.
        forced: int32 `[B, H, R]`, blocks that are kept whatever tau is.
        visible: int64 `[B, H, R]`, blocks that are visible.
    """

    rows: Tensor
    error: Tensor
    computed: Tensor
    before: Tensor
    norm: Tensor
    forced: Tensor
    visible: Tensor


def profile(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    *,
    mask: Mask,
    scale: float,
    selector: str,
    block_m: int,
    block_n: int,
    rows: Tensor | None = None,
    lambdas: Sequence[float] = OFF,
    compensation: str = "none",
    data: DataMask | None = None,
) -> Profile:
    """Profile one attention call; every head is taken as sparse.

    Args:
        q: `[B, Hq, Lq, D]`.
        k: `[B, Hkv, Lk, D]`.
        v: `[B, Hkv, Lk, D]`.
        policy: float32 `[Hq, COLUMNS]`; sinks, neighbours and theta are read.
        mask: The site's mask.
        scale: Multiplier on q·k.
        selector: `sub8`, `sub4` or `mean`.
        block_m: Query block, tokens.
        block_n: Key block, tokens.
        rows: Query blocks to look at; all by default.
        lambdas: Levels in log2 units; −inf leaves nothing out.
        compensation: What stands for a dropped block: `none` or `tangent`.
        data: The part of the mask that comes with the call; without a compensation.
    """
    tangent = known(compensation) == "tangent"
    if rows is None:
        rows = torch.arange(-(-q.shape[2] // block_m), device=q.device)
    reason = no_kernel(q, k, policy, compensation=compensation, data=data)
    if reason is None:
        return by_kernels(q, k, v, policy, rows, lambdas, mask=mask, scale=scale,
                          selector=selector, block_m=block_m, block_n=block_n)  # fmt: skip
    LOGGER.debug("profile in torch: %s", reason)
    order, before, kept, seen = ranked_rows(
        q, k, policy, rows, mask=mask, scale=scale, selector=selector,
        block_m=block_m, block_n=block_n, data=data,
    )  # fmt: skip
    kf, vf = pad_keys(k, block_n), pad_keys(v, block_n)
    found = []
    for r, row in enumerate(rows.tolist()):
        block = q[:, :, row * block_m : (row + 1) * block_m]
        i = torch.arange(row * block_m, row * block_m + block.shape[2], device=q.device)
        own = rows_of(i, k.shape[2], policy, mask=mask, scale=scale, block_n=block_n,
                      tangent=tangent, data=data)  # fmt: skip
        found.append(row_errors(block, kf, vf, order[:, :, r], own, lambdas))
    error, computed, norm = (torch.stack(parts, -2) for parts in zip(*found, strict=True))
    error, computed = shift(error, kept), shift(computed, kept)
    return Profile(rows, error, computed, before, norm[..., 0], kept, seen)


def no_kernel(
    q: Tensor, k: Tensor, policy: Tensor, *, compensation: str, data: DataMask | None
) -> str | None:
    """Why such a profile is made in torch, or None if kernels make it."""
    if q.device.type != "cuda":
        return f"no kernel on {q.device.type.upper()}"
    if not (q.dtype == k.dtype in (torch.float32, torch.float16, torch.bfloat16)):
        return f"no kernel for {q.dtype} with {k.dtype}"
    if q.shape[3] > MOST_DIM:
        return f"no kernel for head dim {q.shape[3]}, above {MOST_DIM}"
    if compensation != "none":
        return f"no kernel with compensation {compensation!r}"
    if data is not None:
        return "no kernel under a mask that depends on data"
    if bool((policy[:, col.MODE] == col.WINDOWED).any()):  # waits, but nothing runs yet
        return "no kernel for heads with windows of their own"
    return None


def by_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    rows: Tensor,
    lambdas: Sequence[float],
    *,
    mask: Mask,
    scale: float,
    selector: str,
    block_m: int,
    block_n: int,
) -> Profile:
    """`profile` in Triton; the dense pass starts first, and runs while the host does the rest."""
    from afbs_compile.kernels import profile_walk

    call = profile_walk.call_of(q, k, v, rows, mask, scale, block_m, block_n)
    dense = profile_walk.dense(call)
    order, before, kept, seen = ranked_rows(
        q, k, policy, rows, mask=mask, scale=scale, selector=selector,
        block_m=block_m, block_n=block_n,
    )  # fmt: skip
    error, computed, norm = profile_walk.tables(call, dense, order, kept, seen, lambdas)
    return Profile(rows, error, computed, before, norm, kept, seen)


def ranked_rows(
    q: Tensor,
    k: Tensor,
    policy: Tensor,
    rows: Tensor,
    *,
    mask: Mask,
    scale: float,
    selector: str,
    block_m: int,
    block_n: int,
    data: DataMask | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ranking` of some query blocks, and how many blocks are forced and visible `[B, H, R]`."""
    masked = blocked(data, mask, q.shape[2], k.shape[2], block_m=block_m, block_n=block_n)
    scores, gated = block_scores(
        q, k, policy, mask=mask, scale=scale, selector=selector, block_m=block_m, block_n=block_n,
        masked=masked,
    )  # fmt: skip
    scores, gated = scores[:, :, rows], gated[:, :, rows]
    if masked is not None:
        masked = masked.of_rows(rows)
    first = rows * block_m
    qb = Blocks(first, (first + (block_m - 1)).clamp(max=q.shape[2] - 1))
    kb = Blocks.of(k.shape[2], block_n, q.device)
    visible = head_visible(mask, policy, qb, kb).expand(scores.shape)
    if masked is not None:
        visible = visible & masked.some
    forced = forced_blocks(mask, policy, qb, kb, block_n, masked) | gated
    if masked is not None and masked.needed is not None:
        forced = forced | masked.needed
    forced = forced & visible
    order, before = ranking(scores, forced, visible)
    return order, before, forced.sum(-1, dtype=torch.int32), visible.sum(-1)


def ranking(scores: Tensor, forced: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Order in which blocks are kept, and the mass ranked before each droppable one.

    Returns:
        `order` int64 `[B, H, R, NK]`: forced blocks, then droppable ones by falling score, then
        invisible ones; `before` `[B, H, R, NK]` of the droppable ones, padded with +inf.
    """
    by_score = torch.argsort(scores, dim=-1, descending=True, stable=True)
    ranked = scores.gather(-1, by_score)
    mass = ranked.cumsum(-1) - ranked
    group = torch.where(forced, 0, torch.where(visible, 1, 2)).gather(-1, by_score)
    stable = torch.argsort(group, dim=-1, stable=True)
    mass = torch.where(group == 1, mass, torch.inf)
    droppable = torch.argsort((group != 1).to(torch.uint8), dim=-1, stable=True)
    return by_score.gather(-1, stable), mass.gather(-1, droppable)


def shift(error: Tensor, forced: Tensor) -> Tensor:
    """Drop the entries below the forced count: `[..., n]` becomes n droppable blocks kept."""
    columns = torch.arange(error.shape[-1], device=error.device) + forced[..., None]
    columns = columns.clamp(max=error.shape[-1] - 1).long()
    return error.gather(-1, columns.expand(error.shape))


def pad_keys(x: Tensor, block_n: int) -> Tensor:
    """fp32 copy of k or v, padded with zeros to whole key blocks."""
    return torch.nn.functional.pad(x.float(), (0, 0, 0, -x.shape[2] % block_n))
