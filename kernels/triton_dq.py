"""What is the gradient of the queries? One program a tile of queries, over the forward's lists.

dq_i = scale * sum_j p_ij (do_i . v_j - delta_i) k_j with p_ij = exp(scale q_i . k_j - lse_i) and
delta_i = do_i . o_i (FlashAttention-2, arXiv 2307.08691). The launcher, and the two statistics of
a row, are `kernels.triton_backward`'s.
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
from afbs_compile.kernels.triton_forward import load_rows, whole_blocks
from afbs_compile.kernels.triton_seen import (
    BIAS_STRIDES,
    LOG2_E,
    MASK_STRIDES,
    above_hidden,
    bias_tile,
    data_seen,
)

NO_WINDOW = tl.constexpr(UNLIMITED)
GONE = tl.constexpr(UNLIMITED)  # position of a key that is not there


@triton.jit
def step_keys(list_row, t, count, BLOCK_N: tl.constexpr, TILE_N: tl.constexpr):
    """Key positions of step `t`: a part of a listed block, or two listed blocks side by side."""
    lane = tl.arange(0, TILE_N)
    if TILE_N <= BLOCK_N:
        PARTS: tl.constexpr = BLOCK_N // TILE_N
        return tl.load(list_row + t // PARTS) * BLOCK_N + t % PARTS * TILE_N + lane
    else:  # noqa: RET505  a compile-time branch
        start = tl.load(list_row + 2 * t) * BLOCK_N
        both = 2 * t + 1 < count
        second = tl.load(list_row + 2 * t + 1, mask=both, other=0) * BLOCK_N - BLOCK_N
        return lane + tl.where(lane < BLOCK_N, start, tl.where(both, second, GONE))


@triton.jit
def biased(s, bias, top, scale):
    """Scores in base 2, less the row's largest: in this order, as the forward takes them.

    A pair that is not seen may lie far above that; `where` keeps NaN, `minimum` would not.
    """
    x = s * scale + bias - top
    return above_hidden(tl.where(x > 0.0, 0.0, x)) * LOG2_E


@triton.jit(do_not_specialize=[*LENGTHS, *MASK_STRIDES, *BIAS_STRIDES])
def dq_kernel(
    Q, K, V, DO, DQ, K_BOX, V_BOX, LSE2, DELTA, COUNTS, INDICES, POLICY, scale, scale_log2,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl,
    stride_vb, stride_vh, stride_vl, stride_db, stride_dh, stride_dl,
    stride_gb, stride_gh, stride_gl,
    heads, length_q, length_k, blocks_q, blocks_k, offset, window,
    KEYS, Q_SEGMENTS, K_SEGMENTS, ELEMENTS, BIAS, TOP,
    stride_keys, stride_qs, stride_ks, stride_eb, stride_eh, stride_eq, stride_ek,
    stride_bb, stride_bh, stride_bq, stride_bk,
    D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr,
    BOXES: tl.constexpr, HAS_KEYS: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    HAS_ELEMENTS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Gradient of `TILE_M` queries of one head; all of them lie in one query block."""
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
    i_rows = i.to(tl.int64)[:, None]
    q_mask = (i < length_q)[:, None] & (d < D)[None, :]
    q_rows = Q + b * stride_qb + h * stride_qh + i_rows * stride_ql
    q = tl.load(q_rows + d[None, :], mask=q_mask, other=0.0)
    do_rows = DO + b * stride_db + h * stride_dh + i_rows * stride_dl
    do = tl.load(do_rows + d[None, :], mask=q_mask, other=0.0)
    statistics = (b * heads + h) * blocks_q * BLOCK_M + i
    lse2 = tl.load(LSE2 + statistics)[:, None]
    delta = tl.load(DELTA + statistics)[:, None]
    if HAS_BIAS:
        top = tl.load(TOP + (b * heads + h) * length_q + i, i < length_q, 0.0)[:, None]
    k_head = K + b * stride_kb + h // GROUP * stride_kh
    v_head = V + b * stride_vb + h // GROUP * stride_vh
    dq = tl.zeros([TILE_M, D_PADDED], tl.float32)

    # blocks that every row sees whole come first in the list, unless a window cuts their left
    count = tl.load(COUNTS + row)
    list_row = INDICES + row * blocks_k
    whole = tl.where(windowed | (window < NO_WINDOW), 0, count)
    DATA: tl.constexpr = HAS_KEYS or HAS_SEGMENTS or HAS_ELEMENTS or HAS_BIAS
    if DATA:
        whole = 0
    if whole > 0:
        whole = whole_blocks(list_row, whole, first_high, BLOCK_N)
    whole_steps = whole * BLOCK_N // TILE_N
    for t in range(0, whole_steps):
        if BOXES:
            PARTS: tl.constexpr = BLOCK_N // TILE_N
            at = tl.load(list_row + t // PARTS) * BLOCK_N + t % PARTS * TILE_N
            corner = [b.to(tl.int32), (h // GROUP).to(tl.int32), at, 0]
            k = K_BOX.load(corner).reshape(TILE_N, D_PADDED)
            v = V_BOX.load(corner).reshape(TILE_N, D_PADDED)
        else:
            n_rows = step_keys(list_row, t, count, BLOCK_N, TILE_N).to(tl.int64)[:, None]
            k = load_rows(k_head + n_rows * stride_kl, d, D, D_PADDED)
            v = load_rows(v_head + n_rows * stride_vl, d, D, D_PADDED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = tl.exp2(s * scale_log2 - lse2) * (dp - delta)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    for t in range(whole_steps, tl.cdiv(count * BLOCK_N, TILE_N)):
        n = step_keys(list_row, t, count, BLOCK_N, TILE_N)
        # a key that no row of the tile sees is never read: its NaN could leak through 0 * NaN
        inside = (n >= first + offset - reach + 1) | (n < sink)
        wanted = (n >= first + offset - window + 1) & (n <= last_high) & inside
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
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        seen = (n[None, :] >= near[:, None]) | (n < sink)[None, :]
        seen &= (n[None, :] >= low[:, None]) & (n[None, :] <= high[:, None])
        x = s * scale_log2
        if DATA:
            seen &= shown
            if HAS_BIAS:
                x = biased(s, bias, top, scale)
        ds = tl.where(seen, tl.exp2(x - lse2) * (dp - delta), 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

    g_rows = DQ + b * stride_gb + h * stride_gh + i_rows * stride_gl
    tl.store(g_rows + d[None, :], (dq * scale).to(DQ.dtype.element_ty), mask=q_mask)


def dq_tiling(
    head_dim: int, itemsize: int, block_m: int, block_n: int, shared_bytes: int
) -> tuple[int, int, int, int]:
    """Queries and keys per step, warps, pipeline stages.

    fp32 runs on the FMA units, whose operands stay in registers: it takes smaller tiles.

    Args:
        head_dim: Head dimension, padded to a power of two.
        itemsize: Bytes of one element of q, k and v.
        block_m: Query block, tokens; the tile divides it.
        block_n: Key block, tokens; a step is a part of one, or two of them.
        shared_bytes: Shared memory that one program may use.

    Returns:
        `(tile_m, tile_n, num_warps, num_stages)`: the largest tiles with which q and do take a
        third of the shared memory at most, and a stage of k and v fits into the rest.
    """
    exact = itemsize == 4
    row_bytes = head_dim * itemsize
    tile_m = min(block_m, 32 if exact else 16384 // head_dim, 128)
    while tile_m > 16 and 6 * tile_m * row_bytes > shared_bytes:
        tile_m //= 2
    room = shared_bytes - 2 * tile_m * row_bytes
    tile_n = min(2 * block_n, 32 if exact else 16384 // head_dim, 128)
    while tile_n > 16 and 4 * tile_n * row_bytes > room:
        tile_n //= 2
    stages = max(1, min(2, room // (2 * tile_n * row_bytes)))
    return tile_m, tile_n, 8 if tile_m * tile_n >= 128 * 64 else 4, stages
