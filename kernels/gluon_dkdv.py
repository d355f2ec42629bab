"""What are the gradients of keys and values on a Hopper GPU? The Gluon kernel for sm_90.

dv_j = sum_i p_ij do_i and dk_j = scale * sum_i p_ij (do_i . v_j - delta_i) q_i, over the query
blocks that list the key block, in every query head of the group. One program a block of 64 keys:
one consumer warpgroup, which keeps both gradients in registers, and a producer warp, which brings
64 queries a step. Two programs share a processor: one computes while the other waits. No atomics,
the same bits on every run; the oracle is `kernels.reference.backward`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from afbs_compile.kernels.gluon_dkdv_producer import place, produce
from afbs_compile.kernels.gluon_kernel import tma_store
from afbs_compile.kernels.gluon_mask import BOX, ROWS, thread_barrier
from afbs_compile.kernels.gluon_ring import barriers_for, get, phase_of
from afbs_compile.kernels.triton_common import LENGTHS

PRODUCER_REGISTERS = gl.constexpr(24)


@gluon.jit
def seen_pairs(rel, n, notes, at, window, layout: gl.constexpr, CAUSAL: gl.constexpr):
    """Bool `[keys, queries]`: which of the step's queries see which keys.

    `rel` is the query lane that stands at the key's own position: a key is seen from there on,
    and by as many queries as the window reaches.
    """
    reach = get(notes.index(3 * at + 1))
    sink = get(notes.index(3 * at + 2))
    lane = gl.arange(0, ROWS, layout=gl.SliceLayout(0, layout))[None, :]
    highest = rel + gl.where(n < sink, window, gl.minimum(window, reach)) - 1
    seen = lane <= highest[:, None]
    if CAUSAL:
        seen &= lane >= rel[:, None]
    return seen


@gluon.jit
def add_step(
    k, v, q_s, do_s, lse2_s, delta_s, notes, barriers, step, dk, dv, n, scale_log2, nothing, site,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """`dk` and `dv` plus what 64 queries give to them under the mask.

    Pairs lie as `[keys, queries]`.
    """
    q_full, q_empty, do_full, do_empty, rows_full = barriers
    _, _, offset, window = site
    layout: gl.constexpr = nothing.type.layout
    column: gl.constexpr = gl.SliceLayout(0, layout)
    operand: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    at = step & (STAGES - 1)
    phase = phase_of(step, STAGES)
    q = q_s.index(at)
    do = do_s.index(at)
    mbarrier.wait(q_full.index(at), phase)
    s_pending = warpgroup_mma(k, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
    mbarrier.wait(do_full.index(at), phase)
    dp_pending = warpgroup_mma(v, do.permute((1, 0)), nothing, use_acc=False, is_async=True)
    mbarrier.wait(rows_full.index(at), phase)
    minus_lse2 = lse2_s.index(at).load(column)
    # wait for both: no branch or comparison between products in flight
    s, dp = warpgroup_mma_wait(0, deps=[s_pending, dp_pending])
    rel = n - offset - get(notes.index(3 * at))
    p = gl.exp2(gl.fma(s, scale_log2, minus_lse2[None, :]))
    p = gl.where(seen_pairs(rel, n, notes, at, window, layout, CAUSAL), p, 0.0)
    dv_pending = warpgroup_mma(gl.convert_layout(p.to(q_s.dtype), operand), do, dv, is_async=True)
    delta = delta_s.index(at).load(column)
    ds = gl.where(p == 0.0, 0.0, p * (dp - delta[None, :]))  # not 0 * NaN
    dk_pending = warpgroup_mma(gl.convert_layout(ds.to(q_s.dtype), operand), q, dk, is_async=True)
    dv = warpgroup_mma_wait(1, deps=[dv_pending])
    mbarrier.arrive(do_empty.index(at), count=1)
    dk = warpgroup_mma_wait(0, deps=[dk_pending])
    mbarrier.arrive(q_empty.index(at), count=1)
    return dk, dv


@gluon.jit
def overlap(
    k, v, q_s, do_s, lse2_s, delta_s, barriers, step, begin, dk, dv, scale_log2, nothing,
    STAGES: gl.constexpr,
):  # fmt: skip
    """`add_step` without a mask, which leaves its last product under way.

    It waits for that of the step before, none at step `begin`, when its own first one is queued;
    9 % less time at 16k tokens on an H200.
    """
    q_full, q_empty, do_full, do_empty, rows_full = barriers
    column: gl.constexpr = gl.SliceLayout(0, nothing.type.layout)
    operand: gl.constexpr = gl.DotOperandLayout(0, dv.type.layout, 2)
    at = step & (STAGES - 1)
    phase = phase_of(step, STAGES)
    q = q_s.index(at)
    do = do_s.index(at)
    mbarrier.wait(q_full.index(at), phase)
    s_pending = warpgroup_mma(k, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
    dk = warpgroup_mma_wait(1, deps=[dk])
    mbarrier.arrive(q_empty.index((step - 1) & (STAGES - 1)), count=1, pred=step > begin)
    mbarrier.wait(do_full.index(at), phase)
    dp_pending = warpgroup_mma(v, do.permute((1, 0)), nothing, use_acc=False, is_async=True)
    mbarrier.wait(rows_full.index(at), phase)
    minus_lse2 = lse2_s.index(at).load(column)
    s = warpgroup_mma_wait(1, deps=[s_pending])
    p = gl.exp2(gl.fma(s, scale_log2, minus_lse2[None, :]))
    dv_pending = warpgroup_mma(gl.convert_layout(p.to(q_s.dtype), operand), do, dv, is_async=True)
    delta = delta_s.index(at).load(column)
    dp = warpgroup_mma_wait(1, deps=[dp_pending])
    ds = p * (dp - delta[None, :])
    dk = warpgroup_mma(gl.convert_layout(ds.to(q_s.dtype), operand), q, dk, is_async=True)
    dv = warpgroup_mma_wait(1, deps=[dv_pending])
    mbarrier.arrive(do_empty.index(at), count=1)
    return dk, dv


@gluon.jit
def consume(
    dk_desc, dv_desc, k_s, v_s, q_s, do_s, lse2_s, delta_s, notes, plan, once, barriers, scale,
    scale_log2, tiling, site, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """The consumer warpgroup: the gradients of 64 keys and values."""
    batch_heads, kv_heads, blocks_k = tiling
    plan_full, k_full, v_full = once
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    bh, tile = place(batch_heads, blocks_k)
    first = tile * BOX
    n = first + gl.arange(0, BOX, layout=gl.SliceLayout(1, s_layout))
    nothing = gl.zeros([BOX, ROWS], gl.float32, s_layout)
    dk = gl.zeros([BOX, D], gl.float32, layout)
    dv = gl.zeros([BOX, D], gl.float32, layout)
    mbarrier.wait(plan_full.index(0), 0)
    masked = get(plan.index(0))
    steps = get(plan.index(1))
    mbarrier.wait(k_full.index(0), 0)
    mbarrier.wait(v_full.index(0), 0)
    for step in range(0, masked):
        dk, dv = add_step(
            k_s, v_s, q_s, do_s, lse2_s, delta_s, notes, barriers, step, dk, dv, n, scale_log2,
            nothing, site, STAGES, CAUSAL,
        )  # fmt: skip
    dk_pending = warpgroup_mma_init(dk)
    for step in range(masked, steps):
        dk_pending, dv = overlap(
            k_s, v_s, q_s, do_s, lse2_s, delta_s, barriers, step, masked, dk_pending, dv,
            scale_log2, nothing, STAGES,
        )  # fmt: skip
    dk = warpgroup_mma_wait(0, deps=[dk_pending])
    thread_barrier()  # all four warps have read k and v: the gradients take their place
    k_s.store((dk * scale).to(dk_desc.dtype))
    v_s.store(dv.to(dv_desc.dtype))
    fence_async_shared()
    tma_store(dk_desc, [bh // kv_heads, bh % kv_heads, first, 0], k_s)
    tma_store(dv_desc, [bh // kv_heads, bh % kv_heads, first, 0], v_s)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=[*LENGTHS, "batch_heads", "kv_heads"])
def dkdv_kernel(
    q_desc, do_desc, k_desc, v_desc, dk_desc, dv_desc, counts_t, indices_t, policy, lse2, delta,
    scale, scale_log2, batch_heads, kv_heads, group, blocks_q, blocks_k, length_q, length_k,
    offset, window, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Shared memory and barriers, then the consumer and the producer side by side."""
    dtype: gl.constexpr = q_desc.dtype
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_s = gl.allocate_shared_memory(dtype, [BOX, D], shared)
    v_s = gl.allocate_shared_memory(dtype, [BOX, D], shared)
    q_s = gl.allocate_shared_memory(dtype, [STAGES, ROWS, D], shared)
    do_s = gl.allocate_shared_memory(dtype, [STAGES, ROWS, D], shared)
    lse2_s = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], plain)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], plain)
    # of each stage that needs a mask: its first query, its head's reach and sink
    notes = gl.allocate_shared_memory(gl.int32, [3 * STAGES, 1], plain)
    plan = gl.allocate_shared_memory(gl.int32, [2, 1], plain)  # steps with a mask, steps
    once = (barriers_for(1, 1), barriers_for(1, 1), barriers_for(1, 1))
    barriers = (
        barriers_for(STAGES, 1), barriers_for(STAGES, 1), barriers_for(STAGES, 1),
        barriers_for(STAGES, 1), barriers_for(STAGES, 1),
    )  # fmt: skip
    tiling = (batch_heads, kv_heads, blocks_k)
    site = (length_q, length_k, offset, window)
    gl.warp_specialize(
        [
            (consume, (dk_desc, dv_desc, k_s, v_s, q_s, do_s, lse2_s, delta_s, notes, plan, once,
                       barriers, scale, scale_log2, tiling, site, D, STAGES, CAUSAL)),
            (produce, (q_desc, do_desc, k_desc, v_desc, k_s, v_s, q_s, do_s, lse2_s, delta_s,
                       notes, plan, once, barriers, counts_t, indices_t, policy, lse2, delta,
                       tiling, site, group, blocks_q, STAGES, CAUSAL)),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )  # fmt: skip
