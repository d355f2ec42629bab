"""Block-sparse attention on a CPU: our block lists on compiled FlexAttention.

FlexAttention skips unlisted blocks when compiled, on a CPU too (2.8x over dense SDPA in fp32 with
a third of the blocks kept at 4096 tokens). Blocks in which every pair is visible go into its
`full` lists, where no mask is evaluated. Offset, windows and sinks are captured tensors and the
lengths are symbolic, so one compilation serves every length.

On a CPU FlexAttention gives no lse. To take in attention over other columns all the same (those
of `kernels.compensation`), each row gets one key more, whose logit is the lse of those columns and
whose value is 0; a value column of its own tells the weight that the key was given.
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
    beside: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention over block lists; arguments as in `kernels.reference.forward`.

    `beside` is the output `[B, Hq, Lq, D]` and the lse `[B, Hq, Lq]`, both fp32, of attention over
    other keys that stand in the same softmax.

    Returns:
        `o` `[B, Hq, Lq, D]` in q's dtype.
    """
    qb, kb = Blocks.of(q.shape[2], block_m, q.device), Blocks.of(k.shape[2], block_n, q.device)
    keep = to_keep(counts, indices)
    # a short last key block is partial: FlexAttention reads whole blocks
    whole = kb.last - kb.first + 1 == block_n
    full = head_full(mask, policy, qb, kb) & whole
    q, k, v = q.detach(), k.detach(), v.detach()  # FlexAttention looks at requires_grad alone
    batch, heads, _, dim = q.shape
    kind = (min(batch, 2), heads, k.shape[1], dim, q.dtype, block_m, block_n)
    if beside is None:
        lists = (*from_keep(keep & ~full), *from_keep(keep & full))
        out: Tensor = fused(attend, kind)(
            q, k, v, *lists, *limits(policy, mask), block_m, block_n, scale
        )
        return out
    other, lse = beside
    partial = torch.cat([keep & ~full, has_column(lse, block_m)], -1)
    full = torch.nn.functional.pad(keep & full, (0, 1))
    ends = torch.tensor([k.shape[2], len(kb) * block_n])
    out = fused(attend_beside, kind)(
        q, *with_key(k, v, block_n), *from_keep(partial), *from_keep(full), *limits(policy, mask),
        lse, ends, block_m, block_n, scale,
    )  # fmt: skip
    return (out[..., :dim] + out[..., dim:] * other).to(q.dtype)


def with_key(k: Tensor, v: Tensor, block_n: int) -> tuple[Tensor, Tensor]:
    """Both with a block of one key more; its value is 1 in a column more, where others are 0."""
    short = -k.shape[2] % block_n
    k = torch.nn.functional.pad(k, (0, 0, 0, short + 1))
    v = torch.nn.functional.pad(v, (0, 1, 0, short + 1))
    v[:, :, -1, -1] = 1
    return k, v


def has_column(lse: Tensor, block_m: int) -> Tensor:
    """Bool `[B, H, NQ, 1]`: does a row of the query block have anything beside the lists?"""
    rows = torch.nn.functional.pad(lse, (0, -lse.shape[2] % block_m), value=-torch.inf)
    return torch.unflatten(rows != -torch.inf, 2, (-1, block_m)).any(-1, keepdim=True)


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


def attend_beside(
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
    lse: Tensor,
    ends: Tensor,
    block_m: int,
    block_n: int,
    scale: float,
) -> Tensor:
    """`attend` with the key of `with_key`; `ends` is the number of keys, and its position."""

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        site = (j <= i + high[h]) & (j > i + low[h]) & (j < ends[0])
        return (site & ((j > i + near[h]) | (j < sink[h]))) | (j >= ends[1])

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(j >= ends[1], lse[b, h, i], s)

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
    return flex_attention(q, k, v, score, block_mask, scale, enable_gqa=True)
