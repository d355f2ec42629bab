"""What do dropped blocks add to the output? Each stands as one key and one value: its tangent.

Key block J, dropped by query block I, is seen from the mean query c of I (s is the site's scale):
p = softmax of s c·k_t over t in J, k̂ = Σ p k_t, v̂ = Σ p v_t, b = LSE_t(s c·k_t) − s c·k̂. Row i
gives it the logit s q_i·k̂ + b, which is the tangent at c of the block's log-mass as a function of
the query: it is exact at c and, the log-mass being convex, never too large. Kept blocks have no
such column. A block that some row sees only in part and that was dropped all the same (the left
edge of a site's window) has none either: it is simply left out, as every block is without
compensation.

This is the plain-torch version: what runs on a CPU, and the oracle of `triton_compensation`.
"""

import math

import torch
from torch import Tensor

from afbs_compile.kernels.geometry import Blocks, Mask, head_full
from afbs_compile.kernels.lists import to_keep
from afbs_compile.kernels.scores import pool

COMPENSATIONS = ("none", "tangent")
CHUNK_ELEMENTS = 1 << 21  # numbers held at once: what a cache holds, at any length


def known(compensation: str) -> str:
    """The name itself.

    Raises:
        ValueError: It is none of `COMPENSATIONS`.
    """
    if compensation not in COMPENSATIONS:
        raise ValueError(
            f"unknown compensation {compensation!r}: use one of {', '.join(COMPENSATIONS)}"
        )
    return compensation


def dropped_blocks(
    counts: Tensor,
    indices: Tensor,
    policy: Tensor,
    *,
    mask: Mask,
    length_q: int,
    length_k: int,
    block_m: int,
    block_n: int,
) -> Tensor:
    """Bool `[B, Hq, NQ, NK]`: blocks that every row sees whole and that are not listed."""
    qb = Blocks.of(length_q, block_m, counts.device)
    kb = Blocks.of(length_k, block_n, counts.device)
    return head_full(mask, policy, qb, kb) & ~to_keep(counts, indices)


