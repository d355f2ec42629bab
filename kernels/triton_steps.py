"""Which steps does the portable forward take over a block list? Triton, sm_80 and later.

A step folds one listed tile of keys, or two, into an online softmax in base 2 (Milakov &
Gimelshein, arXiv 1805.02867; FlashAttention-2, arXiv 2307.08691). `kernels.triton_forward_kernel`
says which tiles go through which loop.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from afbs_compile.kernels.triton_common import MODE, SINK, UNLIMITED, WINDOW, WINDOWED

NO_WINDOW = tl.constexpr(UNLIMITED)
CHUNK = tl.constexpr(32)  # list entries looked at together


@triton.jit
def whole_blocks(list_row, count, last_seen, BLOCK_N: tl.constexpr):
    """How many of the listed blocks end at or before `last_seen`; the list is ascending."""
    beyond = CHUNK + 0
    while (count > 0) & (beyond == CHUNK):
        at = count - 1 - tl.arange(0, CHUNK)
        ends = tl.load(list_row + at, mask=at >= 0, other=0) * BLOCK_N + BLOCK_N - 1
        beyond = tl.sum(((at >= 0) & (ends > last_seen)).to(tl.int32), 0)
        count -= beyond
    return count


@triton.jit
def blocks_before(list_row, count, first_seen, BLOCK_N: tl.constexpr):
    """How many of the listed blocks start before `first_seen`; the list is ascending."""
    passed = 0
    before = CHUNK + 0
    while (passed < count) & (before == CHUNK):
        at = passed + tl.arange(0, CHUNK)
        starts = tl.load(list_row + at, mask=at < count, other=0) * BLOCK_N
        before = tl.sum(((at < count) & (starts < first_seen)).to(tl.int32), 0)
        passed += before
    return passed


@triton.jit
def tile_start(list_row, t, BLOCK_N: tl.constexpr, TILE_N: tl.constexpr):
    """Where the `t`-th tile of the listed keys starts."""
    PARTS: tl.constexpr = BLOCK_N // TILE_N
    return tl.load(list_row + t // PARTS) * BLOCK_N + t % PARTS * TILE_N


@triton.jit
def load_rows(rows, d, D: tl.constexpr, D_PADDED: tl.constexpr):
    """Rows of k or v that are all in bounds, padded with zeros to `D_PADDED` columns."""
    if D == D_PADDED:
        return tl.load(rows + d[None, :])
    else:  # noqa: RET505  a compile-time branch
        return tl.load(rows + d[None, :], mask=(d < D)[None, :], other=0.0)


@triton.jit
def load_tile(
    source, start, D: tl.constexpr, D_PADDED: tl.constexpr, TILE_N: tl.constexpr,
    BOXES: tl.constexpr,
):  # fmt: skip
    """Keys or values `[TILE_N, D_PADDED]` from row `start` on, all in bounds or in a box.

    Args:
        source: Address of the head's first row, stride of rows, the box, batch and kv head.
        start: First row; what a box holds beyond the last row is 0.
        D: Head dimension.
        D_PADDED: Its next power of two.
        TILE_N: Rows.
        BOXES: Whether the copy engine reads them.
    """
    head, stride, box, batch, kv_head = source
    if BOXES:
        return box.load([batch, kv_head, start, 0]).reshape(TILE_N, D_PADDED)
    else:  # noqa: RET505  a compile-time branch
        lane = tl.arange(0, TILE_N).to(tl.int64)[:, None] * stride
        rows = head + start.to(tl.int64) * stride + lane
        return load_rows(rows, tl.arange(0, D_PADDED), D, D_PADDED)


@triton.jit
def load_delayed(
    source, start, far, D: tl.constexpr, D_PADDED: tl.constexpr, TILE_N: tl.constexpr,
    BOXES: tl.constexpr,
):  # fmt: skip
    """`load_tile`, but zeros if `start` is `far`, the number of rows."""
    if BOXES:
        return load_tile(source, start, D, D_PADDED, TILE_N, BOXES)
    else:  # noqa: RET505  a compile-time branch
        d = tl.arange(0, D_PADDED)
        n = start + tl.arange(0, TILE_N)
        rows = source[0] + n.to(tl.int64)[:, None] * source[1]
        there = (n < far)[:, None] & (d < D)[None, :]
        return tl.load(rows + d[None, :], mask=there, other=0.0)


@triton.jit
def own_window(policy):
    """Reach and sink of a head's own window, in keys; a head without one reaches everything."""
    windowed = tl.load(policy + MODE) == WINDOWED
    reach = tl.where(windowed, tl.load(policy + WINDOW).to(tl.int32), NO_WINDOW)
    return reach, tl.load(policy + SINK).to(tl.int32)


@triton.jit
def hide(s, n, i, site, CAUSAL: tl.constexpr):
    """Scores `s` of queries at key positions `i`, −inf where one may not see its key `n`."""
    window, reach, sink, length_k = site
    seen = (n[None, :] > (i - reach)[:, None]) | (n < sink)[None, :]
    seen &= (n[None, :] > (i - window)[:, None]) & (n < length_k)[None, :]
    if CAUSAL:
        seen &= n[None, :] <= i[:, None]
    return tl.where(seen, s, -float("inf"))


