"""Who feeds the consumer of the Gluon dkdv kernel? One warp: queries, 64 at a time.

First the steps that need the token mask, of all query heads of the group, then the others: the
consumer has one loop for each.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from afbs_compile.kernels.gluon_mask import BOX, NO_WINDOW, ROWS, TILE, own_window
from afbs_compile.kernels.gluon_producer import tma_load
from afbs_compile.kernels.gluon_ring import phase_of, put

HALVES = gl.constexpr(TILE.value // ROWS.value)  # steps of a listed query block
EARLY = gl.constexpr(1)  # key blocks at the start that hold the sink, which every query lists


@gluon.jit
def place(batch_heads, blocks_k):
    """Batch and key/value head, and key block, of this program.

    The sink's blocks of all heads come first: they are the longest by far. Then head after head,
    so that the programs that run at a time read the same queries; a causal head's columns get
    shorter from block to block.
    """
    pid = gl.program_id(0)
    early = gl.minimum(EARLY, blocks_k) * batch_heads
    rest = gl.maximum(blocks_k - EARLY, 1)
    later = gl.maximum(pid - early, 0)
    bh = gl.where(pid < early, pid % batch_heads, later // rest)
    return bh, gl.where(pid < early, pid // batch_heads, EARLY + later % rest)


@gluon.jit
def split(counts_t, indices_t, column, first, head, site, blocks_q, CAUSAL: gl.constexpr):
    """The list of a column in half blocks: where steps without a mask start and end, and its ends.

    Queries that are not there need no mask: they are zeros with an lse of +inf. Of a block on the
    diagonal the first half may see nothing: the list starts after it.
    """
    reach, sink = head
    _, length_k, offset, window = site
    listed = indices_t + column.to(gl.int64) * blocks_q
    count = gl.load(counts_t + column)
    start = 0
    whole = 0
    if CAUSAL:
        last = gl.minimum(first + BOX, length_k) - 1
        block = gl.load(listed, mask=count > 0, other=0)
        start = ((count > 0) & (block * TILE + ROWS - 1 + offset < first)).to(gl.int32)
        while (whole < count) & (block * TILE + offset < last):
            whole += 1
            block = gl.load(listed + whole, mask=whole < count, other=0)
    tail = count
    near = gl.minimum(window, reach)
    if (reach < NO_WINDOW) & (first < sink):  # some keys are seen by all, some by near queries
        tail = whole
    if (near < NO_WINDOW) & (tail > whole):
        block = gl.load(listed + tail - 1)
        while (tail > whole) & (block * TILE + TILE - 1 + offset - near >= first):
            tail -= 1
            block = gl.load(listed + tail - 1, mask=tail > whole, other=0)
    return start, whole * HALVES, tail * HALVES, count * HALVES


@gluon.jit
def feed(
    q_desc, do_desc, q_s, do_s, lse2_s, delta_s, notes, barriers, lse2, delta, b, h, rows, at,
    head, step, STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Bring the 64 queries from `at` on: Q and dO by TMA, their two statistics by hand."""
    q_full, q_empty, do_full, do_empty, rows_full = barriers
    pair: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    stage = step & (STAGES - 1)
    free = phase_of(step, STAGES) ^ 1
    lane = gl.arange(0, ROWS, layout=pair)
    own_lse2 = gl.load(lse2 + rows + at + lane)
    own_delta = gl.load(delta + rows + at + lane)
    mbarrier.wait(q_empty.index(stage), free)
    if MASKED:
        reach, sink = head
        put(notes.index(3 * stage), at)
        put(notes.index(3 * stage + 1), reach)
        put(notes.index(3 * stage + 2), sink)
    mbarrier.expect(q_full.index(stage), q_desc.block_type.nbytes)
    tma_load(q_desc, [b, h, at, 0], q_full.index(stage), q_s.index(stage))
    mbarrier.wait(do_empty.index(stage), free)
    mbarrier.expect(do_full.index(stage), do_desc.block_type.nbytes)
    tma_load(do_desc, [b, h, at, 0], do_full.index(stage), do_s.index(stage))
    lse2_s.index(stage).store(-own_lse2)  # the consumer would negate 64 times as many
    delta_s.index(stage).store(own_delta)
    mbarrier.arrive(rows_full.index(stage), count=1)


@gluon.jit
def produce(
    q_desc, do_desc, k_desc, v_desc, k_s, v_s, q_s, do_s, lse2_s, delta_s, notes, plan, once,
    barriers, counts_t, indices_t, policy, lse2, delta, tiling, site, group, blocks_q,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """The producer warp: keys and values, then the listed queries of every head."""
    batch_heads, kv_heads, blocks_k = tiling
    plan_full, k_full, v_full = once
    bh, tile = place(batch_heads, blocks_k)
    b = bh // kv_heads
    first = tile * BOX
    mbarrier.expect(k_full.index(0), k_desc.block_type.nbytes)
    tma_load(k_desc, [b, bh % kv_heads, first, 0], k_full.index(0), k_s)
    mbarrier.expect(v_full.index(0), v_desc.block_type.nbytes)
    tma_load(v_desc, [b, bh % kv_heads, first, 0], v_full.index(0), v_s)
    masked_steps = 0
    steps = 0
    for g in range(group):
        head = own_window(policy, bh % kv_heads * group + g)
        column = (bh * group + g) * blocks_k + tile
        start, whole, tail, end = split(
            counts_t, indices_t, column, first, head, site, blocks_q, CAUSAL
        )
        masked_steps += whole - start + end - tail
        steps += end - start
    put(plan.index(0), masked_steps)
    put(plan.index(1), steps)
    mbarrier.arrive(plan_full.index(0), count=1)
    step = 0
    for later in gl.static_range(2):
        for g in range(group):
            h = bh % kv_heads * group + g
            head = own_window(policy, h)
            column = (bh * group + g) * blocks_k + tile
            start, whole, tail, end = split(
                counts_t, indices_t, column, first, head, site, blocks_q, CAUSAL
            )
            listed = indices_t + column.to(gl.int64) * blocks_q
            rows = (bh * group + g).to(gl.int64) * (blocks_q * TILE)
            if later == 0:
                for i in range(start, whole + end - tail):
                    t = gl.where(i < whole, i, i + tail - whole)
                    at = gl.load(listed + t // HALVES) * TILE + t % HALVES * ROWS
                    feed(
                        q_desc, do_desc, q_s, do_s, lse2_s, delta_s, notes, barriers, lse2,
                        delta, b, h, rows, at, head, step, STAGES, True,
                    )  # fmt: skip
                    step += 1
            else:
                for t in range(whole, tail):
                    at = gl.load(listed + t // HALVES) * TILE + t % HALVES * ROWS
                    feed(
                        q_desc, do_desc, q_s, do_s, lse2_s, delta_s, notes, barriers, lse2,
                        delta, b, h, rows, at, head, step, STAGES, False,
                    )  # fmt: skip
                    step += 1
