"""How does a GPU let tangents stand for dropped blocks? Two kernels after the attention kernel.

`columns_kernel` makes the tangent of every dropped block (formulae: `kernels.compensation`, which
is the oracle); the mean queries of many query blocks meet one key block in one product.
`merge_kernel` goes on with the online softmax where attention over the lists ended, from its o and
lse. Query blocks are taken in chunks, whose columns fit into bounded memory.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from afbs_compile.kernels.compensation import dropped_blocks
from afbs_compile.kernels.geometry import Mask
from afbs_compile.kernels.scores import pool
from afbs_compile.kernels.triton_common import (
    LENGTHS,
    LN2,
    LOG2E,
    LOWEST,
    interpreted,
    on_device,
    rows_contiguous,
)

CHUNK_BYTES = 1 << 28  # columns held at once; bounds memory at long lengths
TO_LOG2 = tl.constexpr(LOG2E)
CHUNKED = [*LENGTHS, "first", "chunk", "reach"]


@triton.jit(do_not_specialize=CHUNKED)
def columns_kernel(
    CENTRE, K, V, DROP, KHAT, VHAT, BIAS, scale,
    stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    heads, group, length_k, blocks_q, blocks_k, first, chunk, reach,
    D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK_N: tl.constexpr, TILE_I: tl.constexpr,
):  # fmt: skip
    """Tangents of one key block for `TILE_I` query blocks of one head, where they are dropped.

    CENTRE is `[B, H, NQ, D]`, DROP `[B, H, NQ, NK]`; KHAT and VHAT are `[B, H, chunk, reach, D]`
    and BIAS is `[B, H, chunk, reach]`, in log2 units. The chunk starts at query block `first`.
    """
    tiles = tl.cdiv(chunk, TILE_I)
    pid = tl.program_id(0).to(tl.int64)
    block = pid % reach
    tile = pid // reach % tiles
    head = pid // reach // tiles
    b = head // heads
    h = head % heads
    i = tile * TILE_I + tl.arange(0, TILE_I)
    rows = head * blocks_q + first + i
    drop = tl.load(DROP + rows * blocks_k + block, mask=i < chunk, other=0) != 0
    if tl.max(drop.to(tl.int32), 0) > 0:
        d = tl.arange(0, D_PADDED)
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        there = (n < length_k)[:, None] & (d < D)[None, :]
        wanted = drop[:, None] & (d < D)[None, :]
        centre = tl.load(CENTRE + rows[:, None] * D + d[None, :], mask=wanted, other=0.0)
        k_rows = K + b * stride_kb + h // group * stride_kh + n[:, None] * stride_kl
        k = tl.load(k_rows + d[None, :], mask=there, other=0.0)
        s = tl.dot(centre, tl.trans(k), input_precision="ieee") * (scale * TO_LOG2)
        s = tl.where((n < length_k)[None, :], s, -float("inf"))
        top = tl.max(s, 1)
        p = tl.exp2(s - top[:, None])
        total = tl.sum(p, 1)
        p = (p / total[:, None]).to(k.dtype)
        khat = tl.dot(p, k, input_precision="ieee").to(KHAT.dtype.element_ty)
        out = (head * chunk + i) * reach + block
        tl.store(KHAT + out[:, None] * D + d[None, :], khat, mask=wanted)
        v_rows = V + b * stride_vb + h // group * stride_vh + n[:, None] * stride_vl
        v = tl.load(v_rows + d[None, :], mask=there, other=0.0)
        vhat = tl.dot(p, v, input_precision="ieee").to(VHAT.dtype.element_ty)
        tl.store(VHAT + out[:, None] * D + d[None, :], vhat, mask=wanted)
        # from the rounded key, so that the logit at the mean query is the block's log-mass
        at_centre = tl.sum(centre.to(tl.float32) * khat.to(tl.float32), 1) * (scale * TO_LOG2)
        tl.store(BIAS + out, top + tl.log2(total) - at_centre, mask=drop)


@triton.jit(do_not_specialize=CHUNKED)
def merge_kernel(
    Q, DROP, KHAT, VHAT, BIAS, O, LSE, scale,
    stride_qb, stride_qh, stride_ql, stride_ob, stride_oh, stride_ol,
    heads, length_q, blocks_q, blocks_k, first, chunk, reach,
    D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK_M: tl.constexpr, TILE_M: tl.constexpr,
    TILE_J: tl.constexpr,
):  # fmt: skip
    """Takes the columns of `columns_kernel` into o and lse of `TILE_M` rows, in place."""
    TILES: tl.constexpr = BLOCK_M // TILE_M
    pid = tl.program_id(0).to(tl.int64)
    tile = pid % TILES
    i = pid // TILES % chunk
    head = pid // TILES // chunk
    b = head // heads
    h = head % heads
    drop_row = DROP + (head * blocks_q + first + i) * blocks_k
    columns = (head * chunk + i) * reach
    m = (first + i) * BLOCK_M + tile * TILE_M + tl.arange(0, TILE_M)
    d = tl.arange(0, D_PADDED)
    q_mask = (m < length_q)[:, None] & (d < D)[None, :]
    q_rows = Q + b * stride_qb + h * stride_qh + m[:, None] * stride_ql
    q = tl.load(q_rows + d[None, :], mask=q_mask, other=0.0)
    o_rows = O + b * stride_ob + h * stride_oh + m[:, None] * stride_ol
    lse_rows = LSE + head * length_q + m
    lse = tl.load(lse_rows, mask=m < length_q, other=-float("inf"))
    acc = tl.load(o_rows + d[None, :], mask=q_mask, other=0.0).to(tl.float32)
    total = tl.where(lse == -float("inf"), 0.0, 1.0)
    top = tl.where(lse == -float("inf"), LOWEST, lse * TO_LOG2)
    any_dropped = 0
    for start in range(0, reach, TILE_J):
        j = start + tl.arange(0, TILE_J)
        drop = tl.load(drop_row + j, mask=j < reach, other=0) != 0
        if tl.max(drop.to(tl.int32), 0) > 0:
            any_dropped = 1
            there = drop[:, None] & (d < D)[None, :]
            places = (columns + j)[:, None] * D + d[None, :]
            khat = tl.load(KHAT + places, mask=there, other=0.0)
            vhat = tl.load(VHAT + places, mask=there, other=0.0)
            bias = tl.load(BIAS + columns + j, mask=drop, other=0.0)
            s = tl.dot(q, tl.trans(khat), input_precision="ieee") * (scale * TO_LOG2)
            s = tl.where(drop[None, :], s + bias[None, :], -float("inf"))
            top_new = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - top_new[:, None])
            shrink = tl.exp2(top - top_new)
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None]
            acc = tl.dot(p.to(vhat.dtype), vhat, acc, input_precision="ieee")
            top = top_new
    if any_dropped > 0:  # else the rows stay as they are, to the bit
        lse = (top + tl.log2(total)) * LN2
        tl.store(lse_rows, lse, mask=m < length_q)
        acc = acc / total[:, None]
        tl.store(o_rows + d[None, :], acc.to(O.dtype.element_ty), mask=q_mask)


def compensate(
    o: Tensor,
    lse: Tensor,
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
) -> tuple[Tensor, Tensor]:
    """Take the tangents of the dropped blocks into what a forward returned; no synchronisation.

    `o` and `lse` come from `triton_forward.forward` or one like it, and are overwritten unless the
    interpreter works on a copy; the other arguments are those that the forward took.

    Returns:
        `o` and `lse`.
    """
    dtype = o.dtype
    if interpreted() and dtype == torch.bfloat16:  # the interpreter's bf16 tl.dot is wrong
        o, q, k, v = o.float(), q.float(), k.float(), v.float()
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    batch, heads, length_q, _ = q.shape
    drop = dropped_blocks(
        counts, indices, policy, mask=mask, length_q=length_q, length_k=k.shape[2],
        block_m=block_m, block_n=block_n,
    ).contiguous()  # fmt: skip
    centre = pool(q, block_m).to(q.dtype).contiguous()
    blocks_q, blocks_k = drop.shape[-2:]
    for first, chunk, reach in chunks(blocks_q, blocks_k, mask, q, block_m, block_n):
        shape = batch, heads, chunk, reach
        columns = (
            *(torch.empty(*shape, q.shape[3], dtype=q.dtype, device=q.device) for _ in range(2)),
            torch.empty(shape, dtype=torch.float32, device=q.device),
        )
        with on_device(q):
            launch(centre, q, k, v, drop, columns, o, lse, scale, first, block_m, block_n)
    return o.to(dtype), lse


def launch(
    centre: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    drop: Tensor,
    columns: tuple[Tensor, ...],
    o: Tensor,
    lse: Tensor,
    scale: float,
    first: int,
    block_m: int,
    block_n: int,
) -> None:
    """Both kernels for the chunk of query blocks whose columns fill `columns`."""
    batch, heads, length_q, head_dim = q.shape
    chunk, reach = columns[2].shape[-2:]
    padded = max(16, triton.next_power_of_2(head_dim))
    tile_i, tile_m, tile_j, warps = tiling(padded, q.element_size(), block_m)
    columns_kernel[(batch * heads * triton.cdiv(chunk, tile_i) * reach,)](
        centre, k, v, drop, *columns, scale, *k.stride()[:3], *v.stride()[:3],
        heads, heads // k.shape[1], k.shape[2], *drop.shape[-2:], first, chunk, reach,
        D=head_dim, D_PADDED=padded, BLOCK_N=block_n, TILE_I=tile_i, num_warps=4,
    )  # fmt: skip
    merge_kernel[(batch * heads * chunk * (block_m // tile_m),)](
        q, drop, *columns, o, lse, scale, *q.stride()[:3], *o.stride()[:3],
        heads, length_q, *drop.shape[-2:], first, chunk, reach,
        D=head_dim, D_PADDED=padded, BLOCK_M=block_m, TILE_M=tile_m, TILE_J=tile_j,
        num_warps=warps, num_stages=1,
    )  # fmt: skip


def chunks(
    blocks_q: int, blocks_k: int, mask: Mask, q: Tensor, block_m: int, block_n: int
) -> list[tuple[int, int, int]]:
    """First query block, number of query blocks and key blocks in reach of every chunk."""
    batch, heads, _, head_dim = q.shape
    row_bytes = batch * heads * blocks_k * (2 * head_dim * q.element_size() + 4)
    most = min(blocks_q, max(1, CHUNK_BYTES // row_bytes))
    found = []
    for first in range(0, blocks_q, most):
        chunk = min(most, blocks_q - first)
        reach = blocks_k
        if mask.causal:  # only blocks that every row sees whole are compensated
            end = (first + chunk) * block_m + mask.offset
            reach = min(blocks_k, max(0, -(-end // block_n)))
        if reach:
            found.append((first, chunk, reach))
    return found


def tiling(head_dim: int, itemsize: int, block_m: int) -> tuple[int, int, int, int]:
    """Query blocks a column program, rows and columns a merge step, warps of the merge.

    fp32 runs on the FMA units, whose operands stay in registers: it takes smaller tiles.
    """
    if itemsize == 4:
        return 16, min(block_m, 32), 32, 8
    return 32, min(block_m, 64), 32 if head_dim > 128 else 64, 4
