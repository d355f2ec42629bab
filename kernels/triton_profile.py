"""How does a GPU measure every threshold of a query block? Two kernels that walk over its keys.

`dense_kernel` finds each row's largest score, then the dense output and how close every key block
comes to that score. `walk_kernel` adds the same blocks up again in the order of their rank, and
after each one writes Σ|o − o*|, for several lambda levels at once: they share QKᵀ and PV, and
differ in which blocks go into their sums. Both weigh keys by exp2(s − largest score of the row):
one fixed reference, so that nothing is rescaled and what the weights lose when they are rounded
for the tensor cores is the same in o and in o*. The oracle is `kernels.profile_rows`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from afbs_compile.kernels.triton_common import LENGTHS, end_block, first_block

SIZES = [*LENGTHS, "rows", "programs"]
LEAST = tl.constexpr(1e-30)  # as in `kernels.profile`
TINY = tl.constexpr(1e-37)  # its inverse is finite


@triton.jit
def spans(
    first, length_q, length_k, offset, window, TILE_M: tl.constexpr, CAUSAL: tl.constexpr
):  # fmt: skip
    """First and last key that each row of a tile sees, and the tile's last; none past the end."""
    i = first + tl.arange(0, TILE_M)
    low = i * 0
    high = i * 0 + length_k - 1
    last = length_k - 1
    if CAUSAL:
        low = i + offset - window + 1
        high = tl.minimum(high, i + offset)
        last = tl.minimum(last, tl.minimum(first + TILE_M, length_q) - 1 + offset)
    return low, tl.where(i < length_q, high, -1), last


@triton.jit
def seen_keys(n, low, high, WINDOWED: tl.constexpr):
    """Which of the keys n each row sees."""
    seen = n[None, :] <= high[:, None]
    if WINDOWED:
        seen &= n[None, :] >= low[:, None]
    return seen


@triton.jit
def load_keys(head, n, stride, last, D: tl.constexpr, D_PADDED: tl.constexpr):
    """Rows n of k or v; a key that no row of the tile sees is 0, lest its NaN leaks."""
    d = tl.arange(0, D_PADDED)
    there = (n <= last)[:, None] & (d < D)[None, :]
    return tl.load(head + n.to(tl.int64)[:, None] * stride + d[None, :], mask=there, other=0.0)


@triton.jit
def add_values(p, v, sums):
    """`sums` and P·V. Half precision has no room for small weights: it takes a wider product."""
    if v.dtype == tl.float16:
        return tl.dot(p, v.to(tl.float32), sums, input_precision="tf32")
    else:  # noqa: RET505  a compile-time branch
        return tl.dot(p.to(v.dtype), v, sums, input_precision="ieee")


