"""Who feeds the consumers of the Gluon dq kernel? One warp, as `kernels.gluon_producer`.

It draws tiles and copies Q and dO of each, then K and V of the listed boxes: first those that need
the token mask, at both ends of the list.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from afbs_compile.kernels.gluon_mask import BOX, NO_WINDOW, ROWS, TILE, masked_steps, own_window
from afbs_compile.kernels.gluon_producer import CONSUMERS, boxes_of, copy_step, tma_load
from afbs_compile.kernels.gluon_ring import announce, phase_of, place, put


@gluon.jit
def left_steps(listed, count, steps, last, head, site):
    """How many steps at the start of a list hold a key that a window hides from query `last`."""
    reach, _ = head
    _, _, offset, window = site
    edge = last + offset - gl.minimum(window, reach) + 1
    left = 0
    low = gl.load(listed, mask=count > 0, other=0) * BOX
    while (left < steps) & (low < edge):
        left += 1
        low = gl.load(listed + 2 * left, mask=2 * left < count, other=0) * BOX
    return left


@gluon.jit
def turn_of(i, right, left, steps):
    """Place, from the end of the list, of a tile's step `i`: first those that need the mask."""
    return gl.where(i < right, i, gl.where(i < right + left, steps - 1 - (i - right), i - left))


@gluon.jit
def survey(tile, counts, indices, policy, tiling, site, blocks_k, CAUSAL: gl.constexpr):
    """A tile's boxes, its steps that need the mask at the end and the start of the list."""
    total_tiles, heads, blocks_q = tiling
    length_q, length_k, offset, _ = site
    b, h, first = place(gl.minimum(tile, total_tiles - 1), heads, blocks_q)
    row = (b * heads + h) * blocks_q + first // TILE
    count = gl.load(counts + row)
    listed = indices + row.to(gl.int64) * blocks_k
    start_a, start_b = boxes_of(listed, count, 0, blocks_k)
    steps = gl.maximum((count + 1) // 2, 1)
    head = own_window(policy, h)
    # a window hides keys at the start of the list only
    unbounded = (length_q, length_k, offset, NO_WINDOW)
    right = masked_steps(listed, steps, first, (NO_WINDOW, 0), unbounded, CAUSAL)
    left = left_steps(listed, count, steps - right, first + TILE - 1, head, site)
    return count, right, left, start_a, start_b


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
    """The producer warp: tiles, then the listed boxes of each."""
    starts, tiles = rings
    (q_full, q_empty, do_full, do_empty, k_full, k_empty, v_full, v_empty, tiles_full,
     tiles_empty) = barriers  # fmt: skip
    total_tiles, heads, blocks_q = tiling
    step = 0
    turn = 0
    tile = gl.program_id(0)
    following = tile
    count, right, left, start_a, start_b = survey(
        tile, counts, indices, policy, tiling, site, blocks_k, CAUSAL
    )
    while tile < total_tiles:
        b, h, first = place(tile, heads, blocks_q)
        listed = indices + ((b * heads + h) * blocks_q + first // TILE).to(gl.int64) * blocks_k
        steps = gl.maximum((count + 1) // 2, 1)
        announce(tile, steps, right + left, 0, turn, tiles, tiles_full, tiles_empty)
        next_count = count
        next_right = right
        next_left = left
        first_a = start_a
        first_b = start_b
        for i in range(steps):
            next_a, next_b = boxes_of(listed, count, turn_of(i + 1, right, left, steps), blocks_k)
            stage = step & (STAGES - 1)
            free = phase_of(step, STAGES) ^ 1
            mbarrier.wait(k_empty.index(stage), free)
            if i < right + left:
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
                next_count, next_right, next_left, first_a, first_b = survey(
                    following, counts, indices, policy, tiling, site, blocks_k, CAUSAL
                )
            start_a = next_a
            start_b = next_b
            step += 1
        turn += 1
        tile = following
        count = next_count
        right = next_right
        left = next_left
        start_a = first_a
        start_b = first_b
    announce(tile, 0, 0, 0, turn, tiles, tiles_full, tiles_empty)
