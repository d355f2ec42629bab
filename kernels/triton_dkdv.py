"""What are the gradients of keys and values? One program a tile of keys, over transposed lists.

dv_j = sum_i p_ij do_i and dk_j = scale * sum_i p_ij (do_i . v_j - delta_i) q_i, over the query
blocks that list the key block, in every query head of the group: no atomics, the same bits on
every run. The launcher, and the two statistics of a row, are `kernels.triton_backward`'s.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from afbs_compile.kernels.triton_common import (
    COLUMNS,
    LENGTHS,
    MODE,
    SINK,
    UNLIMITED,
    WINDOW,
    WINDOWED,
)
from afbs_compile.kernels.triton_dq import biased
from afbs_compile.kernels.triton_forward import load_rows
from afbs_compile.kernels.triton_seen import BIAS_STRIDES, MASK_STRIDES, bias_tile, data_seen

NO_WINDOW = tl.constexpr(UNLIMITED)
EARLY = tl.constexpr(1)  # key tiles at the start that hold the sink, which every query lists


@triton.jit
def place(pid, batch_heads, tiles):
    """Batch and key/value head, and key tile, of a program.

    The sink's tiles of all heads come first: they are the longest by far. Then head after head,
    so that the programs that run at a time read the same queries; a causal head's columns get
    shorter from tile to tile.
    """
    early = tl.minimum(EARLY, tiles) * batch_heads
    rest = tl.maximum(tiles - EARLY, 1)
    later = tl.maximum(pid - early, 0)
    bh = tl.where(pid < early, pid % batch_heads, later // rest)
    return bh, tl.where(pid < early, pid // batch_heads, EARLY + later % rest)


@triton.jit
def partial_blocks(list_row, count, blind, last_n, BLOCK_M: tl.constexpr):
    """How many of the listed blocks hold a query that does not see key `last_n`, from the front.

    `blind` is how far query 0 is from seeing key 0; the list is ascending.
    """
    found = 0
    block = tl.load(list_row, mask=count > 0, other=0)
    while (found < count) & (block * BLOCK_M < last_n + blind):
        found += 1
        block = tl.load(list_row + found, mask=found < count, other=0)
    return found


@triton.jit
def step_gradients(
    k, v, q, do, lse2, delta, dk, dv, seen, scale_log2, MASKED: tl.constexpr,
    bias, top, scale, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Add what a tile of queries gives to dk and dv; pairs lie as `[keys, queries]`."""
    s = tl.dot(k, tl.trans(q), input_precision="ieee")
    x = s * scale_log2
    if HAS_BIAS:
        x = biased(s, bias, top[None, :], scale)
    p = tl.exp2(x - lse2[None, :])
    if MASKED:
        p = tl.where(seen, p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(do), input_precision="ieee")
    ds = p * (dp - delta[None, :])
    if MASKED:
        ds = tl.where(p == 0.0, 0.0, ds)  # not 0 * NaN
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=[*LENGTHS, *MASK_STRIDES, *BIAS_STRIDES, "batch_heads"])
def dkdv_kernel(
    Q, K, V, DO, DK, DV, Q_BOX, DO_BOX, LSE2, DELTA, COUNTS_T, INDICES_T, POLICY, scale,
    scale_log2, stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl,
    stride_vb, stride_vh, stride_vl, stride_db, stride_dh, stride_dl,
    stride_gb, stride_gh, stride_gl, batch_heads,
    heads, length_q, length_k, blocks_q, blocks_k, offset, window,
    KEYS, Q_SEGMENTS, K_SEGMENTS, ELEMENTS, BIAS, TOP,
    stride_keys, stride_qs, stride_ks, stride_eb, stride_eh, stride_eq, stride_ek,
    stride_bb, stride_bh, stride_bq, stride_bk,
    D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr,
    BOXES: tl.constexpr, HAS_KEYS: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    HAS_ELEMENTS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Gradients of `TILE_N` keys and values of one head; all of them lie in one key block."""
    bh, tile = place(tl.program_id(0), batch_heads, tl.cdiv(length_k, TILE_N))
    batch = bh // (heads // GROUP)
    kv_head = bh % (heads // GROUP)
    b = batch.to(tl.int64)
    first = tile * TILE_N
    last = first + TILE_N - 1
    n = first + tl.arange(0, TILE_N)
    d = tl.arange(0, D_PADDED)
    n_rows = n.to(tl.int64)[:, None]
    k_mask = (n < length_k)[:, None] & (d < D)[None, :]
    k_rows = K + b * stride_kb + kv_head.to(tl.int64) * stride_kh + n_rows * stride_kl
    v_rows = V + b * stride_vb + kv_head.to(tl.int64) * stride_vh + n_rows * stride_vl
    k = tl.load(k_rows + d[None, :], mask=k_mask, other=0.0)
    v = tl.load(v_rows + d[None, :], mask=k_mask, other=0.0)
    dk = tl.zeros([TILE_N, D_PADDED], tl.float32)
    dv = tl.zeros([TILE_N, D_PADDED], tl.float32)
    PARTS: tl.constexpr = BLOCK_M // TILE_M
    lane = tl.arange(0, TILE_M)
    DATA: tl.constexpr = HAS_KEYS or HAS_SEGMENTS or HAS_ELEMENTS or HAS_BIAS

    for g in range(0, GROUP):
        h = kv_head * GROUP + g
        windowed = tl.load(POLICY + h * COLUMNS + MODE) == WINDOWED
        own_window = tl.load(POLICY + h * COLUMNS + WINDOW).to(tl.int32)
        reach = tl.where(windowed, own_window, NO_WINDOW)
        sink = tl.load(POLICY + h * COLUMNS + SINK).to(tl.int32)
        q_head = Q + b * stride_qb + h.to(tl.int64) * stride_qh
        do_head = DO + b * stride_db + h.to(tl.int64) * stride_dh
        statistics = (b * heads + h) * blocks_q * BLOCK_M
        column = (b * heads + h) * blocks_k + first // BLOCK_N
        count = tl.load(COUNTS_T + column)
        list_row = INDICES_T + column * blocks_q

        # of the list, [start, end) sees the tile whole: no diagonal, no window, no missing query
        # (a missing key has a row of its own in every product, which is not stored)
        start = count * 0
        if CAUSAL:
            start = partial_blocks(list_row, count, -offset, last, BLOCK_M)
        start = tl.where(windowed | (window < NO_WINDOW), count, start)
        if DATA:  # every block is looked at
            start = count
        tail = tl.load(list_row + count - 1, mask=count > 0, other=0) * BLOCK_M + BLOCK_M
        end = tl.maximum(start, tl.where(tail > length_q, count - 1, count))
        for t in tl.range(0, (start + count - end) * PARTS):
            entry = t // PARTS
            entry = tl.where(entry < start, entry, entry + end - start)
            at = tl.load(list_row + entry) * BLOCK_M + t % PARTS * TILE_M
            # a key is seen by the queries of the tile from lane `lowest` to lane `highest`
            rel = n - offset - at
            near = tl.where(n < sink, window, tl.minimum(window, reach))
            highest = tl.minimum(rel + near, length_q - at) - 1
            lowest = rel * 0
            if CAUSAL:
                lowest = rel
            if BOXES:
                corner = [batch, h, at, 0]
                q = Q_BOX.load(corner).reshape(TILE_M, D_PADDED)
                do = DO_BOX.load(corner).reshape(TILE_M, D_PADDED)
            else:
                i_rows = (at + lane).to(tl.int64)[:, None]
                wanted = (at + lane < length_q)[:, None] & (d < D)[None, :]
                q = tl.load(q_head + i_rows * stride_ql + d[None, :], mask=wanted, other=0.0)
                do = tl.load(do_head + i_rows * stride_dl + d[None, :], mask=wanted, other=0.0)
            lse2 = tl.load(LSE2 + statistics + at + lane)
            delta = tl.load(DELTA + statistics + at + lane)
            seen = (lane[None, :] >= lowest[:, None]) & (lane[None, :] <= highest[:, None])
            bias, top = 0.0, delta
            if DATA:
                i = at + lane
                seen &= data_seen(
                    KEYS, Q_SEGMENTS, K_SEGMENTS, ELEMENTS, stride_keys, stride_qs, stride_ks,
                    stride_eb, stride_eh, stride_eq, stride_ek, b, h.to(tl.int64), i, n,
                    i < length_q, n < length_k, HAS_KEYS, HAS_SEGMENTS, HAS_ELEMENTS, True,
                )  # fmt: skip
                if HAS_BIAS:
                    bias = bias_tile(BIAS, stride_bb, stride_bh, stride_bq, stride_bk, b,
                                     h.to(tl.int64), i, n, seen, True)  # fmt: skip
                    seen &= bias > -float("inf")
                    top = tl.load(TOP + (b * heads + h) * length_q + i, i < length_q, 0.0)
            dk, dv = step_gradients(k, v, q, do, lse2, delta, dk, dv, seen, scale_log2, True,
                                    bias, top, scale, HAS_BIAS)  # fmt: skip
        for t in range(start * PARTS, end * PARTS):
            at = tl.load(list_row + t // PARTS) * BLOCK_M + t % PARTS * TILE_M
            if BOXES:
                corner = [batch, h, at, 0]
                q = Q_BOX.load(corner).reshape(TILE_M, D_PADDED)
                do = DO_BOX.load(corner).reshape(TILE_M, D_PADDED)
            else:
                i_rows = (at + lane).to(tl.int64)[:, None]
                q = load_rows(q_head + i_rows * stride_ql, d, D, D_PADDED)
                do = load_rows(do_head + i_rows * stride_dl, d, D, D_PADDED)
            lse2 = tl.load(LSE2 + statistics + at + lane)
            delta = tl.load(DELTA + statistics + at + lane)
            dk, dv = step_gradients(k, v, q, do, lse2, delta, dk, dv, True, scale_log2, False,
                                    0.0, delta, scale, False)  # fmt: skip

    g_rows = b * stride_gb + kv_head.to(tl.int64) * stride_gh + n_rows * stride_gl + d[None, :]
    tl.store(DK + g_rows, (dk * scale).to(DK.dtype.element_ty), mask=k_mask)
    tl.store(DV + g_rows, dv.to(DV.dtype.element_ty), mask=k_mask)


def dkdv_tiling(
    head_dim: int, itemsize: int, block_m: int, block_n: int, shared_bytes: int
) -> tuple[int, int, int, int]:
    """Queries per step, keys, warps, pipeline stages; arguments as in `triton_dq.dq_tiling`.

    k and v of a tile stay, q and do stream by.

    Returns:
        `(tile_m, tile_n, num_warps, num_stages)`: the largest tiles with which k and v take a
        third of the shared memory at most, and a stage of q and do fits into the rest.
    """
    exact = itemsize == 4
    row_bytes = head_dim * itemsize
    tile_n = min(block_n, 32 if exact else 64)
    while tile_n > 16 and 6 * tile_n * row_bytes > shared_bytes:
        tile_n //= 2
    room = shared_bytes - 2 * tile_n * row_bytes
    tile_m = min(block_m, 32 if exact else 64)
    while tile_m > 16 and 4 * tile_m * row_bytes > room:
        tile_m //= 2
    stages = max(1, min(2, room // (2 * tile_m * row_bytes)))
    return tile_m, tile_n, 8 if exact or head_dim > 128 else 4, stages
