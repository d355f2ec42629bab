"""Which scores and values may a query of the Gluon kernel not see?

The token mask of `kernels.geometry`, applied only in the steps that need it. A step is 128 keys:
two listed boxes of 64, which may lie anywhere. The branches are uniform in a warpgroup.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from afbs_compile.kernels.triton_common import COLUMNS, MODE, SINK, UNLIMITED, WINDOW, WINDOWED

thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # renamed in Triton 3.7
NO_WINDOW = gl.constexpr(UNLIMITED)
ROWS = gl.constexpr(64)  # queries of one consumer
TILE = gl.constexpr(128)  # queries of a tile
BOX = gl.constexpr(64)  # keys of a list entry
STEP = gl.constexpr(128)  # keys of a step


@gluon.jit
def own_window(policy, h):
    """Reach and sink of a head's own window, in keys; a head without one reaches everything."""
    windowed = gl.load(policy + h * COLUMNS + MODE) == WINDOWED
    reach = gl.load(policy + h * COLUMNS + WINDOW).to(gl.int32)
    sink = gl.load(policy + h * COLUMNS + SINK).to(gl.int32)
    return gl.where(windowed, reach, NO_WINDOW), sink


@gluon.jit
def masked_steps(listed, steps, first, head, site, CAUSAL: gl.constexpr):
    """How many of the steps, from the end of the list, some query of the tile sees in part.

    The first step always counts: it may hold half a step, or an empty list.
    """
    reach, _ = head
    _, length_k, offset, window = site
    first_high = length_k - 1
    if CAUSAL:
        first_high = gl.minimum(first_high, first + offset)
    masked = gl.where((reach < NO_WINDOW) | (window < NO_WINDOW), steps, 1)
    last = gl.load(listed + 2 * (steps - masked) - 1, mask=masked < steps, other=0)
    while (masked < steps) & (last * BOX + BOX - 1 > first_high):
        masked += 1
        last = gl.load(listed + 2 * (steps - masked) - 1, mask=masked < steps, other=0)
    return masked


@gluon.jit
def hide(s, start_a, start_b, first, head, site, CAUSAL: gl.constexpr):
    """Scores `s` of the queries from `first` on, −inf where a query may not see the key.

    Query i sees low <= n <= high, and of these in a windowed head only near <= n or n < sink.
    Positions are taken from the start of the key's own box: only the limits differ by box.
    """
    reach, sink = head
    _, length_k, offset, window = site
    n = gl.arange(0, STEP, layout=gl.SliceLayout(0, s.type.layout))[None, :]
    i = first + offset + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s.type.layout))[:, None]
    first_high = length_k - 1
    if CAUSAL:
        first_high = gl.minimum(first_high, first + offset)
    if gl.maximum(start_a, start_b) + BOX - 1 > first_high:
        high = i * 0 + length_k - 1
        if CAUSAL:
            high = gl.minimum(high, i)
        s = gl.where(
            n <= gl.where(n < BOX, high - start_a, high - start_b + BOX), s, -float("inf")
        )
    start = gl.minimum(start_a, start_b)
    last = first + offset + ROWS - 1
    if start <= last - window:
        low = i - window + 1
        s = gl.where(n >= gl.where(n < BOX, low - start_a, low - start_b + BOX), s, -float("inf"))
    if start <= last - reach:
        # hidden are sink <= n < near: one comparison, if what lies below the sink wraps around
        after_sink = n + gl.where(n < BOX, start_a - sink, start_b - BOX - sink)
        gap = gl.maximum(i - reach + 1 - sink, 0)
        hidden = after_sink.to(gl.uint32) < gap.to(gl.uint32)
        s = gl.where(hidden, -float("inf"), s)
    return s


@gluon.jit
def has_unseen(start, first, head, site, CAUSAL: gl.constexpr):
    """Does the box at `start` hold a key that no query of the tile from `first` on sees?"""
    reach, sink = head
    length_q, length_k, offset, window = site
    found = start < first + offset - window + 1
    found |= gl.maximum(start, sink) < gl.minimum(start + BOX, first + offset - reach + 1)
    if CAUSAL:
        end = gl.minimum(first + TILE, length_q) + offset
        found |= gl.maximum(start, end) < gl.minimum(start + BOX, length_k)
    return found


@gluon.jit
def hide_values(
    v, full, phase, start_a, start_b, first, head, site, D: gl.constexpr, CAUSAL: gl.constexpr
):
    """Zero the values of a stage that no query of the tile sees: 0 times their NaN is NaN.

    Both consumers write the same bytes, so neither waits for the other.
    """
    reach, sink = head
    length_q, _, offset, window = site
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    ROWS_AT_ONCE: gl.constexpr = 1024 // D  # one row a thread: few registers
    if has_unseen(start_a, first, head, site, CAUSAL) | has_unseen(
        start_b, first, head, site, CAUSAL
    ):
        mbarrier.wait(full, phase)
        for c in gl.static_range(STEP // ROWS_AT_ONCE):
            part = v.slice(c * ROWS_AT_ONCE, ROWS_AT_ONCE)
            start = start_a if c * ROWS_AT_ONCE < BOX else start_b - BOX
            n = (
                start
                + c * ROWS_AT_ONCE
                + gl.arange(0, ROWS_AT_ONCE, layout=gl.SliceLayout(1, layout))
            )
            blind = (n < first + offset - reach + 1) & (n >= sink)
            blind |= n < first + offset - window + 1
            if CAUSAL:
                blind |= n >= gl.minimum(first + TILE, length_q) + offset
            x = part.load(layout)
            part.store(gl.where(blind[:, None], gl.zeros_like(x), x))
        fence_async_shared()
        thread_barrier()
