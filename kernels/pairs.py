"""Attention over block lists with gradients or a bias, on a CPU: products of pairs of blocks.

FlexAttention has no backward on a CPU and gives no lse there. Here the work is a list of pairs
(query block, key block), some thousands at a time: S = scale·QKᵀ of each, softmax over the pairs
of a query block, and sums by block. Time and memory go with the pairs that are kept. With lse and
D = rowsum(do ∘ o) the backward is dS = P ∘ (do·Vᵀ − D) (Dao et al. 2022, FlashAttention).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from afbs_compile.kernels.data_mask import DataMask
from afbs_compile.kernels.flex import limits
from afbs_compile.kernels.geometry import Mask
from afbs_compile.kernels.lists import to_keep

LOWEST = torch.finfo(torch.float32).min  # finite: −inf minus it is −inf, not NaN
MOST_PAIRS = 2048  # at once: 32 MB for each `[pairs, 64, 64]` in fp32


@dataclass(frozen=True, slots=True)
class Tile:
    """Some pairs of one head; whole query blocks.

    Attributes:
        n: Query block of each pair, int64 `[P]`, ascending.
        q: fp32 `[P, M, D]`.
        k: fp32 `[P, N, D]`; keys that no query of the pair sees are 0, lest their NaN leaks.
        v: The same.
        seen: Bool `[P, M, N]`.
        j: Key block of each pair, int64 `[P]`.
        bias: fp32 `[P, M, N]`, added to the scores; None for nothing.
    """

    n: Tensor
    j: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    seen: Tensor
    bias: Tensor | None = None

    def scores(self, scale: float) -> Tensor:
        """S `[P, M, N]`, −inf where not seen."""
        s = self.q @ self.k.transpose(1, 2) * scale
        s = s if self.bias is None else s + self.bias
        return s.masked_fill(~self.seen, -math.inf)


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
    """Attention over block lists; arguments as in `kernels.reference.forward`.

    Returns:
        `o` and `lse` as there; with a bias lse in its two parts, as `triton_forward.forward`.
    """
    o, tops = blocks_like(q, block_m), blocks_like(q[..., :1], block_m)[..., 0]
    sums_log = tops.fill_(-math.inf).clone()
    for b, h, _, tile in tiles(q, k, v, counts, indices, policy, mask, block_m, block_n, data):
        s = tile.scores(scale)
        rows = tile.n[:, None].expand(-1, block_m)
        top = tops[b, h].clone().scatter_reduce(0, rows, s.amax(2), "amax")
        top = top.masked_fill(top == -math.inf, 0)
        p = torch.exp(s - top[tile.n][..., None])
        total = torch.zeros_like(top).index_add(0, tile.n, p.sum(2))
        sums = torch.zeros_like(o[b, h]).index_add(0, tile.n, p @ tile.v)
        here = torch.unique_consecutive(tile.n)
        o[b, h, here] = (sums / total.clamp(min=1e-30)[..., None])[here]
        tops[b, h, here], sums_log[b, h, here] = top[here], total.log()[here]
    found = whole(tops, q), whole(sums_log, q)
    lse = found[0] + found[1] if data is None or data.bias is None else torch.stack(found)
    return whole(o, q).to(q.dtype), lse


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
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
    """Gradients of `forward` with its blocks held fixed: `dq`, `dk`, `dv` in the inputs' dtypes.

    Arguments as in `forward`, with its results and the gradient `do` of o.
    """
    dq, dk, dv = blocks_like(q, block_m), blocks_like(k, block_n), blocks_like(v, block_n)
    dos = in_blocks(do.float(), block_m)
    delta = in_blocks((do.float() * o.float()).sum(-1, keepdim=True), block_m)
    tops, sums_log = lse if lse.dim() == 4 else (torch.zeros_like(lse), lse)
    tops, sums_log = (in_blocks(x.clamp(min=LOWEST)[..., None], block_m) for x in (tops, sums_log))
    for b, h, kv, tile in tiles(q, k, v, counts, indices, policy, mask, block_m, block_n, data):
        p = torch.exp(tile.scores(scale) - tops[b, h, tile.n] - sums_log[b, h, tile.n])
        out = dos[b, h, tile.n]
        ds = p * (out @ tile.v.transpose(1, 2) - delta[b, h, tile.n]) * scale
        ds = ds.masked_fill(~tile.seen, 0)  # not 0 * NaN: a row that sees nothing may be NaN
        dq[b, h].index_add_(0, tile.n, ds @ tile.k)
        dk[b, kv].index_add_(0, tile.j, ds.transpose(1, 2) @ tile.q)
        dv[b, kv].index_add_(0, tile.j, p.transpose(1, 2) @ out)
    return whole(dq, q).to(q.dtype), whole(dk, k).to(k.dtype), whole(dv, v).to(v.dtype)


def tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    policy: Tensor,
    mask: Mask,
    block_m: int,
    block_n: int,
    data: DataMask | None = None,
) -> Iterator[tuple[int, int, int, Tile]]:
    """The work: batch entry, query head, key/value head, and at most about `MOST_PAIRS` pairs."""
    qs, ks, vs = in_blocks(q, block_m), in_blocks(k, block_n), in_blocks(v, block_n)
    low, high, near, sink = limits(policy, mask)
    keep, group = to_keep(counts, indices), q.shape[1] // k.shape[1]
    for b, h in torch.cartesian_prod(torch.arange(q.shape[0]), torch.arange(q.shape[1])).tolist():
        kv = h // group
        for rows in row_ranges(counts[b, h]):
            n, j = keep[b, h, rows.start : rows.stop].nonzero(as_tuple=True)
            n = n + rows.start
            at = (n[:, None] * block_m + torch.arange(block_m))[..., None]
            key = (j[:, None] * block_n + torch.arange(block_n))[:, None]
            seen = (key <= at + high[h]) & (key > at + low[h]) & (key < k.shape[2])
            seen &= (key > at + near[h]) | (key < sink[h])
            seen &= at < q.shape[2]  # rows that fill the last block up must not read hidden keys
            bias = None
            if data is not None:
                i, key = at.clamp(max=q.shape[2] - 1), key.clamp(max=k.shape[2] - 1)
                seen &= data.pairs(b, h, i, key)
                bias = data.pairs_added(b, h, i, key)
            nobody = ~seen.any(1)[..., None]
            kt, vt = (x[b, kv, j].float().masked_fill(nobody, 0) for x in (ks, vs))
            yield b, h, kv, Tile(n, j, qs[b, h, n].float(), kt, vt, seen, bias)


def row_ranges(counts: Tensor) -> Iterator[range]:
    """Query blocks in turn, as many as have `MOST_PAIRS` pairs together, one at least."""
    start, pairs = 0, 0
    for n, count in enumerate(counts.tolist()):
        if pairs and pairs + count > MOST_PAIRS:
            yield range(start, n)
            start, pairs = n, 0
        pairs += count
    yield range(start, len(counts))


def in_blocks(x: Tensor, size: int) -> Tensor:
    """`[B, H, L, D]` as `[B, H, N, size, D]`, filled up with zeros."""
    x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % size))
    return torch.unflatten(x, 2, (-1, size))


def blocks_like(x: Tensor, size: int) -> Tensor:
    """Zeros of the shape of `in_blocks`, fp32."""
    batch, heads, length, dim = x.shape
    return x.new_zeros((batch, heads, -(-length // size), size, dim), dtype=torch.float32)


def whole(blocks: Tensor, x: Tensor) -> Tensor:
    """The inverse of `in_blocks`, cut to the length of `x`; `[B, H, N, size]` works too."""
    return blocks.flatten(2, 3)[:, :, : x.shape[2]]