@triton.jit(do_not_specialize=SIZES[:-1])
def dense_kernel(
    Q, K, V, ROWS, TOP, O, NEAR, scale_log2,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl,
    stride_vb, stride_vh, stride_vl,
    heads, group, length_q, length_k, rows, blocks_k, offset, window,
    D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """TOP `[B, H, R, M]`, O `[B, H, R, M, D_PADDED]`, NEAR `[B, H, R, T, NK]` of `TILE_M` rows."""
    TILES: tl.constexpr = BLOCK_M // TILE_M
    pid = tl.program_id(0).to(tl.int64)
    tile = (pid % TILES).to(tl.int32)
    r = rows - 1 - pid // TILES % rows  # the longest rows of a causal head start first
    bh = pid // TILES // rows
    b = bh // heads
    h = bh % heads
    first = tl.load(ROWS + r).to(tl.int32) * BLOCK_M + tile * TILE_M
    low, high, last = spans(first, length_q, length_k, offset, window, TILE_M, CAUSAL)
    m = first + tl.arange(0, TILE_M)
    d = tl.arange(0, D_PADDED)
    q_rows = Q + b * stride_qb + h * stride_qh + m.to(tl.int64)[:, None] * stride_ql
    q = tl.load(q_rows + d[None, :], mask=(m < length_q)[:, None] & (d < D)[None, :], other=0.0)
    k_head = K + b * stride_kb + h // group * stride_kh
    v_head = V + b * stride_vb + h // group * stride_vh
    begin = 0
    if WINDOWED:
        begin = first_block(first + offset - window + 1, length_k, BLOCK_N)
    end = end_block(last, length_k, BLOCK_N)

    PARTS: tl.constexpr = BLOCK_N // TILE_N
    top = tl.full([TILE_M], -1e30, tl.float32)
    for t in range(begin * PARTS, end * PARTS):
        n = t * TILE_N + tl.arange(0, TILE_N)
        k = load_keys(k_head, n, stride_kl, last, D, D_PADDED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        s = tl.where(seen_keys(n, low, high, WINDOWED), s, -float("inf"))
        top = tl.maximum(top, tl.max(s, 1))

    total = tl.zeros([TILE_M], tl.float32)
    sums = tl.zeros([TILE_M, D_PADDED], tl.float32)
    at = (bh * rows + r) * BLOCK_M + tile * TILE_M + tl.arange(0, TILE_M)
    near_row = NEAR + ((bh * rows + r) * TILES + tile) * blocks_k
    for j in range(begin, end):
        near = -float("inf")
        for part in tl.static_range(PARTS):
            n = j * BLOCK_N + part * TILE_N + tl.arange(0, TILE_N)
            k = load_keys(k_head, n, stride_kl, last, D, D_PADDED)
            v = load_keys(v_head, n, stride_vl, last, D, D_PADDED)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - top[:, None]
            s = tl.where(seen_keys(n, low, high, WINDOWED), s, -float("inf"))
            near = tl.maximum(near, tl.max(tl.max(s, 1), 0))
            p = tl.exp2(s)
            total += tl.sum(p, 1)
            sums = add_values(p, v, sums)
        tl.store(near_row + j, near)
    o = sums / tl.maximum(total, LEAST)[:, None]
    tl.store(TOP + at, top)
    tl.store(O + at[:, None] * D_PADDED + d[None, :], o)


@triton.jit
def take(rest, total, live, change, mass):
    """Take a block into the sums of a level if it is live; then |o − o*| of every element.

    `change` is the block's own output less o*, `mass` the sum of its weights. `rest` sums the one
    times the other, `total` the weights: o − o* is their ratio.
    """
    mass *= live
    rest += change * mass[:, None]
    total += mass
    return rest, total, tl.abs(rest) * (1.0 / total)[:, None]


@triton.jit
def added_up(x, PARTS: tl.constexpr):
    """Sum of each of the `PARTS` parts of `[M, D, ...]`, with one exchange between warps."""
    return tl.sum(tl.reshape(x, [x.numel // PARTS, PARTS]), 0)


@triton.jit(do_not_specialize=SIZES)
def walk_kernel(
    Q, K, V, ROWS, TOP, O, GAIN, LEVELS, COUNTS, ORDER, ERROR, scale_log2,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl,
    stride_vb, stride_vh, stride_vl,
    heads, group, length_q, length_k, rows, blocks_k, offset, window, programs,
    D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    LEVELS_HELD: tl.constexpr,
):  # fmt: skip
    """ERROR `[G, LEVELS_HELD, B, H, R, T, NK + 1]` of one tile and G'th group of levels.

    GAIN is `[B, H, R, NK]`, ORDER `[G, B, H, R, NK]`, COUNTS `[G, B, H, R]`; entry n of an error
    row is after n blocks of its order, entries above the count stay unwritten.
    """
    TILES: tl.constexpr = BLOCK_M // TILE_M
    pid = tl.program_id(0).to(tl.int64)
    tile = (pid % TILES).to(tl.int32)
    r = rows - 1 - pid // TILES % rows
    gbh = pid // TILES // rows
    bh = gbh % programs
    g = gbh // programs  # the levels that leave out least start first
    b = bh // heads
    h = bh % heads
    first = tl.load(ROWS + r).to(tl.int32) * BLOCK_M + tile * TILE_M
    low, high, last = spans(first, length_q, length_k, offset, window, TILE_M, CAUSAL)
    m = first + tl.arange(0, TILE_M)
    d = tl.arange(0, D_PADDED)
    q_rows = Q + b * stride_qb + h * stride_qh + m.to(tl.int64)[:, None] * stride_ql
    q = tl.load(q_rows + d[None, :], mask=(m < length_q)[:, None] & (d < D)[None, :], other=0.0)
    k_head = K + b * stride_kb + h // group * stride_kh
    v_head = V + b * stride_vb + h // group * stride_vh
    at = (bh * rows + r) * BLOCK_M + tile * TILE_M + tl.arange(0, TILE_M)
    top = tl.load(TOP + at)
    exact = tl.load(O + at[:, None] * D_PADDED + d[None, :])

    gain_row = GAIN + (bh * rows + r) * blocks_k
    order_row = ORDER + (gbh * rows + r) * blocks_k
    count = tl.load(COUNTS + gbh * rows + r)
    level = LEVELS + g * LEVELS_HELD
    step = programs * rows * TILES * (blocks_k + 1)  # from a level to the next
    out = ERROR + g * LEVELS_HELD * step + ((bh * rows + r) * TILES + tile) * (blocks_k + 1)
    norm = tl.sum(tl.abs(exact))
    for z in tl.static_range(LEVELS_HELD):
        tl.store(out + z * step, norm)
    out += tl.arange(0, LEVELS_HELD) * step + 1

    # of no weight at all o is 0: a trace of −o* stands for that, and vanishes beside any key
    rest0 = exact * -LEAST
    total0 = tl.full([TILE_M], LEAST, tl.float32)
    zero = tl.load(level)
    if LEVELS_HELD > 1:
        one = tl.load(level + 1)
        rest1, total1 = rest0, total0
    if LEVELS_HELD > 2:
        two = tl.load(level + 2)
        three = tl.load(level + 3)
        rest2, total2, rest3, total3 = rest0, total0, rest0, total0
    for t in range(0, count):
        j = tl.load(order_row + t)
        gain = tl.load(gain_row + j)
        pv = tl.zeros([TILE_M, D_PADDED], tl.float32)
        mass = tl.zeros([TILE_M], tl.float32)
        for part in tl.static_range(BLOCK_N // TILE_N):
            n = j * BLOCK_N + part * TILE_N + tl.arange(0, TILE_N)
            k = load_keys(k_head, n, stride_kl, last, D, D_PADDED)
            v = load_keys(v_head, n, stride_vl, last, D, D_PADDED)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - top[:, None]
            p = tl.exp2(tl.where(seen_keys(n, low, high, WINDOWED), s, -float("inf")))
            mass += tl.sum(p, 1)
            pv = add_values(p, v, pv)
        change = pv * (1.0 / tl.maximum(mass, TINY))[:, None] - exact
        live = (gain >= zero).to(tl.float32)
        rest0, total0, e = take(rest0, total0, live, change, mass)
        if LEVELS_HELD > 1:
            live = (gain >= one).to(tl.float32)
            rest1, total1, e1 = take(rest1, total1, live, change, mass)
        if LEVELS_HELD == 2:
            e = tl.join(e, e1)
        if LEVELS_HELD > 2:
            live = (gain >= two).to(tl.float32)
            rest2, total2, e2 = take(rest2, total2, live, change, mass)
            live = (gain >= three).to(tl.float32)
            rest3, total3, e3 = take(rest3, total3, live, change, mass)
            e = tl.join(tl.join(e, e2), tl.join(e1, e3))
        tl.store(out + t, added_up(e, LEVELS_HELD))
