"""What does a block of tokens look like on average? Mean pooling of q and k in one launch.

The oracles are `pool` and `similarity` of `kernels.scores`. The mean pairwise cosine of a block is
the squared norm of the mean of its unit vectors: one pass, no Gram matrix. Tokens are added up in
registers: a product with a pooling matrix would spread one token's NaN over its neighbours.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from afbs_compile.kernels.launch import aligned, launch
from afbs_compile.kernels.triton_common import (
    BUDGET,
    COLUMNS,
    LENGTHS,
    MODE,
    SPARSE,
    TAU,
    interpreted,
    rows_contiguous,
)

UNROLL = tl.constexpr(8)  # tokens whose loads are in flight at once


class Pooled(NamedTuple):
    """Means `[B, H, N, D']` of q and k, D padded with zeros, and self-similarities `[B, H, N]`."""

    q: Tensor
    k: Tensor
    q_similarity: Tensor
    k_similarity: Tensor


@triton.jit
def needs_scores(policy, h, count, GROUP: tl.constexpr):
    """Does one of the `count` heads from `h` on, at most GROUP, choose its blocks by score?"""
    g = tl.arange(0, GROUP)
    row = policy + (h + g) * COLUMNS
    mode = tl.load(row + MODE, g < count, 0.0)
    tau = tl.load(row + TAU, g < count, 1.0)
    budget = tl.load(row + BUDGET, g < count, 1.0)
    share = tl.where(budget > 0.0, budget, tau)
    return tl.max(((mode == SPARSE) & (share < 1.0)).to(tl.int32), 0)


@triton.jit
def column(n, FOLD: tl.constexpr):
    """Where the mean of sub-block `n` stands: the inverse of `kernels.triton_scores.sub_block`."""
    if FOLD > 1:
        wide: tl.constexpr = 4 * FOLD
        n = n // wide * wide + n % FOLD // 2 * 8 + n % wide // FOLD * 2 + n % 2
    return n


@triton.jit
def pool_tile(
    x_head, means, similarity, valid, n, stride_l, length, blocks, rows,
    D: tl.constexpr, D_PADDED: tl.constexpr, SIZE: tl.constexpr, FOLD: tl.constexpr,
    TILE: tl.constexpr, COSINE: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """Means of the blocks `n` of `SIZE` tokens; with `COSINE` |mean of unit vectors|² too.

    With `SOME` only the valid tokens count.
    """
    d = tl.arange(0, D_PADDED)
    total = tl.zeros([TILE, D_PADDED], tl.float32)
    units = tl.zeros([TILE, D_PADDED], tl.float32)
    tokens = tl.maximum(tl.minimum(length - n * SIZE, SIZE), 1).to(tl.float32)
    if SOME:
        tokens = tl.zeros([TILE], tl.float32)
    for start in range(0, SIZE, UNROLL):
        for step in tl.static_range(UNROLL):
            if step < SIZE:
                i = n * SIZE + start + step
                x_mask = (i < length)[:, None] & (d < D)[None, :]
                if SOME:
                    there = tl.load(valid + i, i < length, 0) != 0
                    x_mask &= there[:, None]
                    tokens += there.to(tl.float32)
                x = tl.load(x_head + i.to(tl.int64)[:, None] * stride_l + d[None, :], x_mask, 0.0)
                x = x.to(tl.float32)
                total += x
                if COSINE:
                    norm = tl.sqrt(tl.sum(x * x, 1))
                    units += x / tl.maximum(norm, 1e-12)[:, None]
    tokens = tl.maximum(tokens, 1.0)
    mean = (total / tokens[:, None]).to(means.dtype.element_ty)
    row = column(n, FOLD)
    tl.store(means + row[:, None] * D_PADDED + d[None, :], mean, mask=(n < rows)[:, None])
    if COSINE:
        units = units / tokens[:, None]
        tl.store(similarity + n, tl.sum(units * units, 1), mask=n < blocks)


@triton.jit(do_not_specialize=[*LENGTHS[:6], "rows_k", "programs_q", "stride_valid"])
def pool_kernel(
    Q, K, Q_MEANS, K_MEANS, Q_SIMILARITY, K_SIMILARITY, POLICY, VALID,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl,
    heads, group, length_q, length_k, blocks_q, blocks_k, rows_k, programs_q,
    stride_valid,
    D: tl.constexpr, D_PADDED: tl.constexpr, SIZE_Q: tl.constexpr, SIZE_K: tl.constexpr,
    FOLD: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, COSINE: tl.constexpr,
    SOME: tl.constexpr,
):  # fmt: skip
    """`TILE` blocks of one head of q or of k; nothing for a head whose blocks need no scores."""
    pid = tl.program_id(0)
    if pid < programs_q:
        tiles = tl.cdiv(blocks_q, TILE)
        bh = (pid // tiles).to(tl.int64)
        if needs_scores(POLICY, bh % heads, 1, GROUP) > 0:
            n = pid % tiles * TILE + tl.arange(0, TILE)
            x_head = Q + bh // heads * stride_qb + bh % heads * stride_qh
            means = Q_MEANS + bh * blocks_q * D_PADDED
            pool_tile(
                x_head, means, Q_SIMILARITY + bh * blocks_q, VALID, n, stride_ql, length_q,
                blocks_q, blocks_q, D, D_PADDED, SIZE_Q, 1, TILE, COSINE, False,
            )  # fmt: skip
    else:
        tiles = tl.cdiv(rows_k, TILE)
        bh = ((pid - programs_q) // tiles).to(tl.int64)
        kv_heads = heads // group
        if needs_scores(POLICY, bh % kv_heads * group, group, GROUP) > 0:
            n = (pid - programs_q) % tiles * TILE + tl.arange(0, TILE)
            x_head = K + bh // kv_heads * stride_kb + bh % kv_heads * stride_kh
            means = K_MEANS + bh * rows_k * D_PADDED
            pool_tile(
                x_head, means, K_SIMILARITY + bh * blocks_k,
                VALID + bh // kv_heads * stride_valid, n, stride_kl, length_k, blocks_k,
                rows_k, D, D_PADDED, SIZE_K, FOLD, TILE, COSINE, SOME,
            )  # fmt: skip


def tiling(padded: int, cosine: bool) -> tuple[int, int]:
    """Blocks of a program and its warps; long blocks take few, so that there are many programs."""
    return (max(1, 256 // padded), 1) if cosine else (max(2, 1024 // padded), 4)


def pooled_width(q: Tensor) -> tuple[int, int]:
    """Columns of the means, D padded to a power of two, and bytes of an element."""
    padded = max(16, triton.next_power_of_2(q.shape[-1]))
    return padded, 4 if interpreted() else q.element_size()


def pool(
    q: Tensor,
    k: Tensor,
    policy: Tensor,
    *,
    size_q: int,
    size_k: int,
    fold_k: int,
    step_k: int,
    cosine: bool,
    valid: Tensor | None = None,
) -> Pooled:
    """Means of blocks of q and k, and with `cosine` their self-similarity.

    Args:
        q: `[B, Hq, Lq, D]`, any strides.
        k: `[B, Hkv, Lk, D]`, any strides.
        policy: float32 `[Hq, COLUMNS]`, contiguous; heads that need no scores are left undefined.
        size_q: Tokens of a block of q; 4 or a multiple of 8.
        size_k: Tokens of a block of k.
        fold_k: Blocks of k that are added up later; above 1 they are ordered for that.
        step_k: The means of k are filled up with zeros, so that this many can be read anywhere.
        cosine: Whether the self-similarity is wanted; undefined if not.
        valid: uint8 `[B', Lk]`, contiguous: keys that count. All if None.

    Returns:
        Means in q's dtype (fp32 under the interpreter), self-similarities in fp32.
    """
    q, k = rows_contiguous(q), rows_contiguous(k)
    (batch, heads, length_q, dim), (_, kv_heads, length_k, _) = q.shape, k.shape
    blocks_q, blocks_k = -(-length_q // size_q), -(-length_k // size_k)
    rows_k = (-(-blocks_k // step_k) + 1) * step_k  # a step may start anywhere
    padded, _ = pooled_width(q)
    tile, warps = tiling(padded, cosine)
    dtype = torch.float32 if interpreted() else q.dtype
    made = Pooled(
        torch.empty(batch, heads, blocks_q, padded, dtype=dtype, device=q.device),
        torch.empty(batch, kv_heads, rows_k, padded, dtype=dtype, device=q.device),
        *(
            torch.empty((batch, h, n) if cosine else (1,), dtype=torch.float32, device=q.device)
            for h, n in ((heads, blocks_q), (kv_heads, blocks_k))
        ),
    )
    programs_q = batch * heads * -(-blocks_q // tile)
    programs = programs_q + batch * kv_heads * -(-rows_k // tile)
    group = heads // kv_heads
    key = (
        pool_kernel, q.device.index, q.dtype, k.dtype, q.shape, q.stride(), k.shape, k.stride(),
        size_q, size_k, fold_k, step_k, cosine, aligned(q), aligned(k), aligned(policy),
        valid is not None and (valid.shape, aligned(valid)),
    )  # fmt: skip
    launch(
        pool_kernel, key, q.device, programs,
        (q, k, *made, policy, policy if valid is None else valid, *q.stride()[:3],
         *k.stride()[:3], heads, group, length_q, length_k, blocks_q, blocks_k, rows_k,
         programs_q, length_k if valid is not None and valid.shape[0] > 1 else 0),
        D=dim, D_PADDED=padded, SIZE_Q=size_q, SIZE_K=size_k, FOLD=fold_k, TILE=tile,
        GROUP=triton.next_power_of_2(group), COSINE=cosine, SOME=valid is not None,
        num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    return made
