"""What does a block of tokens look like on average? Mean pooling of q or k in Triton.

The oracles are `pool` and `similarity` of `kernels.scores`. The mean pairwise cosine of a block is
the squared norm of the mean of its unit vectors: one pass, no Gram matrix.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from afbs_compile.kernels.triton_common import rows_contiguous


@triton.jit(do_not_specialize=["heads", "length", "blocks"])
def pool_kernel(
    X, MEANS, SIMILARITY, stride_b, stride_h, stride_l, heads, length, blocks,
    D: tl.constexpr, D_PADDED: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
    COSINE: tl.constexpr,
):  # fmt: skip
    """Means of `SIZE` tokens and, with `COSINE`, |mean of unit vectors|²: `TILE` blocks each."""
    tiles = tl.cdiv(blocks, TILE)
    pid = tl.program_id(0)
    bh = pid // tiles
    n = pid % tiles * TILE + tl.arange(0, TILE)
    d = tl.arange(0, D_PADDED)
    x_head = X + (bh // heads).to(tl.int64) * stride_b + (bh % heads).to(tl.int64) * stride_h
    total = tl.zeros([TILE, D_PADDED], tl.float32)
    units = tl.zeros([TILE, D_PADDED], tl.float32)
    UNROLL: tl.constexpr = 4
    for start in range(0, SIZE, UNROLL):
        for step in tl.static_range(UNROLL):
            i = n * SIZE + start + step
            x_mask = (i < length)[:, None] & (d < D)[None, :]
            x = tl.load(x_head + i.to(tl.int64)[:, None] * stride_l + d[None, :], x_mask, 0.0)
            x = x.to(tl.float32)
            total += x
            if COSINE:
                norm = tl.sqrt(tl.sum(x * x, 1))
                units += x / tl.maximum(norm, 1e-12)[:, None]
    tokens = tl.maximum(tl.minimum(length - n * SIZE, SIZE), 1).to(tl.float32)
    out = bh.to(tl.int64) * blocks + n
    means = total / tokens[:, None]
    tl.store(MEANS + out[:, None] * D_PADDED + d[None, :], means, mask=(n < blocks)[:, None])
    if COSINE:
        units = units / tokens[:, None]
        tl.store(SIMILARITY + out, tl.sum(units * units, 1), mask=n < blocks)


def pool(x: Tensor, size: int, *, cosine: bool) -> tuple[Tensor, Tensor]:
    """Means of blocks of `size` tokens, and with `cosine` their self-similarity.

    Args:
        x: `[B, H, L, D]`, any strides.
        size: Tokens of a block, a multiple of 4.
        cosine: Whether the self-similarity is wanted; undefined if not.

    Returns:
        Means fp32 `[B, H, N, D']`, D padded with zeros to a power of two, and fp32 `[B, H, N]`.
    """
    x = rows_contiguous(x)
    batch, heads, length, dim = x.shape
    blocks, padded = triton.cdiv(length, size), max(16, triton.next_power_of_2(dim))
    tile = max(4, 2048 // padded)
    means = torch.empty(batch, heads, blocks, padded, dtype=torch.float32, device=x.device)
    similarity = torch.empty(means.shape[:3], dtype=torch.float32, device=x.device)
    pool_kernel[(batch * heads * triton.cdiv(blocks, tile),)](
        x, means, similarity, *x.stride()[:3], heads, length, blocks,
        D=dim, D_PADDED=padded, SIZE=size, TILE=tile, COSINE=cosine,
        enable_fp_fusion=True,
    )  # fmt: skip
    return means, similarity
