"""How does a GPU attend over block lists? The portable Triton forward, sm_80 and later.

One program serves a tile of queries of one head: it walks the listed key blocks with an online
softmax in base 2 (Milakov & Gimelshein, arXiv 1805.02867; FlashAttention-2, arXiv 2307.08691).
The token mask is applied only in blocks that need it. The oracle is `kernels.reference`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from afbs_compile.kernels.boxes import launch
from afbs_compile.kernels.data_mask import DataMask
from afbs_compile.kernels.geometry import Mask
from afbs_compile.kernels.launch import described
from afbs_compile.kernels.triton_common import (
    COLUMNS,
    LENGTHS,
    LN2,
    LOG2E,
    LOWEST,
    MODE,
    SINK,
    UNLIMITED,
    WINDOW,
    WINDOWED,
    interpreted,
    rows_contiguous,
    shared_memory_bytes,
    site_window,
)
from afbs_compile.kernels.triton_mask import PRESENT, Parts
from afbs_compile.kernels.triton_seen import (
    BIAS_STRIDES,
    LOG2_E,
    MASK_STRIDES,
    above_hidden,
    bias_tile,
    data_seen,
)

NO_WINDOW = tl.constexpr(UNLIMITED)


@triton.jit
def softmax_step(s, v, total, top, acc, scale_log2):
    """Fold one tile of raw scores `s` and values `v` into the running sum, maximum, output."""
    top_new = tl.maximum(top, tl.max(s, 1) * scale_log2)
    p = tl.exp2(s * scale_log2 - top_new[:, None])
    shrink = tl.exp2(top - top_new)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return total, top_new, acc


@triton.jit
def biased_step(x, v, total, top, acc):
    """`softmax_step` of scores that are scaled and biased; the maximum is in natural units.

    Differences are taken before anything is scaled to base 2.
    """
    top_new = tl.maximum(top, tl.max(x, 1))
    p = tl.exp2(above_hidden(x - top_new[:, None]) * LOG2_E)
    shrink = tl.exp2(above_hidden(top - top_new) * LOG2_E)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return total, top_new, acc


@triton.jit
def whole_blocks(list_row, count, last_seen, BLOCK_N: tl.constexpr):
    """How many of the listed blocks end at or before `last_seen`; the list is ascending."""
    block = tl.load(list_row + count - 1)
    while (count > 0) & (block * BLOCK_N + BLOCK_N - 1 > last_seen):
        count -= 1
        block = tl.load(list_row + count - 1, mask=count > 0, other=0)
    return count


@triton.jit
def load_rows(rows, d, D: tl.constexpr, D_PADDED: tl.constexpr):
    """Rows of k or v that are all in bounds, padded with zeros to `D_PADDED` columns."""
    if D == D_PADDED:
        return tl.load(rows + d[None, :])
    else:  # noqa: RET505  a compile-time branch
        return tl.load(rows + d[None, :], mask=(d < D)[None, :], other=0.0)


@triton.jit(do_not_specialize=[*LENGTHS, *MASK_STRIDES, *BIAS_STRIDES])
def forward_kernel(
    Q, K, V, O, LSE, COUNTS, INDICES, POLICY, KEYS, Q_SEGMENTS, K_SEGMENTS, ELEMENTS, BIAS,
    scale_log2,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl,
    stride_vb, stride_vh, stride_vl, stride_ob, stride_oh, stride_ol,
    heads, group, length_q, length_k, blocks_q, blocks_k, offset, window,
    stride_keys, stride_qs, stride_ks, stride_eb, stride_eh, stride_eq, stride_ek,
    stride_bb, stride_bh, stride_bq, stride_bk,
    D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_KEYS: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_ELEMENTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Output and lse of `TILE_M` queries of one head; all of them lie in one query block."""
    tiles = tl.cdiv(length_q, TILE_M)
    pid = tl.program_id(0)
    b = (pid // tiles // heads).to(tl.int64)
    h = (pid // tiles % heads).to(tl.int64)
    first = (tiles - 1 - pid % tiles) * TILE_M  # the longest rows of a causal head start first
    last = tl.minimum(first + TILE_M, length_q) - 1
    row = (b * heads + h) * blocks_q + first // BLOCK_M

    # the keys that each row may see: low <= n <= high, and (near <= n or n < sink)
    windowed = tl.load(POLICY + h * COLUMNS + MODE) == WINDOWED
    own_window = tl.load(POLICY + h * COLUMNS + WINDOW).to(tl.int32)
    reach = tl.where(windowed, own_window, NO_WINDOW)
    sink = tl.load(POLICY + h * COLUMNS + SINK).to(tl.int32)
    i = first + tl.arange(0, TILE_M)
    low = i + offset - window + 1
    near = i + offset - reach + 1
    high = i * 0 + length_k - 1
    first_high = length_k - 1
    last_high = length_k - 1
    if CAUSAL:
        high = tl.minimum(high, i + offset)
        first_high = tl.minimum(first_high, first + offset)
        last_high = tl.minimum(last_high, last + offset)

    d = tl.arange(0, D_PADDED)
    q_rows = Q + b * stride_qb + h * stride_qh + i.to(tl.int64)[:, None] * stride_ql
    q_mask = (i < length_q)[:, None] & (d < D)[None, :]
    q = tl.load(q_rows + d[None, :], mask=q_mask, other=0.0)
    k_head = K + b * stride_kb + h // group * stride_kh
    v_head = V + b * stride_vb + h // group * stride_vh
    total = tl.zeros([TILE_M], tl.float32)
    top = tl.full([TILE_M], LOWEST, tl.float32)
    acc = tl.zeros([TILE_M, D_PADDED], tl.float32)

    # blocks that every row sees whole come first in the list, unless a window cuts their left
    PARTS: tl.constexpr = BLOCK_N // TILE_N
    count = tl.load(COUNTS + row)
    list_row = INDICES + row * blocks_k
    whole = tl.where(windowed | (window < NO_WINDOW), 0, count)
    DATA: tl.constexpr = HAS_KEYS or HAS_SEGMENTS or HAS_ELEMENTS or HAS_BIAS
    if DATA:
        whole = 0
    if whole > 0:
        whole = whole_blocks(list_row, whole, first_high, BLOCK_N)
    for t in range(0, whole * PARTS):
        start = tl.load(list_row + t // PARTS) * BLOCK_N + t % PARTS * TILE_N
        n_rows = (start + tl.arange(0, TILE_N)).to(tl.int64)[:, None]
        k = load_rows(k_head + n_rows * stride_kl, d, D, D_PADDED)
        v = load_rows(v_head + n_rows * stride_vl, d, D, D_PADDED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        total, top, acc = softmax_step(s, v, total, top, acc, scale_log2)
    for t in range(whole * PARTS, count * PARTS):
        start = tl.load(list_row + t // PARTS) * BLOCK_N + t % PARTS * TILE_N
        n = start + tl.arange(0, TILE_N)
        # a key that no row of the tile sees is never read: its NaN could leak through 0 * NaN
        inside = (n >= first + offset - reach + 1) | (n < sink)
        wanted = (n >= first + offset - window + 1) & (n <= last_high) & inside
        shown = wanted[None, :]
        if DATA:
            shown = data_seen(
                KEYS, Q_SEGMENTS, K_SEGMENTS, ELEMENTS, stride_keys, stride_qs, stride_ks,
                stride_eb, stride_eh, stride_eq, stride_ek, b, h, i, n, i < length_q, wanted,
                HAS_KEYS, HAS_SEGMENTS, HAS_ELEMENTS,
            )  # fmt: skip
            if HAS_BIAS:
                bias = bias_tile(
                    BIAS, stride_bb, stride_bh, stride_bq, stride_bk, b, h, i, n, shown
                )
                shown &= bias > -float("inf")
            wanted &= tl.max(shown.to(tl.int32), 0) > 0
        kv_mask = wanted[:, None] & (d < D)[None, :]
        n_rows = n.to(tl.int64)[:, None]
        k = tl.load(k_head + n_rows * stride_kl + d[None, :], mask=kv_mask, other=0.0)
        v = tl.load(v_head + n_rows * stride_vl + d[None, :], mask=kv_mask, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        seen = (n[None, :] >= near[:, None]) | (n < sink)[None, :]
        seen &= (n[None, :] >= low[:, None]) & (n[None, :] <= high[:, None]) & shown
        if HAS_BIAS:
            x = tl.where(seen, s * (scale_log2 * LN2) + bias, -float("inf"))
            total, top, acc = biased_step(x, v, total, top, acc)
        else:
            s = tl.where(seen, s, -float("inf"))
            total, top, acc = softmax_step(s, v, total, top, acc, scale_log2)

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = acc / total[:, None]
    lse_rows = LSE + (b * heads + h) * length_q + i
    if HAS_BIAS:
        tl.store(lse_rows, top, mask=i < length_q)
        lse_rows += (tl.num_programs(0) // tiles).to(tl.int64) * length_q
        lse = tl.where(empty, -float("inf"), tl.log2(total) * LN2)
    else:
        lse = tl.where(empty, -float("inf"), (top + tl.log2(total)) * LN2)
    tl.store(lse_rows, lse, mask=i < length_q)
    o_rows = O + b * stride_ob + h * stride_oh + i.to(tl.int64)[:, None] * stride_ol
    tl.store(o_rows + d[None, :], acc.to(O.dtype.element_ty), mask=q_mask)


def tiling(
    head_dim: int, itemsize: int, block_m: int, block_n: int, shared_bytes: int
) -> tuple[int, int, int, int]:
    """Queries and keys per tile, warps, pipeline stages.

    fp32 runs on the FMA units, whose operands stay in registers: it takes smaller tiles.

    Args:
        head_dim: Head dimension, padded to a power of two.
        itemsize: Bytes of one element of q, k and v.
        block_m: Query block, tokens; the tile divides it.
        block_n: Key block, tokens; the tile divides it.
        shared_bytes: Shared memory that one program may use.

    Returns:
        `(tile_m, tile_n, num_warps, num_stages)`: the largest tiles with which q takes a third of
        the shared memory at most, and two stages of k and v fit into the rest.
    """
    exact = itemsize == 4
    row_bytes = head_dim * itemsize
    tile_m = min(block_m, 64 if exact else 128)
    while tile_m > 16 and 3 * tile_m * row_bytes > shared_bytes:
        tile_m //= 2
    room = shared_bytes - tile_m * row_bytes
    tile_n = min(block_n, 4096 // head_dim if exact else 128)
    while tile_n > 16 and 4 * tile_n * row_bytes > room:
        tile_n //= 2
    stages = min(3, room // (2 * tile_n * row_bytes))
    return tile_m, tile_n, 8 if exact or tile_m >= 128 else 4, stages


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
    counter: Tensor | None = None,
    data: DataMask | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over block lists; no host synchronisation, can be captured in a CUDA graph.

    Args:
        q: `[B, Hq, Lq, D]`, fp32, fp16 or bf16, any strides.
        k: `[B, Hkv, Lk, D]`; Hkv divides Hq.
        v: `[B, Hkv, Lk, D]`.
        counts: int32 `[B, Hq, NQ]` (see `kernels.lists`).
        indices: int32 `[B, Hq, NQ, NK]`.
        policy: float32 `[Hq, COLUMNS]`; windows and sinks of windowed heads are read.
        mask: The site's mask.
        scale: Multiplier on q·k.
        block_m: Query block, tokens; a power of two from 16 on.
        block_n: Key block, tokens; a power of two from 16 on.
        counter: Taken for the signature of `kernels.gluon_forward`; not used.
        data: The part of the mask that comes with the call; looked at in every listed block.

    Returns:
        `o` in q's dtype, `[B, Hq, Lq, D]` over `[B, Lq, Hq, D]` memory, and `lse` fp32
        `[B, Hq, Lq]`, natural log. A row that sees nothing is 0 with lse −inf. With a bias lse is
        `[2, B, Hq, Lq]`, the largest score and what is added to it: a sum could lose the second.
    """
    if scale <= 0:  # the online softmax takes maxima before it scales
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    dtype = q.dtype
    if interpreted() and dtype == torch.bfloat16:  # the interpreter's bf16 tl.dot is wrong
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    counts, indices, policy = counts.contiguous(), indices.contiguous(), policy.contiguous()
    batch, heads, length_q, head_dim = q.shape
    padded = max(16, triton.next_power_of_2(head_dim))
    tile_m, tile_n, warps, stages = tiling(
        padded, q.element_size(), block_m, block_n, shared_memory_bytes(q.device)
    )
    o = torch.empty(batch, length_q, heads, head_dim, dtype=q.dtype, device=q.device)
    o = o.transpose(1, 2)
    parts = Parts.of(data, policy)
    shape = ((2,) if parts.biased else ()) + (batch, heads, length_q)
    lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    tensors = (q, k, v, o, lse, counts, indices, policy, *parts.tensors, parts.bias)
    key = (mask, scale, block_m, block_n, *(described(x) for x in tensors), parts[1:3], parts[4:])
    launch(
        forward_kernel, key, q, batch * heads * triton.cdiv(length_q, tile_m),
        (*tensors, scale * LOG2E,
         *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3],
         heads, heads // k.shape[1], length_q, k.shape[2], *indices.shape[-2:],
         mask.offset, site_window(mask), *parts.strides, *parts.bias_strides),
        D=head_dim, D_PADDED=padded, BLOCK_M=block_m, BLOCK_N=block_n, TILE_M=tile_m,
        TILE_N=tile_n, CAUSAL=mask.causal,
        **dict(zip(PRESENT, parts.present, strict=True)), HAS_BIAS=parts.biased,
        num_warps=warps, num_stages=stages, enable_fp_fusion=True,
    )  # fmt: skip
    return o.to(dtype), lse
