"""How does a GPU attend over block lists? The portable Triton kernel, sm_80 and later.

One program serves a tile of queries of one head. Its list falls into three kinds of blocks, with
a loop each: every query sees every key (most blocks); each key is seen by some query, so that
values need no mask (the diagonal, through boxes); the rest. The steps are `kernels.triton_steps`,
the launcher is `kernels.triton_forward`, the oracle `kernels.reference`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from afbs_compile.kernels.triton_common import COLUMNS, LENGTHS, LN2, LOWEST
from afbs_compile.kernels.triton_steps import (
    NO_WINDOW,
    blocks_before,
    load_tile,
    masked_step,
    own_window,
    tile_start,
    whole_blocks,
    whole_steps,
    whole_steps_ahead,
)


@triton.jit(do_not_specialize=LENGTHS)
def forward_kernel(
    Q, K, V, O, K_BOX, V_BOX, LSE, COUNTS, INDICES, POLICY, scale_log2,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl,
    stride_vb, stride_vh, stride_vl, stride_ob, stride_oh, stride_ol,
    heads, group, length_q, length_k, blocks_q, blocks_k, offset, window,
    D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, PAIR: tl.constexpr, AHEAD: tl.constexpr,
    BOXES: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Output and lse of `TILE_M` queries of one head; all of them lie in one query block."""
    tiles = tl.cdiv(length_q, TILE_M)
    pid = tl.program_id(0)
    batch, head = pid // tiles // heads, pid // tiles % heads
    kv_head = head // group
    b, h, kv = batch.to(tl.int64), head.to(tl.int64), kv_head.to(tl.int64)
    first = (tiles - 1 - pid % tiles) * TILE_M  # the longest rows of a causal head start first
    last = tl.minimum(first + TILE_M, length_q) - 1
    row = (b * heads + h) * blocks_q + first // BLOCK_M
    count = tl.load(COUNTS + row)
    list_row = INDICES + row * blocks_k

    # Keys from last_low to first_high are seen by every query, and each key from first_low to
    # last_high by some query, and so is the sink of a windowed head.
    reach, sink = own_window(POLICY + h * COLUMNS)
    site = (window, reach, sink, length_k)
    nearest = tl.minimum(window, reach)
    first_high = length_k - 1
    last_high = length_k - 1
    if CAUSAL:
        first_high = tl.minimum(first_high, first + offset)
        last_high = tl.minimum(last_high, last + offset)
    PARTS: tl.constexpr = BLOCK_N // TILE_N
    near_begin = count * 0
    begin = near_begin
    if nearest < NO_WINDOW:
        near_begin = blocks_before(list_row, count, first + offset - nearest + 1, BLOCK_N) * PARTS
        begin = blocks_before(list_row, count, last + offset - nearest + 1, BLOCK_N) * PARTS
    end = tl.maximum(whole_blocks(list_row, count, first_high, BLOCK_N) * PARTS, begin)
    if PAIR:
        end -= (end - begin) % 2

    d = tl.arange(0, D_PADDED)
    i = first + tl.arange(0, TILE_M)
    q_rows = Q + b * stride_qb + h * stride_qh + i.to(tl.int64)[:, None] * stride_ql
    q = tl.load(q_rows + d[None, :], mask=(i < length_q)[:, None] & (d < D)[None, :], other=0.0)
    k_head = K + b * stride_kb + kv * stride_kh
    v_head = V + b * stride_vb + kv * stride_vh
    keys = (k_head, stride_kl, K_BOX, batch, kv_head)
    values = (v_head, stride_vl, V_BOX, batch, kv_head)
    total = tl.zeros([TILE_M], tl.float32)
    top = tl.full([TILE_M], LOWEST, tl.float32)
    acc = tl.zeros([TILE_M, D_PADDED], tl.float32)

    # the steps with a mask come first: the most registers are free for the loop of most steps
    skip, taken = begin, end - begin
    if BOXES:
        near_end = count
        if CAUSAL:  # noqa: SIM102  Triton 3.6 trips over a branch that is never taken
            if last_high < length_k - 1:
                near_end = whole_blocks(list_row, count, last_high, BLOCK_N)
        near_end = tl.maximum(near_end * PARTS, end)
        for u in range(near_begin, near_end - (end - begin)):
            t = tl.where(u < begin, u, u + (end - begin))
            start = tile_start(list_row, t, BLOCK_N, TILE_N)
            k = load_tile(keys, start, D, D_PADDED, TILE_N, BOXES)
            v = load_tile(values, start, D, D_PADDED, TILE_N, BOXES)
            n = start + tl.arange(0, TILE_N)
            total, top, acc = masked_step(
                q, k, v, n, i + offset, (total, top, acc), scale_log2, site, CAUSAL
            )
        skip, taken = near_begin, near_end - near_begin
    for u in range(0, count * PARTS - taken):
        t = tl.where(u < skip, u, u + taken)
        n = tile_start(list_row, t, BLOCK_N, TILE_N) + tl.arange(0, TILE_N)
        # a key that no query of the tile sees is never read: its NaN could leak through 0 * NaN
        wanted = (n >= first + offset - reach + 1) | (n < sink)
        wanted &= (n >= first + offset - window + 1) & (n <= last_high)
        kv_mask = wanted[:, None] & (d < D)[None, :]
        n_rows = n.to(tl.int64)[:, None]
        k = tl.load(k_head + n_rows * stride_kl + d[None, :], mask=kv_mask, other=0.0)
        v = tl.load(v_head + n_rows * stride_vl + d[None, :], mask=kv_mask, other=0.0)
        total, top, acc = masked_step(
            q, k, v, n, i + offset, (total, top, acc), scale_log2, site, CAUSAL
        )
    state = (total, top, acc)
    if AHEAD:
        total, top, acc = whole_steps_ahead(
            q, keys, values, state, list_row, begin, end, scale_log2, length_k,
            D, D_PADDED, BLOCK_N, TILE_N, PAIR, BOXES,
        )  # fmt: skip
    else:
        total, top, acc = whole_steps(
            q, keys, values, state, list_row, begin, end, scale_log2,
            D, D_PADDED, BLOCK_N, TILE_N, PAIR, BOXES,
        )  # fmt: skip

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = acc / total[:, None]
    lse = tl.where(empty, -float("inf"), (top + tl.log2(total)) * LN2)
    # the queries once more, so that the compiler does not know them again: it would keep the
    # addresses of q in registers all the way
    i = tl.minimum(first, length_q) + tl.arange(0, TILE_M)
    there = i < length_q
    tl.store(LSE + (b * heads + h) * length_q + i, lse, mask=there)
    o_rows = O + b * stride_ob + h * stride_oh + i.to(tl.int64)[:, None] * stride_ol
    o_mask = there[:, None] & (d < D)[None, :]
    tl.store(o_rows + d[None, :], acc.to(O.dtype.element_ty), mask=o_mask)
