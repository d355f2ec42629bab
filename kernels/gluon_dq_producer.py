"""Who feeds the consumers of the Gluon dq kernel? One warp, as `kernels.gluon_producer`.

It draws tiles and copies Q and dO of each, then K and V of the listed boxes, from the end of its
list.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from afbs_compile.kernels.gluon_mask import ROWS, TILE
from afbs_compile.kernels.gluon_producer import CONSUMERS, boxes_of, copy_step, survey, tma_load
from afbs_compile.kernels.gluon_ring import announce, phase_of, place, put


@gluon.jit
def copy_tile(desc, b, h, first, full, empty, tile_s, turn):
    """Copy the 128 rows of a tile, 64 for each consumer, when those of the last one are done."""
    mbarrier.wait(empty.index(0), (turn & 1) ^ 1)
    mbarrier.expect(full.index(0), CONSUMERS * desc.block_type.nbytes)
    for c in gl.static_range(CONSUMERS):
        tma_load(desc, [b, h, first + c * ROWS, 0], full.index(0), tile_s.index(c))


@gluon.jit
def produce(
    q_desc, do_desc, k_desc, v_desc, q_s, do_s, k_s, v_s, rings, barriers, counts, indices,
    counter, policy, tiling, site, group, blocks_k, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """The producer warp: tiles, then the listed boxes of each, from the end of its list."""
    starts, tiles = rings
    (q_full, q_empty, do_full, do_empty, k_full, k_empty, v_full, v_empty, tiles_full,
     tiles_empty) = barriers  # fmt: skip
    total_tiles, heads, blocks_q = tiling
    step = 0
    turn = 0
    tile = gl.program_id(0)
    following = tile
    count, masked, _, start_a, start_b = survey(
        tile, counts, indices, policy, tiling, site, blocks_k, CAUSAL
    )
    while tile < total_tiles:
        b, h, first = place(tile, heads, blocks_q)
        listed = indices + ((b * heads + h) * blocks_q + first // TILE).to(gl.int64) * blocks_k
        steps = gl.maximum((count + 1) // 2, 1)
        announce(tile, steps, masked, 0, turn, tiles, tiles_full, tiles_empty)
        next_count = count
        next_masked = masked
        first_a = start_a
        first_b = start_b
        for i in range(steps):
            next_a, next_b = boxes_of(listed, count, i + 1, blocks_k)
            stage = step & (STAGES - 1)
            free = phase_of(step, STAGES) ^ 1
            mbarrier.wait(k_empty.index(stage), free)
            if i < masked:
                put(starts.index(2 * stage), start_a)
                put(starts.index(2 * stage + 1), start_b)
            copy_step(
                k_desc, b, h // group, start_a, start_b, k_full.index(stage), k_s.index(stage)
            )
            if i == 0:
                copy_tile(q_desc, b, h, first, q_full, q_empty, q_s, turn)
                copy_tile(do_desc, b, h, first, do_full, do_empty, do_s, turn)
            mbarrier.wait(v_empty.index(stage), free)
            copy_step(
                v_desc, b, h // group, start_a, start_b, v_full.index(stage), v_s.index(stage)
            )
            if i == gl.maximum(steps - 2, 0):
                following = gl.atomic_add(counter, 1) + gl.num_programs(0)
                next_count, next_masked, _, first_a, first_b = survey(
                    following, counts, indices, policy, tiling, site, blocks_k, CAUSAL
                )
            start_a = next_a
            start_b = next_b
            step += 1
        turn += 1
        tile = following
        count = next_count
        masked = next_masked
        start_a = first_a
        start_b = first_b
    announce(tile, 0, 0, 0, turn, tiles, tiles_full, tiles_empty)