@triton.jit
def weigh(s, s_b, total, top, scale_log2, PAIR: tl.constexpr):
    """Weights of raw scores, the new running sum and maximum, and what the old ones shrink by."""
    highest = tl.maximum(s, s_b) if PAIR else s
    top_new = tl.maximum(top, tl.max(highest, 1) * scale_log2)
    shrink = tl.exp2(top - top_new)
    p = tl.exp2(s * scale_log2 - top_new[:, None])
    p_b = p
    both = p
    if PAIR:
        p_b = tl.exp2(s_b * scale_log2 - top_new[:, None])
        both = p + p_b
    return p, p_b, total * shrink + tl.sum(both, 1), top_new, shrink


@triton.jit
def masked_step(q, k, v, n, i, state, scale_log2, site, CAUSAL: tl.constexpr):
    """Fold in keys `n`, of which a query may see some."""
    total, top, acc = state
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    s = hide(s, n, i, site, CAUSAL)
    p, _, total, top, shrink = weigh(s, s, total, top, scale_log2, False)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return total, top, acc


@triton.jit
def whole_steps(
    q, keys, values, state, list_row, begin, end, scale_log2, D: tl.constexpr,
    D_PADDED: tl.constexpr, BLOCK_N: tl.constexpr, TILE_N: tl.constexpr, PAIR: tl.constexpr,
    BOXES: tl.constexpr,
):  # fmt: skip
    """Fold in tiles `begin` to `end`, all of whose keys every query sees; pairs are complete."""
    total, top, acc = state
    EACH: tl.constexpr = 2 if PAIR else 1
    at = begin * 0
    at_b = at
    if begin < end:
        at = tile_start(list_row, begin, BLOCK_N, TILE_N)
        if PAIR:
            at_b = tile_start(list_row, begin + 1, BLOCK_N, TILE_N)
    for t in range(begin + EACH, end + EACH, EACH):
        # the list is read a step ahead: the pipeline would spend one of its stages on it
        next_at = tile_start(list_row, tl.minimum(t, end - 1), BLOCK_N, TILE_N)
        k = load_tile(keys, at, D, D_PADDED, TILE_N, BOXES)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        s_b = s
        if PAIR:
            k_b = load_tile(keys, at_b, D, D_PADDED, TILE_N, BOXES)
            s_b = tl.dot(q, tl.trans(k_b), input_precision="ieee")
        p, p_b, total, top, shrink = weigh(s, s_b, total, top, scale_log2, PAIR)
        acc *= shrink[:, None]
        v = load_tile(values, at, D, D_PADDED, TILE_N, BOXES)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        if PAIR:
            v_b = load_tile(values, at_b, D, D_PADDED, TILE_N, BOXES)
            acc = tl.dot(p_b.to(v.dtype), v_b, acc, input_precision="ieee")
            at_b = tile_start(list_row, tl.minimum(t + 1, end - 1), BLOCK_N, TILE_N)
        at = next_at
    return total, top, acc


@triton.jit
def whole_steps_ahead(
    q, keys, values, state, list_row, begin, end, scale_log2, far, D: tl.constexpr,
    D_PADDED: tl.constexpr, BLOCK_N: tl.constexpr, TILE_N: tl.constexpr, PAIR: tl.constexpr,
    BOXES: tl.constexpr,
):  # fmt: skip
    """`whole_steps` with P·V a step behind Q·K: it runs while the next weights are made.

    The first step adds the values of rows `far` on, which are not there: 0 times 0. The last one
    makes scores that nobody uses.
    """
    total, top, acc = state
    EACH: tl.constexpr = 2 if PAIR else 1
    at = begin * 0
    at_b = at
    if begin < end:
        at = tile_start(list_row, begin, BLOCK_N, TILE_N)
        if PAIR:
            at_b = tile_start(list_row, begin + 1, BLOCK_N, TILE_N)
    steps = tl.where(begin < end, (end - begin) // EACH + 1, 0)
    v_at = far + begin * 0
    v_at_b = v_at
    # carried in fp32: only what a loop itself rounds stays in registers on its way to P·V
    p = tl.zeros([q.shape[0], TILE_N], tl.float32)
    p_b = p
    shrink = tl.full([q.shape[0]], 1.0, tl.float32)
    for u in range(0, steps):
        t = begin + (u + 1) * EACH
        next_at = tile_start(list_row, tl.minimum(t, end - 1), BLOCK_N, TILE_N)
        k = load_tile(keys, at, D, D_PADDED, TILE_N, BOXES)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        s_b = s
        if PAIR:
            k_b = load_tile(keys, at_b, D, D_PADDED, TILE_N, BOXES)
            s_b = tl.dot(q, tl.trans(k_b), input_precision="ieee")
        acc *= shrink[:, None]
        v = load_delayed(values, v_at, far, D, D_PADDED, TILE_N, BOXES)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        if PAIR:
            v_b = load_delayed(values, v_at_b, far, D, D_PADDED, TILE_N, BOXES)
            acc = tl.dot(p_b.to(v.dtype), v_b, acc, input_precision="ieee")
            # not `at_b` itself: what skips a step on its way round a loop stops the pipeline
            v_at_b = tl.minimum(at_b, far)
            at_b = tile_start(list_row, tl.minimum(t + 1, end - 1), BLOCK_N, TILE_N)
        p, p_b, total_new, top_new, shrink = weigh(s, s_b, total, top, scale_log2, PAIR)
        total = tl.where(u < steps - 1, total_new, total)
        top = tl.where(u < steps - 1, top_new, top)
        v_at = tl.minimum(at, far)
        at = next_at
    return total, top, acc
