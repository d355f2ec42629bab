"""Block-sparse attention on a CPU: our block lists on compiled FlexAttention.

FlexAttention skips unlisted blocks when compiled, on a CPU too (2.8x over dense SDPA in fp32 with
a third of the blocks kept at 4096 tokens). Blocks in which every pair is visible go into its
`full` lists, where no mask is evaluated. Offset, windows and sinks are captured tensors and the
lengths are symbolic, so one compilation serves every length.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from afbs_compile.kernels.fused import fused
from afbs_compile.kernels.geometry import Blocks, Mask, head_full, window_columns
from afbs_compile.kernels.lists import from_keep, to_keep

UNLIMITED = 1 << 30


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    policy: Tensor,
    *,
    mask: Mask,
    scale: float,
    block_m: int,
    block_n: int,
) -> Tensor:
    """Attention over block lists; arguments as in `kernels.reference.forward`.

    Returns:
        `o` `[B, Hq, Lq, D]` in q's dtype.
    """
    qb, kb = Blocks.of(q.shape[2], block_m, q.device), Blocks.of(k.shape[2], block_n, q.device)
    keep = to_keep(counts, indices)
    # a short last key block is partial: FlexAttention reads whole blocks
    whole = kb.last - kb.first + 1 == block_n
    full = head_full(mask, policy, qb, kb) & whole
    lists = (*from_keep(keep & ~full), *from_keep(keep & full))
    q, k, v = q.detach(), k.detach(), v.detach()  # FlexAttention looks at requires_grad alone
    batch, heads, _, dim = q.shape
    run = fused(attend, (min(batch, 2), heads, k.shape[1], dim, q.dtype, block_m, block_n))
    out: Tensor = run(q, k, v, *lists, *limits(policy, mask), block_m, block_n, scale)
    return out


def limits(policy: Tensor, mask: Mask) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per head int64 `[H]`: lower and upper edge of the site, lower edge and sink of the head.

    Query i sees key j iff `i + low < j <= i + high` and `j > i + near or j < sink`.
    """
    windowed, window, sink = (c.flatten() for c in window_columns(policy))
    high = torch.full_like(window, mask.offset if mask.causal else UNLIMITED)
    low = torch.full_like(window, mask.offset - mask.window if mask.window else -UNLIMITED)
    near = torch.where(windowed, mask.offset - window, -UNLIMITED)
    return low, high, near, torch.where(windowed, sink, 0)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    partial_counts: Tensor,
    partial_indices: Tensor,
    full_counts: Tensor,
    full_indices: Tensor,
    low: Tensor,
    high: Tensor,
    near: Tensor,
    sink: Tensor,
    block_m: int,
    block_n: int,
    scale: float,
) -> Tensor:
    """The function that is compiled: FlexAttention over partial and full lists."""

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        site = (j <= i + high[h]) & (j > i + low[h])
        return site & ((j > i + near[h]) | (j < sink[h]))

    block_mask = BlockMask.from_kv_blocks(
        partial_counts,
        partial_indices,
        full_counts,
        full_indices,
        BLOCK_SIZE=(block_m, block_n),
        mask_mod=visible,
        seq_lengths=(q.shape[2], k.shape[2]),
        compute_q_blocks=False,
    )
    return flex_attention(q, k, v, block_mask=block_mask, scale=scale, enable_gqa=True)
