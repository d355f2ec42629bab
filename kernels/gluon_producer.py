"""Who feeds the Gluon kernel's consumers? One warp, which draws tiles and copies Q, K, V by TMA.

What the next copy needs is asked for before the wait for a free stage, and the next tile is drawn
while the last copies of a tile are under way: their latencies are hidden. Drawn earlier, tiles
would be held back from idle programs.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from afbs_compile.kernels.gluon_mask import BOX, ROWS, TILE, masked_steps, own_window
from afbs_compile.kernels.gluon_ring import announce, phase_of, place, put
from afbs_compile.kernels.triton_common import COLUMNS, LAMBDA

# the name of Triton 3.6, and what 3.9 calls it
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
CONSUMERS = gl.constexpr(2)


@gluon.jit
def copy_step(desc, b, h, start_a, start_b, full, stage):
    """Copy the two boxes of a step into one stage; keys past the end arrive as zeros."""
    low = stage.slice(0, BOX)
    high = stage.slice(BOX, BOX)
    mbarrier.expect(full, 2 * desc.block_type.nbytes)
    tma_load(desc, [b, h, start_a, 0], full, low)
    tma_load(desc, [b, h, start_b, 0], full, high)


@gluon.jit
def boxes_of(listed, count, turn, blocks_k):
    """First keys of the two boxes of the step `turn` places before the end of a list.

    A half that is not listed lies past the last key: zeros, and the mask hides them.
    """
    at = 2 * ((count + 1) // 2 - 1 - turn)
    low = gl.load(listed + at, mask=(at >= 0) & (at < count), other=blocks_k)
    high = gl.load(listed + at + 1, mask=(at >= 0) & (at + 1 < count), other=blocks_k)
    return low * BOX, high * BOX


@gluon.jit
def survey(tile, counts, indices, policy, tiling, site, blocks_k, CAUSAL: gl.constexpr):
    """A tile's number of boxes, what `announce` tells of its steps, and its first boxes."""
    total_tiles, heads, blocks_q = tiling
    b, h, first = place(gl.minimum(tile, total_tiles - 1), heads, blocks_q)
    row = (b * heads + h) * blocks_q + first // TILE
    count = gl.load(counts + row)
    listed = indices + row.to(gl.int64) * blocks_k
    start_a, start_b = boxes_of(listed, count, 0, blocks_k)
    steps = gl.maximum((count + 1) // 2, 1)
    masked = masked_steps(listed, steps, first, own_window(policy, h), site, CAUSAL)
    lambda_ = gl.load(policy + h * COLUMNS + LAMBDA)
    skips = (lambda_ > -float("inf")) & (lambda_ < 0.0)
    return count, masked, skips.to(gl.int32), start_a, start_b


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, q_s, k_s, v_s, rings, barriers, counts, indices, counter, policy,
    tiling, site, group, blocks_k, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """The producer warp: tiles, then the listed boxes of each, from the end of its list."""
    starts, tiles, _ = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty, tiles_full, tiles_empty = barriers
    total_tiles, heads, blocks_q = tiling
    step = 0
    turn = 0
    tile = gl.program_id(0)
    following = tile
    count, masked, skips, start_a, start_b = survey(
        tile, counts, indices, policy, tiling, site, blocks_k, CAUSAL
    )
    while tile < total_tiles:
        b, h, first = place(tile, heads, blocks_q)
        listed = indices + ((b * heads + h) * blocks_q + first // TILE).to(gl.int64) * blocks_k
        steps = gl.maximum((count + 1) // 2, 1)
        announce(tile, steps, masked, skips, turn, tiles, tiles_full, tiles_empty)
        next_count = count
        next_masked = masked
        next_skips = skips
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
                mbarrier.wait(q_empty.index(0), (turn & 1) ^ 1)
                mbarrier.expect(q_full.index(0), CONSUMERS * q_desc.block_type.nbytes)
                for c in gl.static_range(CONSUMERS):
                    tma_load(q_desc, [b, h, first + c * ROWS, 0], q_full.index(0), q_s.index(c))
            mbarrier.wait(v_empty.index(stage), free)
            copy_step(
                v_desc, b, h // group, start_a, start_b, v_full.index(stage), v_s.index(stage)
            )
            if i == gl.maximum(steps - 2, 0):
                following = gl.atomic_add(counter, 1) + gl.num_programs(0)
                next_count, next_masked, next_skips, first_a, first_b = survey(
                    following, counts, indices, policy, tiling, site, blocks_k, CAUSAL
                )
            start_a = next_a
            start_b = next_b
            step += 1
        turn += 1
        tile = following
        count = next_count
        masked = next_masked
        skips = next_skips
        start_a = first_a
        start_b = first_b
    announce(tile, 0, 0, 0, turn, tiles, tiles_full, tiles_empty)
