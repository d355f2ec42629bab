"""What is the gradient of the queries on a Hopper GPU? The Gluon kernel for sm_90.

dq_i = scale * sum_j p_ij (do_i . v_j - delta_i) k_j with p_ij = exp(scale q_i . k_j - lse_i)
(FlashAttention-2, arXiv 2307.08691), over the forward's lists. Persistent and warp-specialised as
`kernels.gluon_kernel`: a producer warp, two consumer warpgroups of 64 queries each, steps of 128
keys. While one consumer makes probabilities, the other keeps the tensor cores busy. The oracle is
`kernels.reference.backward`.
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

from afbs_compile.kernels.gluon_dq_producer import produce
from afbs_compile.kernels.gluon_kernel import tma_store
from afbs_compile.kernels.gluon_mask import ROWS, STEP, TILE, hide, hide_values, own_window
from afbs_compile.kernels.gluon_producer import CONSUMERS
from afbs_compile.kernels.gluon_ring import barriers_for, get, next_tile, phase_of, place
from afbs_compile.kernels.triton_common import LENGTHS

CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)


@gluon.jit
def add_step(
    q, do, k_s, v_s, starts, barriers, step, dq, lse2, delta, scale_log2, nothing, first, head,
    cid: gl.constexpr, site, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """`dq` plus what 128 keys give to it; their stages are free again."""
    k_full, k_empty, v_full, v_empty = barriers
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, dq.type.layout, 2)
    at = step & (STAGES - 1)
    phase = phase_of(step, STAGES)
    k = k_s.index(at)
    v = v_s.index(at).permute((1, 0))
    mbarrier.wait(k_full.index(at), phase)
    s_pending = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
    if MASKED:
        start_a = get(starts.index(2 * at))
        start_b = get(starts.index(2 * at + 1))
        s = warpgroup_mma_wait(0, deps=[s_pending])
        s = hide(s, start_a, start_b, first, head, site, CAUSAL)
        p = gl.exp2(gl.fma(s, scale_log2, -lse2[:, None]))
        mbarrier.wait(v_full.index(at), phase)
        dp_pending = warpgroup_mma(do, v, nothing, use_acc=False, is_async=True)
        dp = warpgroup_mma_wait(0, deps=[dp_pending])
        mbarrier.arrive(v_empty.index(at), count=1)
        ds = gl.where(p == 0.0, 0.0, p * (dp - delta[:, None]))  # not 0 * NaN
        hide_values(k, k_full.index(at), phase, start_a, start_b, first - cid * ROWS, head, site,
                    D, CAUSAL)  # fmt: skip
    else:
        mbarrier.wait(v_full.index(at), phase)
        dp_pending = warpgroup_mma(do, v, nothing, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s_pending])
        p = gl.exp2(gl.fma(s, scale_log2, -lse2[:, None]))
        dp = warpgroup_mma_wait(0, deps=[dp_pending])
        mbarrier.arrive(v_empty.index(at), count=1)
        ds = p * (dp - delta[:, None])
    ds = gl.convert_layout(ds.to(k_s.dtype), ds_layout)
    dq_pending = warpgroup_mma(ds, k, dq, is_async=True)
    dq = warpgroup_mma_wait(0, deps=[dq_pending])
    mbarrier.arrive(k_empty.index(at), count=1)
    return dq


@gluon.jit
def write(dq, desc, out_s, b, h, first):
    """Store the gradient of 64 queries by TMA from shared memory."""
    tma.store_wait(0)
    out_s.store(dq.to(desc.dtype))
    fence_async_shared()
    tma_store(desc, [b, h, first, 0], out_s)


@gluon.jit
def consume(
    cid: gl.constexpr, dq_desc, q_s, do_s, k_s, v_s, out_s, rings, barriers, policy, lse2, delta,
    scale, scale_log2, tiling, site, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """One consumer warpgroup: the gradients of 64 queries of every tile drawn."""
    starts, tiles = rings
    (q_full, q_empty, do_full, do_empty, k_full, k_empty, v_full, v_empty, tiles_full,
     tiles_empty) = barriers  # fmt: skip
    total_tiles, heads, blocks_q = tiling
    stream = (k_full, k_empty, v_full, v_empty)
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    row: gl.constexpr = gl.SliceLayout(1, s_layout)
    q = q_s.index(cid)
    do = do_s.index(cid)
    step = 0
    turn = 0
    tile, steps, masked, _ = next_tile(turn, tiles, tiles_full, tiles_empty)
    while tile < total_tiles:
        b, h, tile_first = place(tile, heads, blocks_q)
        first = tile_first + cid * ROWS
        head = own_window(policy, h)
        rows = (b * heads + h).to(gl.int64) * (blocks_q * TILE) + first
        own_lse2 = gl.load(lse2 + rows + gl.arange(0, ROWS, layout=row))
        own_delta = gl.load(delta + rows + gl.arange(0, ROWS, layout=row))
        nothing = gl.zeros([ROWS, STEP], gl.float32, s_layout)
        dq = gl.zeros([ROWS, D], gl.float32, dq_layout)
        mbarrier.wait(q_full.index(0), turn & 1)
        mbarrier.wait(do_full.index(0), turn & 1)
        for _ in range(0, masked):
            dq = add_step(
                q, do, k_s, v_s, starts, stream, step, dq, own_lse2, own_delta, scale_log2,
                nothing, first, head, cid, site, D, STAGES, CAUSAL, True,
            )  # fmt: skip
            step += 1
        for _ in range(masked, steps):
            dq = add_step(
                q, do, k_s, v_s, starts, stream, step, dq, own_lse2, own_delta, scale_log2,
                nothing, first, head, cid, site, D, STAGES, CAUSAL, False,
            )  # fmt: skip
            step += 1
        mbarrier.arrive(q_empty.index(0), count=1)
        mbarrier.arrive(do_empty.index(0), count=1)
        turn += 1
        write(dq * scale, dq_desc, out_s.index(cid), b, h, first)
        tile, steps, masked, _ = next_tile(turn, tiles, tiles_full, tiles_empty)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=[*LENGTHS, "total_tiles"])
def dq_kernel(
    q_desc, do_desc, k_desc, v_desc, dq_desc, counts, indices, counter, policy, lse2, delta,
    scale, scale_log2, total_tiles, heads, group, blocks_q, blocks_k, length_q, length_k, offset,
    window, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Shared memory and barriers, then two consumers and the producer side by side."""
    dtype: gl.constexpr = q_desc.dtype
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_s = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, D], shared)
    do_s = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, D], shared)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, STEP, D], shared)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, STEP, D], shared)
    out_s = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, D], shared)
    # where the two boxes of each stage start; what `announce` tells of the next two tiles
    rings = (
        gl.allocate_shared_memory(gl.int32, [2 * STAGES, 1], plain),
        gl.allocate_shared_memory(gl.int32, [4, 1], plain),
    )
    barriers = (
        barriers_for(1, 1), barriers_for(1, CONSUMERS),
        barriers_for(1, 1), barriers_for(1, CONSUMERS),
        barriers_for(STAGES, 1), barriers_for(STAGES, CONSUMERS),
        barriers_for(STAGES, 1), barriers_for(STAGES, CONSUMERS),
        barriers_for(2, 1), barriers_for(2, CONSUMERS),
    )  # fmt: skip
    tiling = (total_tiles, heads, blocks_q)
    site = (length_q, length_k, offset, window)
    gl.warp_specialize(
        [
            (consume, (0, dq_desc, q_s, do_s, k_s, v_s, out_s, rings, barriers, policy, lse2,
                       delta, scale, scale_log2, tiling, site, D, STAGES, CAUSAL)),
            (consume, (1, dq_desc, q_s, do_s, k_s, v_s, out_s, rings, barriers, policy, lse2,
                       delta, scale, scale_log2, tiling, site, D, STAGES, CAUSAL)),
            (produce, (q_desc, do_desc, k_desc, v_desc, q_s, do_s, k_s, v_s, rings, barriers,
                       counts, indices, counter, policy, tiling, site, group, blocks_k, STAGES,
                       CAUSAL)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
