"""What is block-sparse attention, exactly? The fp32 oracle of every kernel, in plain torch.

Walks the query blocks, gathers the listed key blocks, masks token by token. Slow on purpose.
"""

import math

import torch
from torch import Tensor

from afbs_compile.kernels.data_mask import DataMask
from afbs_compile.kernels.geometry import Mask, token_visible
from afbs_compile.kernels.lists import to_keep


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
    data: DataMask | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over block lists.

    Args:
        q: `[B, Hq, Lq, D]`.
        k: `[B, Hkv, Lk, D]`.
        v: `[B, Hkv, Lk, D]`.
        counts: int32 `[B, Hq, NQ]`.
        indices: int32 `[B, Hq, NQ, NK]`.
        policy: float32 `[Hq, COLUMNS]`; windows and sinks of windowed heads are read.
        mask: The site's mask.
        scale: Multiplier on q·k.
        block_m: Query block, tokens.
        block_n: Key block, tokens.
        data: The part of the mask that comes with the call.

    Returns:
        `o` in q's dtype, `[B, Hq, Lq, D]`, and `lse` fp32 `[B, Hq, Lq]`, natural log. A row that
        sees nothing is 0 with lse −inf.
    """
    group = q.shape[1] // k.shape[1]
    kf, vf = (t.float().repeat_interleave(group, 1) for t in (k, v))
    kept = to_keep(counts, indices).repeat_interleave(block_n, -1)[..., : k.shape[2]]
    j = torch.arange(k.shape[2], device=q.device)
    outputs, lses = [], []
    for n, start in enumerate(range(0, q.shape[2], block_m)):
        rows = q[:, :, start : start + block_m].float()
        i = torch.arange(start, start + rows.shape[2], device=q.device)
        seen = token_visible(mask, policy, i, j) & kept[:, :, n, None]
        if data is not None:
            seen = seen & data.tokens(start, start + block_m)
        scores = rows @ kf.transpose(-1, -2) * scale
        bias = None if data is None else data.rows_added(start, start + block_m)
        if bias is not None:
            scores = scores + bias
        scores = scores.masked_fill(~seen, -math.inf)
        lse = scores.logsumexp(-1)
        # a row may see nothing, or nothing but the lowest of numbers
        top = scores.amax(-1, keepdim=True)
        p = torch.exp(scores - top.masked_fill(top == -math.inf, 0))
        p = p / p.sum(-1, keepdim=True).clamp(min=1e-30)
        # a key that no row of the block sees must not leak its NaN through 0 * NaN
        values = vf.masked_fill(~seen.any(2)[..., None], 0)
        outputs.append(p.masked_fill(~seen, 0) @ values)
        lses.append(lse)
    return torch.cat(outputs, 2).to(q.dtype), torch.cat(lses, 2)


def backward(
    do: Tensor,
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
    data: DataMask | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward`, by autograd: `dq`, `dk`, `dv` in fp32.

    Arguments as in `forward`; `do` is the gradient of o.
    """
    q, k, v = (x.detach().float().requires_grad_() for x in (q, k, v))
    with torch.enable_grad():
        o, _ = forward(
            q, k, v, counts, indices, policy,
            mask=mask, scale=scale, block_m=block_m, block_n=block_n, data=data,
        )  # fmt: skip
        dq, dk, dv = torch.autograd.grad(o, (q, k, v), do.float())
    return dq, dk, dv
