"""How does a Hopper GPU attend over block lists? The Gluon kernel for sm_90.

Persistent and warp-specialised (FlashAttention-3, arXiv 2407.08608): one producer warp draws
tiles from an atomic counter and copies Q, K, V by TMA; two consumer warpgroups own 64 of a tile's
128 queries each and overlap Q·Kᵀ of one step with P·V of the one before. A step is 128 keys: two
listed boxes of 64. Lists are read from the end, so the diagonal, and the missing half of an odd
list, come first. Steps that need the token mask run in a loop of their own, and so do those of
heads with a lambda, which may leave out P·V.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from afbs_compile.kernels.gluon_mask import ROWS, STEP, hide, hide_values, own_window
from afbs_compile.kernels.gluon_producer import CONSUMERS, produce
from afbs_compile.kernels.gluon_ring import barriers_for, get, next_tile, phase_of, place
from afbs_compile.kernels.gluon_softmax import pack, partial_sums, unpack, weigh
from afbs_compile.kernels.triton_common import COLUMNS, LAMBDA, LENGTHS, LN2, LOWEST

# the name of Triton 3.6, and what 3.9 calls it
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)


@gluon.jit
def overlap(
    q, k_s, v_s, barriers, starts, step, acc, p, top, total, scale_log2,
    nothing, first, cid: gl.constexpr, policy, site, D: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """P·V of one step while the scores of the next are made; the next step's weights come out."""
    _, _, k_full, k_empty, v_full, v_empty, _, _ = barriers
    o_row: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    at = step & (STAGES - 1)
    next_at = (step + 1) & (STAGES - 1)
    next_phase = phase_of(step + 1, STAGES)
    mbarrier.wait(k_full.index(next_at), next_phase)
    k = k_s.index(next_at).permute((1, 0))
    s_pending = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(at), phase_of(step, STAGES))
    o_pending = warpgroup_mma(unpack(p, v_s.dtype, p_layout), v_s.index(at), acc, is_async=True)
    if MASKED:
        start_a = get(starts.index(2 * next_at))
        start_b = get(starts.index(2 * next_at + 1))
        head = own_window(policy, 0)
    if MASKED:  # wait for both: the mask needs the registers that P holds
        acc, s = warpgroup_mma_wait(0, deps=[o_pending, s_pending])
        mbarrier.arrive(k_empty.index(next_at), count=1)
        mbarrier.arrive(v_empty.index(at), count=1)
        s = hide(s, start_a, start_b, first, head, site, CAUSAL)
        weights, top, total, shrink = weigh(s, top, total, scale_log2)
    else:
        s = warpgroup_mma_wait(1, deps=[s_pending])
        mbarrier.arrive(k_empty.index(next_at), count=1)
        weights, top, total, shrink = weigh(s, top, total, scale_log2)
        acc = warpgroup_mma_wait(0, deps=[o_pending])
        mbarrier.arrive(v_empty.index(at), count=1)
    acc = acc * gl.convert_layout(shrink, o_row)[:, None]
    p_next = pack(weights, v_s.dtype)
    if MASKED:
        hide_values(v_s.index(next_at), v_full.index(next_at), next_phase, start_a, start_b,
                    first - cid * ROWS, head, site, D, CAUSAL)  # fmt: skip
    return acc, p_next, top, total


@gluon.jit
def add_values(acc, p, v_s, v_full, v_empty, step, STAGES: gl.constexpr):
    """`acc` plus P·V of one step, whose stage is free again."""
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    at = step & (STAGES - 1)
    mbarrier.wait(v_full.index(at), phase_of(step, STAGES))
    o_pending = warpgroup_mma(unpack(p, v_s.dtype, p_layout), v_s.index(at), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[o_pending])
    mbarrier.arrive(v_empty.index(at), count=1)
    return acc


@gluon.jit
def skip_or_add(
    q, k_s, v_s, barriers, step, acc, top, total, scale_log2, policy, verdict,
    nothing, STAGES: gl.constexpr,
):  # fmt: skip
    """One step of a head with lambda: nothing but Q·K if no row's maximum comes within lambda.

    SpargeAttn's second stage (arXiv 2502.18137, section 3.4), with the skipped weights left out
    of the sum too: what is dropped is dropped as if its blocks were not listed.
    """
    _, _, k_full, k_empty, v_full, v_empty, _, _ = barriers
    o_row: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    at = step & (STAGES - 1)
    mbarrier.wait(k_full.index(at), phase_of(step, STAGES))
    k = k_s.index(at).permute((1, 0))
    s_pending = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s_pending])
    mbarrier.arrive(k_empty.index(at), count=1)
    gain = gl.max(gl.max(s, 1) * scale_log2 - top, 0)
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    verdict.store(gl.full([1], (gain < gl.load(policy + LAMBDA)).to(gl.int32), gl.int32, one))
    # read back from shared memory it is known to be the same for all threads
    if get(verdict) != 0:
        mbarrier.wait(v_full.index(at), phase_of(step, STAGES))
        mbarrier.arrive(v_empty.index(at), count=1)
    else:
        p, top, total, shrink = weigh(s, top, total, scale_log2)
        acc = acc * gl.convert_layout(shrink, o_row)[:, None]
        acc = add_values(acc, pack(p, v_s.dtype), v_s, v_full, v_empty, step, STAGES)
    return acc, top, total


