"""How much attention mass does a block hold, on a GPU? Block scores in Triton.

The score kernel goes twice over the pooled keys, once for the softmax statistics of every query
sub-row and once for the mass of every block: computing the products again is cheaper than storing
masses, which leave the registers through shared memory. The oracle is `kernels.scores`, which
explains the selectors.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from afbs_compile.kernels.geometry import Mask
from afbs_compile.kernels.launch import Boxed, aligned, has_copy_engine, launch
from afbs_compile.kernels.score_tiling import pooled_sizes, tiling
from afbs_compile.kernels.triton_common import (
    COLUMNS,
    LENGTHS,
    LOG2E,
    LOWEST,
    SINK,
    UNLIMITED,
    end_block,
    first_block,
    gate_of,
    shared_memory_bytes,
    site_window,
)
from afbs_compile.kernels.triton_mask import Shown
from afbs_compile.kernels.triton_pool import needs_scores, pool, pooled_width

NO_WINDOW = tl.constexpr(UNLIMITED)
LOG2_E = tl.constexpr(LOG2E)


@triton.jit
def sub_block(c, N: tl.constexpr):
    """Which key sub-block stands in column `c` of a tile?

    A thread of a tensor-core result holds columns 8 i + 2 t and the next one, t of four in its
    row. Permuted so, all N sub-blocks of a block lie in one thread: no exchange to add them up.
    """
    if N > 1:
        wide: tl.constexpr = 4 * N
        c = c // wide * wide + c % 8 // 2 * N + c % wide // 8 * 2 + c % 2
    return c


@triton.jit
def fold(e, ROWS: tl.constexpr, COLS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Block scores `[ROWS / M, COLS / N]`: sum over keys, root mean square over query sub-rows."""
    if N > 1:
        parts = tl.reshape(e, [ROWS, COLS // (4 * N), N // 2, 4, 2])
        e = tl.reshape(tl.sum(tl.sum(parts, 4), 2), [ROWS, COLS // N])
    if M > 1:
        e = tl.sqrt(tl.sum(tl.reshape(e * e, [ROWS // M, M, COLS // N]), 1) / M)
    return e


@triton.jit
def products(
    q, K_MEANS, row, c, D_PADDED: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr,
    BOXED: tl.constexpr,
):  # fmt: skip
    """Pooled q·k against the key sub-blocks in columns `c` to `c + COLS` of one head."""
    if BOXED:
        k = K_MEANS.load([(row + c).to(tl.int32), 0])
    else:
        rows = row + c + tl.arange(0, COLS)
        k = tl.load(K_MEANS + rows[:, None] * D_PADDED + tl.arange(0, D_PADDED)[None, :])
    return tl.dot(q, tl.trans(k), input_precision=PRECISION)


@triton.jit
def hide(
    x, low, high, similarity, theta, c, begin, length_k, SIZE: tl.constexpr, GATE: tl.constexpr,
    WEIGHED: tl.constexpr,
):  # fmt: skip
    """Logits (base 2) of the key sub-blocks `c`, -inf before `begin` and where not seen.

    A sub-row sees the sub-block if it sees one of its keys: `first <= high and last >= low`.
    """
    first = c * SIZE
    last = tl.minimum(first + SIZE, length_k) - 1
    inside = (first < length_k) & (c >= begin)
    if GATE:
        inside &= (tl.load(similarity + c, inside, 1.0) < theta) == 0
    elif not WEIGHED:  # a short sub-block, the last one, weighs as many tokens as it has
        short = (length_k - 1) % SIZE + 1
        x += tl.where(last + 1 == length_k, tl.log2(short.to(tl.float32) / SIZE), 0.0)[None, :]
    seen = (first[None, :] <= high[:, None]) & (last[None, :] >= low[:, None]) & inside[None, :]
    return tl.where(seen, x, -float("inf"))


@triton.jit
def hide_data(
    x, states, levels, begin, weights, c, length_k, SIZE: tl.constexpr, N: tl.constexpr,
    GATE: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """`hide` for a data mask: hidden blocks, a row's own sink, keys that nobody sees."""
    inside = c * SIZE < length_k
    state = tl.load(states[:, None] + (c // N)[None, :], inside[None, :], 0)
    weight = tl.load(weights + c, inside, -float("inf"))[None, :]
    if BIASED:
        x += tl.load(levels[:, None] + (c // N)[None, :], inside[None, :], 0.0) * LOG2_E
    if not GATE:
        x += weight
    seen = (state > 0) & (c[None, :] >= begin[:, None]) & (weight > -float("inf"))
    return tl.where(seen, x, -float("inf"))


@triton.jit(do_not_specialize=[*LENGTHS, "rows_k", "stride_b", "stride_h", "stride_w"])
def score_kernel(
    Q_MEANS, K_MEANS, K_SIMILARITY, POLICY, SCORES, STATES, START, WEIGHTS, LEVELS,
    scale_log2,
    heads, group, length_q, length_k, blocks_q, blocks_k, offset, window, rows_k,
    stride_b, stride_h, stride_w,
    D_PADDED: tl.constexpr, SIZE_M: tl.constexpr, SIZE_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    CAUSAL: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr, BOXED: tl.constexpr,
    DATA: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Block scores of `ROWS` query sub-rows of one head; nothing for a head that needs none."""
    M: tl.constexpr = BLOCK_M // SIZE_M
    N: tl.constexpr = BLOCK_N // SIZE_N
    rows = tl.cdiv(length_q, SIZE_M)
    tiles = tl.cdiv(rows, ROWS)
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    h = bh % heads
    first_row = (tiles - 1 - tl.program_id(0) % tiles) * ROWS  # the longest causal rows first
    r = first_row + tl.arange(0, ROWS)
    first = r * SIZE_M
    low = first + offset - window + 1
    high = tl.zeros([ROWS], tl.int32) + length_k
    end_key = length_k
    first_high = length_k
    if CAUSAL:
        high = tl.minimum(first + SIZE_M, length_q) - 1 + offset
        end_key = tl.minimum((first_row + ROWS) * SIZE_M, length_q) - 1 + offset
        first_high = tl.minimum(first_row * SIZE_M + SIZE_M, length_q) - 1 + offset
    high = tl.where(r < rows, high, -1)

    # the sub-blocks that some row sees, without the sink's; those that all rows see whole
    begin = first_block(first_row * SIZE_M + offset - window + 1, length_k, BLOCK_N)
    sink = tl.load(POLICY + h * COLUMNS + SINK).to(tl.int32)
    begin = tl.maximum(begin, tl.cdiv(sink, BLOCK_N)) * N
    end = end_block(end_key, length_k, BLOCK_N) * N
    end = tl.where(needs_scores(POLICY, h, 1, 1) > 0, end, 0)
    start = begin // (4 * N) * (4 * N)  # sub-blocks are ordered within four blocks
    lead = tl.where(start < begin, start + COLS, start)
    whole = tl.minimum(tl.maximum(first_high + 1, 0) // SIZE_N, length_k // SIZE_N)
    whole = start + tl.maximum(whole - start, 0) // COLS * COLS
    if GATE:
        whole = start
    whole = tl.where(window < NO_WINDOW, start, whole)
    states = STATES + r
    levels = LEVELS + r
    own_begin = r
    weights = WEIGHTS
    if DATA:
        whole = start
        at = bh // heads * stride_b + h * stride_h + tl.minimum(r // M, blocks_q - 1)
        states = STATES + at * blocks_k
        levels = LEVELS + at * blocks_k
        own_begin = (tl.load(START + at) + tl.cdiv(sink, BLOCK_N)) * N
        weights = WEIGHTS + bh // heads * stride_w

    theta = gate_of(POLICY + h * COLUMNS)
    q_rows = Q_MEANS + (bh * rows + r)[:, None] * D_PADDED
    q = tl.load(q_rows + tl.arange(0, D_PADDED)[None, :], mask=(r < rows)[:, None], other=0.0)
    row = bh // group * rows_k
    similarity = K_SIMILARITY + bh // group * blocks_k
    column = sub_block(tl.arange(0, COLS), N)
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for c in range(start, end, COLS):
        x = products(q, K_MEANS, row, c, D_PADDED, COLS, PRECISION, BOXED) * scale_log2
        if (c < lead) | (c >= whole):
            x = hide(
                x, low, high, similarity, theta, c + column, begin, length_k, SIZE_N, GATE, DATA
            )
        if DATA:
            x = hide_data(
                x,
                states,
                levels,
                own_begin,
                weights,
                c + column,
                length_k,
                SIZE_N,
                N,
                GATE,
                BIASED,
            )
        top_new = tl.maximum(top, tl.max(x, 1))
        total = total * tl.exp2(top - top_new) + tl.sum(tl.exp2(x - top_new[:, None]), 1)
        top = top_new

    # rows that do not exist or see nothing weigh nothing
    none = (total == 0.0) | (r >= rows)
    shift = tl.where(none, float("inf"), top + tl.log2(tl.where(none, 1.0, total)))[:, None]
    i = first_row // M + tl.arange(0, ROWS // M)
    out = SCORES + (bh * blocks_q + i)[:, None] * blocks_k
    block = tl.arange(0, COLS // N)
    for c in range(start, end, COLS):
        x = products(q, K_MEANS, row, c, D_PADDED, COLS, PRECISION, BOXED) * scale_log2
        if (c < lead) | (c >= whole):
            x = hide(
                x, low, high, similarity, theta, c + column, begin, length_k, SIZE_N, GATE, DATA
            )
        if DATA:
            x = hide_data(
                x,
                states,
                levels,
                own_begin,
                weights,
                c + column,
                length_k,
                SIZE_N,
                N,
                GATE,
                BIASED,
            )
        w = fold(tl.exp2(x - shift), ROWS, COLS, M, N)
        j = c // N + block
        tl.store(out + j[None, :], w, mask=(i < blocks_q)[:, None] & (j < blocks_k)[None, :])


def block_scores(
    q: Tensor,
    k: Tensor,
    policy: Tensor,
    *,
    mask: Mask,
    scale: float,
    selector: str,
    block_m: int,
    block_n: int,
    shown: Shown | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of the key blocks of every query block, on the current device.

    Args:
        q: `[B, Hq, Lq, D]`, fp32, fp16 or bf16, any strides.
        k: `[B, Hkv, Lk, D]`; Hkv divides Hq.
        policy: float32 `[Hq, COLUMNS]`, contiguous.
        mask: The site's mask.
        scale: Multiplier on q·k.
        selector: `sub8`, `sub4` or `mean`.
        block_m: Query block, tokens.
        block_n: Key block, tokens.
        shown: What a data mask leaves; hidden blocks have score 0.

    Returns:
        `scores` fp32 `[B, Hq, NQ, NK]`, not normalised, undefined where a head needs none and
        where the query block sees nothing or only the sink; for `mean` the self-similarities fp32
        `[B, Hq, NQ]` and `[B, Hkv, NK]`, undefined otherwise.

    Raises:
        ValueError: For an unknown selector.
    """
    size_m, size_n = pooled_sizes(selector, block_m, block_n)
    gate = selector == "mean"
    batch, heads, length_q, _ = q.shape
    length_k, group = k.shape[2], heads // k.shape[1]
    blocks_q, blocks_k = -(-length_q // block_m), -(-length_k // block_n)
    fold_m, fold_n = block_m // size_m, block_n // size_n
    padded, itemsize = pooled_width(q)
    tile = tiling(padded, itemsize, fold_m, fold_n, mask.causal, shared_memory_bytes(q.device))
    pooled = pool(
        q, k, policy, size_q=size_m, size_k=size_n, fold_k=fold_n, step_k=tile.cols, cosine=gate,
        valid=None if shown is None else shown.valid,
    )  # fmt: skip
    scores = torch.empty(batch, heads, blocks_q, blocks_k, dtype=torch.float32, device=q.device)
    boxed = itemsize == 2 and has_copy_engine(q.device)
    rows_k = pooled.k.shape[2]
    levels = None if shown is None else shown.levels
    key = (
        score_kernel, q.device.index, q.dtype, q.shape, k.shape, mask, scale, selector, block_m,
        block_n, aligned(policy), shown is not None, levels is not None,
    )  # fmt: skip
    data = (policy, policy, policy), (0, 0, 0)
    if shown is not None:
        weights = shown.weights(size_n)
        data = (shown.states, shown.start, weights), shown.strides_with(weights)
    launch(
        score_kernel, key, q.device, batch * heads * -(-pooled.q.shape[2] // tile.rows),
        (pooled.q, Boxed(pooled.k.view(-1, padded), tile.cols) if boxed else pooled.k,
         pooled.k_similarity, policy, scores, *data[0], policy if levels is None else levels,
         scale * LOG2E, heads, group, length_q, length_k, blocks_q, blocks_k, mask.offset,
         site_window(mask), rows_k, *data[1]),
        D_PADDED=padded, SIZE_M=size_m, SIZE_N=size_n, BLOCK_M=block_m, BLOCK_N=block_n,
        ROWS=tile.rows, COLS=tile.cols, CAUSAL=mask.causal, GATE=gate,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", BOXED=boxed,
        DATA=shown is not None, BIASED=levels is not None,
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
        enable_fp_fusion=True,
    )  # fmt: skip
    return scores, pooled.q_similarity, pooled.k_similarity
