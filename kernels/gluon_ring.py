"""How does the Gluon kernel's producer hand tiles to its consumers? Barriers and small rings.

A slot is written between its `empty` and its `full` barrier, and read the other way round.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from afbs_compile.kernels.gluon_mask import TILE


@gluon.jit
def barriers_for(count: gl.constexpr, arrivals: gl.constexpr):
    """`count` barriers, each complete after `arrivals` arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(count):
        mbarrier.init(made.index(i), count=arrivals)
    return made


@gluon.jit
def put(slot, value):
    """The producer warp writes one integer into shared memory."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    slot.store(gl.full([1], value, gl.int32, one))


@gluon.jit
def get(slot):
    """A consumer reads one integer from shared memory."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(slot.load(one), axis=0)


@gluon.jit
def phase_of(step, STAGES: gl.constexpr):
    """Parity of the round through a ring of `STAGES` slots, a power of two."""
    return ((step & STAGES) != 0).to(gl.int32)


@gluon.jit
def place(tile, heads, blocks_q):
    """Batch, head and first query of a tile. Head-major; the longest causal rows start first."""
    head = tile // blocks_q
    return head // heads, head % heads, (blocks_q - 1 - tile % blocks_q) * TILE


@gluon.jit
def announce(tile, steps, masked, skips, turn, tiles, tiles_full, tiles_empty):
    """Tell the consumers the next tile, its steps, those that need the mask, if others may skip.

    A tile has fewer than 2^15 steps: 4 M keys.
    """
    slot = turn % 2
    mbarrier.wait(tiles_empty.index(slot), ((turn // 2) & 1) ^ 1)
    put(tiles.index(2 * slot), tile)
    put(tiles.index(2 * slot + 1), steps | (masked << 15) | (skips << 30))
    mbarrier.arrive(tiles_full.index(slot), count=1)


@gluon.jit
def next_tile(turn, tiles, tiles_full, tiles_empty):
    """Tile, steps, masked steps, and the step from which on steps may be skipped."""
    slot = turn % 2
    mbarrier.wait(tiles_full.index(slot), (turn // 2) & 1)
    tile = get(tiles.index(2 * slot))
    packed = get(tiles.index(2 * slot + 1))
    mbarrier.arrive(tiles_empty.index(slot), count=1)
    steps = packed & 0x7FFF
    masked = (packed >> 15) & 0x7FFF
    return tile, steps, masked, gl.where(packed >> 30 != 0, masked, steps)