@gluon.jit
def write(acc, top, total, o_desc, o_s, b, h, first, lse, heads, length_q):
    """Store the output, by TMA from shared memory, and the lse of 64 queries."""
    o_row: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    empty = total == 0.0
    total = gl.where(empty, 1.0, total)
    out = acc * gl.convert_layout(1.0 / total, o_row)[:, None]
    tma.store_wait(0)
    o_s.store(out.to(o_desc.dtype))
    fence_async_shared()
    tma_store(o_desc, [b, h, first, 0], o_s)
    i = first + gl.arange(0, ROWS, layout=total.type.layout)
    log_sum = gl.where(empty, -float("inf"), (top + gl.log2(total)) * LN2)
    gl.store(lse + (b * heads + h).to(gl.int64) * length_q + i, log_sum, mask=i < length_q)


@gluon.jit
def consume(
    cid: gl.constexpr, o_desc, q_s, k_s, v_s, o_s, rings, barriers, policy, lse, scale_log2,
    tiling, site, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """One consumer warpgroup: output and lse of 64 queries of every tile drawn."""
    starts, tiles, verdicts = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty, tiles_full, tiles_empty = barriers
    total_tiles, heads, blocks_q = tiling
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    q = q_s.index(cid)
    step = 0
    turn = 0
    tile, steps, masked, clean = next_tile(turn, tiles, tiles_full, tiles_empty)
    while tile < total_tiles:
        b, h, tile_first = place(tile, heads, blocks_q)
        first = tile_first + cid * ROWS
        head = own_window(policy, h)
        nothing = gl.zeros([ROWS, STEP], gl.float32, s_layout)
        top = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, s_layout))
        total = partial_sums(nothing)

        at = step & (STAGES - 1)
        phase = phase_of(step, STAGES)
        mbarrier.wait(q_full.index(0), turn & 1)
        mbarrier.wait(k_full.index(at), phase)
        k = k_s.index(at).permute((1, 0))
        s_pending = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
        start_a = get(starts.index(2 * at))
        start_b = get(starts.index(2 * at + 1))
        s = warpgroup_mma_wait(0, deps=[s_pending])
        mbarrier.arrive(k_empty.index(at), count=1)
        s = hide(s, start_a, start_b, first, head, site, CAUSAL)
        p, top, total, _ = weigh(s, top, total, scale_log2)
        p = pack(p, o_desc.dtype)
        hide_values(v_s.index(at), v_full.index(at), phase, start_a, start_b, tile_first, head,
                    site, D, CAUSAL)  # fmt: skip
        acc = gl.zeros([ROWS, D], gl.float32, o_layout)
        for _ in range(1, masked):
            acc, p, top, total = overlap(
                q, k_s, v_s, barriers, starts, step, acc, p, top, total, scale_log2, nothing,
                first, cid, policy + h * COLUMNS, site, D, STAGES, CAUSAL, True,
            )  # fmt: skip
            step += 1
        for _ in range(masked, clean):
            acc, p, top, total = overlap(
                q, k_s, v_s, barriers, starts, step, acc, p, top, total, scale_log2, nothing,
                first, cid, policy + h * COLUMNS, site, D, STAGES, CAUSAL, False,
            )  # fmt: skip
            step += 1
        if clean == steps:
            mbarrier.arrive(q_empty.index(0), count=1)
        acc = add_values(acc, p, v_s, v_full, v_empty, step, STAGES)
        step += 1
        for _ in range(clean, steps):
            acc, top, total = skip_or_add(
                q, k_s, v_s, barriers, step, acc, top, total, scale_log2, policy + h * COLUMNS,
                verdicts.index(cid), nothing, STAGES,
            )  # fmt: skip
            step += 1
        if clean < steps:
            mbarrier.arrive(q_empty.index(0), count=1)
        turn += 1
        total = gl.convert_layout(gl.sum(total, 1), top.type.layout)
        write(acc, top, total, o_desc, o_s.index(cid), b, h, first, lse, heads, site[0])
        tile, steps, masked, clean = next_tile(turn, tiles, tiles_full, tiles_empty)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=[*LENGTHS, "total_tiles"])
def forward_kernel(
    q_desc, k_desc, v_desc, o_desc, counts, indices, counter, policy, lse, scale_log2,
    total_tiles, heads, group, blocks_q, blocks_k, length_q, length_k, offset, window,
    D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Shared memory and barriers, then two consumers and the producer side by side."""
    dtype: gl.constexpr = q_desc.dtype
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_s = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, D], shared)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, STEP, D], shared)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, STEP, D], shared)
    o_s = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, D], shared)
    # where the two boxes of each stage start; what `announce` tells of the next two tiles
    rings = (
        gl.allocate_shared_memory(gl.int32, [2 * STAGES, 1], plain),
        gl.allocate_shared_memory(gl.int32, [4, 1], plain),
        gl.allocate_shared_memory(gl.int32, [CONSUMERS, 1], plain),
    )
    barriers = (
        barriers_for(1, 1), barriers_for(1, CONSUMERS),
        barriers_for(STAGES, 1), barriers_for(STAGES, CONSUMERS),
        barriers_for(STAGES, 1), barriers_for(STAGES, CONSUMERS),
        barriers_for(2, 1), barriers_for(2, CONSUMERS),
    )  # fmt: skip
    tiling = (total_tiles, heads, blocks_q)
    site = (length_q, length_k, offset, window)
    gl.warp_specialize(
        [
            (consume, (0, o_desc, q_s, k_s, v_s, o_s, rings, barriers, policy, lse, scale_log2,
                       tiling, site, D, STAGES, CAUSAL)),
            (consume, (1, o_desc, q_s, k_s, v_s, o_s, rings, barriers, policy, lse, scale_log2,
                       tiling, site, D, STAGES, CAUSAL)),
            (produce, (q_desc, k_desc, v_desc, q_s, k_s, v_s, rings, barriers, counts, indices,
                       counter, policy, tiling, site, group, blocks_k, STAGES, CAUSAL)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
