"""What would every tau cost? Exact error and density of all thresholds from one dense pass.

For a query block, block partials `exp(S_j - max) V_j` are summed in the order in which the
selector would keep the blocks (forced first, then by score), so that the output after keeping n
blocks is a prefix sum. Its distance to the dense output is the error of every tau that keeps n
blocks. One pass costs a few dense ones and replaces every further evaluation of tau.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from afbs_compile.kernels.geometry import Blocks, Mask, head_visible, token_visible
from afbs_compile.kernels.scores import block_scores
from afbs_compile.kernels.selection import forced_blocks


@dataclass(frozen=True, slots=True)
class Profile:
    """Tables of R profiled query blocks, N = most blocks any of them could drop.

    Attributes:
        rows: int64 `[R]`, which query blocks.
        error: fp32 `[B, H, R, N + 1]`, Σ|o − o*| after keeping the forced and the n best blocks.
        before: fp32 `[B, H, R, N]`, score mass ranked before the n-th droppable block; +inf pads.
        norm: fp32 `[B, H, R]`, Σ|o*|.
        forced: int32 `[B, H, R]`, blocks that are kept whatever tau is.
        visible: int32 `[H, R]`, blocks that are visible.
    """

    rows: Tensor
    error: Tensor
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
    """
    scores, gated = block_scores(
        q, k, policy, mask=mask, scale=scale, selector=selector, block_m=block_m, block_n=block_n
    )
    qb, kb = Blocks.of(q.shape[2], block_m, q.device), Blocks.of(k.shape[2], block_n, q.device)
    visible = head_visible(mask, policy, qb, kb)
    forced = (forced_blocks(mask, policy, qb, kb, block_n) | gated) & visible
    if rows is None:
        rows = torch.arange(len(qb), device=q.device)
    order, before = ranking(scores[:, :, rows], forced[:, :, rows], visible[:, rows])
    kf, vf = pad_keys(k, block_n), pad_keys(v, block_n)
    errors, norms = [], []
    for r, row in enumerate(rows.tolist()):
        i = torch.arange(row * block_m, min((row + 1) * block_m, q.shape[2]), device=q.device)
        error, norm = row_errors(q[:, :, i], i, kf, vf, k.shape[2], order[:, :, r], policy,
                                 mask=mask, scale=scale, block_n=block_n)  # fmt: skip
        errors.append(error)
        norms.append(norm)
    kept = forced[:, :, rows].sum(-1, dtype=torch.int32)
    error = shift(torch.stack(errors, 2), kept)
    return Profile(rows, error, before, torch.stack(norms, 2), kept, visible[:, rows].sum(-1))


def ranking(scores: Tensor, forced: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Order in which blocks are kept, and the mass ranked before each droppable one.

    Returns:
        `order` int64 `[B, H, R, NK]`: forced blocks, then droppable ones by falling score, then
        invisible ones; `before` `[B, H, R, NK]` of the droppable ones, padded with +inf.
    """
    by_score = torch.argsort(scores, dim=-1, descending=True, stable=True)
    ranked = scores.gather(-1, by_score)
    mass = ranked.cumsum(-1) - ranked
    seen = visible.expand(scores.shape)
    group = torch.where(forced, 0, torch.where(seen, 1, 2)).gather(-1, by_score)
    stable = torch.argsort(group, dim=-1, stable=True)
    mass = torch.where(group == 1, mass, torch.inf)
    droppable = torch.argsort((group != 1).to(torch.uint8), dim=-1, stable=True)
    return by_score.gather(-1, stable), mass.gather(-1, droppable)


def row_errors(
    q: Tensor,
    i: Tensor,
    k: Tensor,
    v: Tensor,
    length_k: int,
    order: Tensor,
    policy: Tensor,
    *,
    mask: Mask,
    scale: float,
    block_n: int,
) -> tuple[Tensor, Tensor]:
    """Errors of one query block: `[B, H, NK + 1]` by blocks kept, and Σ|o*| `[B, H]`.

    q is `[B, Hq, M, D]` (rows i), k and v `[B, Hkv, NK·block_n, D]`, order `[B, Hq, NK]`.
    """
    batch, heads, m, dim = q.shape
    kv_heads, blocks = k.shape[1], k.shape[2] // block_n
    reach = blocks
    if mask.causal:  # blocks past the diagonal are rank last: leave them out of the arithmetic
        reach = max(1, min(blocks, (int(i[-1]) + mask.offset) // block_n + 1))
    j = torch.arange(reach * block_n, device=q.device)
    seen = token_visible(mask, policy, i, j) & (j < length_k)
    grouped = q.float().reshape(batch, kv_heads, -1, dim)
    s = (grouped @ k[:, :, : len(j)].transpose(-1, -2)).view(batch, heads, m, -1)
    s = (s * scale).masked_fill_(~seen, -torch.inf)
    top = s.amax(-1, keepdim=True).clamp(min=-1e30)
    p = s.sub_(top).exp_().view(batch, heads, m, reach, block_n).transpose(2, 3)
    weight = p.sum(-1)  # [B, H, reach, M]
    values = v[:, :, : len(j)].view(batch, kv_heads, reach, block_n, dim)
    pv = p.reshape(batch, kv_heads, -1, reach, m, block_n) @ values[:, :, None]
    pv = pv.view(batch, heads, reach, m, dim)
    # row n of `kept` sums the n + 1 blocks that rank first: a product is faster than a cumsum
    rank = torch.argsort(order, dim=-1)[..., None, :reach]
    kept = (rank <= torch.arange(reach, device=q.device)[:, None]).to(pv.dtype)
    weight = kept @ weight
    pv = (kept @ pv.reshape(batch, heads, reach, -1)).view(pv.shape)
    pv = pv.div_(weight.clamp(min=1e-30)[..., None])
    exact = pv[:, :, -1:].clone()
    norm = exact.abs().sum((2, 3, 4))
    error = pv.sub_(exact).abs_().sum((3, 4))
    tail = error.new_zeros(batch, heads, blocks - reach)
    return torch.cat([norm[..., None], error, tail], -1), norm


def shift(error: Tensor, forced: Tensor) -> Tensor:
    """Drop the entries below the forced count: `[..., n]` becomes n droppable blocks kept."""
    columns = torch.arange(error.shape[-1], device=error.device) + forced[..., None]
    return error.gather(-1, columns.clamp(max=error.shape[-1] - 1).long())


def pad_keys(x: Tensor, block_n: int) -> Tensor:
    """fp32 copy of k or v, padded with zeros to whole key blocks."""
    return torch.nn.functional.pad(x.float(), (0, 0, 0, -x.shape[2] % block_n))