def attend(
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
) -> tuple[Tensor, Tensor] | None:
    """Attention over the columns of the dropped blocks alone; not for a GPU, which would wait.

    Arguments as in `kernels.reference.forward`.

    Returns:
        `o` `[B, Hq, Lq, D]` and `lse` `[B, Hq, Lq]`, natural log, both fp32; a row without such a
        column is 0 with lse −inf. None if no row has one.
    """
    drop = dropped_blocks(
        counts, indices, policy, mask=mask, length_q=q.shape[2], length_k=k.shape[2],
        block_m=block_m, block_n=block_n,
    )  # fmt: skip
    if not drop.any():
        return None
    batch, heads, length_q, dim = q.shape
    keys, values = (key_blocks(x, block_n) for x in (k, v))
    o = torch.zeros(batch, heads, length_q, dim, device=q.device)
    lse = torch.full((batch, heads, length_q), -math.inf, device=q.device)
    one_row = batch * heads * (2 * k.shape[2] + 4 * dim * keys.shape[2] + block_m * keys.shape[2])
    chunk = max(1, CHUNK_ELEMENTS // one_row)  # query blocks at once
    for first in range(0, drop.shape[2], chunk):
        part = drop[:, :, first : first + chunk]
        hit = part.any(2).any(0).any(0).nonzero()
        if not len(hit):
            continue
        reach = int(hit[-1]) + 1
        rows = slice(first * block_m, min((first + chunk) * block_m, length_q))
        o[:, :, rows], lse[:, :, rows] = attend_rows(
            q[:, :, rows], keys[:, :, :reach], values[:, :, :reach], part[..., :reach],
            k.shape[2], scale, block_m,
        )  # fmt: skip
    return o, lse


def key_blocks(x: Tensor, block_n: int) -> Tensor:
    """Keys or values in fp32 by key blocks, filled up with zeros: `[B, Hkv, NK, block_n, D]`."""
    filled = torch.nn.functional.pad(x.float(), (0, 0, 0, -x.shape[2] % block_n))
    return torch.unflatten(filled, 2, (-1, block_n))


def attend_rows(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    drop: Tensor,
    length_k: int,
    scale: float,
    block_m: int,
) -> tuple[Tensor, Tensor]:
    """`attend` for C query blocks, the last of which may be short; drop `[B, Hq, C, NK]`."""
    batch, _, length, dim = q.shape
    kv_heads, blocks = keys.shape[1], drop.shape[2]
    centre = pool(q, block_m).view(batch, kv_heads, -1, dim)
    columns = tangents(centre, keys, values, length_k, scale)
    # [B, Hkv, NK, G·C, …] to [B, Hq, C, NK, …]; a NaN in another block must not leak through 0·NaN
    khat, vhat, bias = (
        torch.unflatten(x, 3, (-1, blocks)).movedim(2, 4).reshape(*drop.shape, -1) for x in columns
    )
    khat, vhat = (x.masked_fill_(~drop[..., None], 0) for x in (khat, vhat))
    bias = bias[..., 0].masked_fill_(~drop, -math.inf)
    short = blocks * block_m - length
    rows = torch.nn.functional.pad(q.float(), (0, 0, 0, short))
    rows = torch.unflatten(rows, 2, (blocks, block_m))
    s = (rows @ khat.transpose(-1, -2)).mul_(scale).add_(bias[:, :, :, None])
    p, total, lse = weights(s)
    o = (p @ vhat).div_(total.clamp(min=1e-30))
    lse = lse[..., 0]
    return o.flatten(2, 3)[:, :, :length], lse.flatten(2, 3)[:, :, :length]


def tangents(
    centre: Tensor, keys: Tensor, values: Tensor, length_k: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """k̂, v̂ `[B, Hkv, NK, R, D]` and b `[B, Hkv, NK, R, 1]` of all key blocks, fp32.

    Args:
        centre: R mean queries of the heads that share a kv head, fp32 `[B, Hkv, R, D]`.
        keys: From `key_blocks`.
        values: From `key_blocks`.
        length_k: Keys there are; what lies past them has no mass.
        scale: Multiplier on q·k.
    """
    s = (centre[:, :, None] @ keys.transpose(-1, -2)).mul_(scale)
    position = torch.arange(keys.shape[2] * keys.shape[3], device=keys.device)
    s.masked_fill_((position >= length_k).view(keys.shape[2], 1, keys.shape[3]), -math.inf)
    p, total, mass = weights(s)
    khat, vhat = ((p @ x).div_(total) for x in (keys, values))
    return khat, vhat, mass - scale * (centre[:, :, None] * khat).sum(-1, keepdim=True)


def contributions(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    whole: Tensor,
    top: Tensor,
    length_k: int,
    scale: float,
    block_n: int,
) -> tuple[Tensor, Tensor]:
    """What the tangent of every key block would contribute to the rows of one query block.

    Args:
        q: `[B, Hq, M, D]`.
        k: fp32 `[B, Hkv, J·block_n, D]`.
        v: fp32 `[B, Hkv, J·block_n, D]`.
        whole: Bool `[Hq, J]`; other blocks contribute nothing.
        top: What the logits of a row are relative to, `[B, Hq, M]`.
        length_k: Keys there are; the rest is filling.
        scale: Multiplier on q·k.
        block_n: Key block, tokens.

    Returns:
        Weight `[B, Hq, J, M]` and weighted value `[B, Hq, J, M, D]`.
    """
    grouped = torch.unflatten(q.float(), 1, (k.shape[1], -1))
    keys, values = (torch.unflatten(x, 2, (-1, block_n)) for x in (k, v))
    khat, vhat, bias = (
        x.movedim(3, 2) for x in tangents(grouped.mean(3), keys, values, length_k, scale)
    )
    s = (khat @ grouped.transpose(-1, -2)).mul_(scale).add_(bias).flatten(1, 2)
    weight = s.sub_(top[:, :, None]).masked_fill_(~whole[..., None], -math.inf).exp_()
    return weight, weight[..., None] * vhat.flatten(1, 2)[..., None, :]


def weights(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of scores, which are overwritten: exp(s − maximum), its sum, the lse; over the last axis."""
    top = s.amax(-1, keepdim=True).clamp_(min=-1e30)
    p = s.sub_(top).exp_()
    total = p.sum(-1, keepdim=True)
    return p, total, top + total.log()
