"""Block-sparse attention on a CPU: our block lists on compiled FlexAttention.

FlexAttention skips unlisted blocks when compiled, on a CPU too (2.8x over dense SDPA in fp32 with
a third of the blocks kept at 4096 tokens). Blocks in which every pair is visible go into its
`full` lists, where no mask is evaluated. Offset, windows and sinks are captured tensors and the
lengths are symbolic, so one compilation serves every length.

On a CPU FlexAttention gives no lse. To take in attention over other columns all the same (those of
`kernels.compensation`), each row gets one key more, whose logit is the lse of those columns and
whose value is 0; a value column of its own tells the weight that the key was given.
"""

import math

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from afbs_compile.kernels.data_mask import MaskedBlocks
from afbs_compile.kernels.fused import fused
from afbs_compile.kernels.geometry import Blocks, Mask, head_full, window_columns
from afbs_compile.kernels.lists import from_keep, to_keep

UNLIMITED = 1 << 30
PARTS = {torch.float32: 1, torch.float16: 3, torch.bfloat16: 3}  # numbers that hold an fp32 one
MORE = 16  # columns that make room for them: odd head dims are slower


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
    masked: MaskedBlocks | None = None,
) -> Tensor:
    """Attention over block lists; arguments as in `kernels.reference.forward`.

    `beside` is the output `[B, Hq, Lq, D]` and the lse `[B, Hq, Lq]`, both fp32, of attention over
    other keys that stand in the same softmax; a query block has either no such rows (lse −inf) or
    no others. `masked` is the part of the mask that comes with the call; not both.

    Returns:
        `o` `[B, Hq, Lq, D]` in q's dtype.
    """
    qb, kb = Blocks.of(q.shape[2], block_m, q.device), Blocks.of(k.shape[2], block_n, q.device)
    keep = to_keep(counts, indices)
    # a short last key block is partial: FlexAttention reads whole blocks
    whole = kb.last - kb.first + 1 == block_n
    full = head_full(mask, policy, qb, kb) & whole
    elements = None
    if masked is not None:
        full = full & masked.every
        elements = fixed(masked.data.tokens(0, q.shape[2]))
    partial, full = keep & ~full, keep & full
    q, k, v = q.detach(), k.detach(), v.detach()  # FlexAttention looks at requires_grad alone
    batch, heads, _, dim = q.shape
    ends = None
    if beside is not None:
        partial = torch.cat([partial, has_key(beside[1], block_m)], -1)
        full = torch.nn.functional.pad(full, (0, 1))
        ends = torch.tensor([k.shape[2], len(kb) * block_n])
        q, k, v, scale = with_key(q, k, v, beside[1], scale, block_n)
    kind = (min(batch, 2), heads, k.shape[1], dim, q.dtype, block_m, block_n, ends is None)
    out: Tensor = fused(attend, (*kind, *(() if elements is None else elements.shape)))(
        q, k, v, *from_keep(partial), *from_keep(full), *limits(policy, mask),
        block_m, block_n, scale, ends, elements,
    )  # fmt: skip
    if beside is None:
        return out
    return (out[..., :dim] + out[..., dim : dim + 1] * beside[0]).to(q.dtype)


def fixed(tokens: Tensor) -> Tensor:
    """A bool `[B', H', M, Lk]` with both lengths raised to powers of two, of static shape.

    Inductor takes one symbolic size for another in what a `mask_mod` captures: it replaces names
    that are prefixes of others. So each power of two has a compilation of its own.
    """
    sizes = [n if n == 1 else 1 << (n - 1).bit_length() for n in tokens.shape[2:]]
    result = tokens.new_zeros(*tokens.shape[:2], *sizes)
    result[:, :, : tokens.shape[2], : tokens.shape[3]] = tokens
    torch._dynamo.mark_static(result)
    return result


def has_key(lse: Tensor, block_m: int) -> Tensor:
    """Bool `[B, H, NQ, 1]`: has the query block anything beside the lists?"""
    rows = torch.nn.functional.pad(lse, (0, -lse.shape[2] % block_m), value=-math.inf)
    return torch.unflatten(rows != -math.inf, 2, (-1, block_m)).any(-1, keepdim=True)


def with_key(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, scale: float, block_n: int
) -> tuple[Tensor, Tensor, Tensor, float]:
    """The call with a block of one key more, whose logit is `lse`: `(q, k, v, scale)`.

    Its value is 1 in the first of the columns that v gets more, where those of others are 0. The
    logit travels in columns of q that only this key reads, as a sum of numbers of q's dtype: a
    `score_mod` would have to capture a tensor of symbolic size, which Inductor gets wrong.
    """
    if scale == 0:
        q, scale = torch.zeros_like(q), 1.0
    rest, parts = lse.masked_fill(lse == -math.inf, 0)[..., None] / scale, []
    room = q.new_zeros(*q.shape[:3], MORE - PARTS[q.dtype])
    for _ in range(PARTS[q.dtype]):
        parts.append(rest.to(q.dtype))
        rest = rest - parts[-1].float()
    more = (0, MORE, 0, -k.shape[2] % block_n + 1)
    k, v = torch.nn.functional.pad(k, more), torch.nn.functional.pad(v, more)
    k[:, :, -1, q.shape[3] : q.shape[3] + len(parts)] = 1
    v[:, :, -1, q.shape[3]] = 1
    return torch.cat([q, *parts, room], -1), k, v, scale


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
    ends: Tensor | None = None,
    elements: Tensor | None = None,
) -> Tensor:
    """The function that is compiled: FlexAttention over partial and full lists.

    `ends` is the number of keys and the position of the key of `with_key`, if there is one;
    `elements` is from `fixed`.
    """

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        site = (j <= i + high[h]) & (j > i + low[h])
        seen = site & ((j > i + near[h]) | (j < sink[h]))
        if elements is not None:
            at = (x if n > 1 else 0 for x, n in zip((b, h, i), elements.shape, strict=False))
            seen = seen & elements[*at, j]
        return seen if ends is None else seen & (j < ends[0]) | (j >= ends[1])

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
