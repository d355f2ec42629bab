"""How does a GPU choose the blocks? Selection in three launches, without a score matrix.

Pool (`kernels.triton_pool`), score (`kernels.triton_scores`), pick (here): the threshold of the
top-p rule, or of a budget, is found by bisection, without a sort. The oracle is
`kernels.selection`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from afbs_compile.kernels import budget
from afbs_compile.kernels.data_mask import DataMask
from afbs_compile.kernels.geometry import Mask
from afbs_compile.kernels.launch import aligned, launch
from afbs_compile.kernels.triton_common import (
    BUDGET,
    COLUMNS,
    LENGTHS,
    MODE,
    NEIGHBOURS,
    SINK,
    SPARSE,
    TAU,
    WINDOW,
    WINDOWED,
    end_block,
    first_block,
    gate_of,
    on_device,
    site_window,
)
from afbs_compile.kernels.triton_mask import NEEDED as MORE
from afbs_compile.kernels.triton_mask import shown
from afbs_compile.kernels.triton_scores import block_scores

TWO_BITS = tl.constexpr(0x40000000)  # the float 2.0 as an integer: above every block score
SPARE = tl.constexpr(0.5)  # of what may be missing; see `kept_bounds`
UNIT = tl.constexpr(budget.UNIT)
NEEDED = tl.constexpr(MORE)
NEVER = tl.constexpr(256)  # above every state
CHUNK = 512  # block scores that the single warp of a pick program holds at once, at most


@triton.jit
def at_least(scores, held, start, end, middle, CHUNK: tl.constexpr):
    """Sum and number of the scores in `[start, end)` whose bits are at least `middle`."""
    above = held.to(tl.int32, bitcast=True) >= middle
    reached = tl.sum(tl.where(above, held, 0.0), 0)
    count = tl.sum(above.to(tl.int32), 0)
    for c in range(start + CHUNK, end, CHUNK):
        j = c + tl.arange(0, CHUNK)
        s = tl.load(scores + j, j < end, -1.0)
        above = s.to(tl.int32, bitcast=True) >= middle
        reached += tl.sum(tl.where(above, s, 0.0), 0)
        count += tl.sum(above.to(tl.int32), 0)
    return reached, count


@triton.jit
def kept_bounds(scores, start, end, total, best, target, room, limited, CHUNK: tl.constexpr):
    """`(low, high, n)`: keep the scores in `[start, end)` with bits >= high, and n in between.

    Without a limit the scores kept are the fewest that sum to `target`, else the `room` largest;
    of the equal ones between low and high the first n. Non-negative floats order like their bits,
    so 30 halvings do at most. Scores under the nth part of what may be missing cannot sum to it:
    the halvings begin there, well below for the rounding of sums, and above the best score.
    """
    spare = SPARE * (total - target) / tl.maximum(end - start, 1).to(tl.float32)
    low = tl.where(limited | (spare - spare != 0.0), 0.0, tl.maximum(spare, 0.0))
    low = low.to(tl.int32, bitcast=True)
    high = tl.where(best - best == 0.0, tl.maximum(best, 0.0), 1.0).to(tl.int32, bitcast=True) + 1
    count_low = end - start  # scores >= low
    count_high = 0
    j = start + tl.arange(0, CHUNK)
    held = tl.load(scores + j, j < end, -1.0)  # negative: below every bound
    while (high - low > 1) & (count_low > tl.where(limited, room, count_high + 1)):
        middle = (low + high) // 2
        reached, count = at_least(scores, held, start, end, middle, CHUNK)
        enough = tl.where(limited, count >= room, reached >= target)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        count_low = tl.where(enough, count, count_low)
        count_high = tl.where(enough, count_high, count)
    # no score is needed to reach 0; without a limit equal scores stay together
    high = tl.where(limited, high, tl.where(target > 0.0, low, TWO_BITS))
    return low, high, tl.where(limited, room - count_high, 0)


@triton.jit(do_not_specialize=[*LENGTHS, "stride_b", "stride_h"])
def pick_kernel(
    SCORES, Q_SIMILARITY, K_SIMILARITY, POLICY, COUNTS, INDICES, COUNTER, STATES, START,
    heads, group, length_q, length_k, blocks_q, blocks_k, offset, window, stride_b, stride_h,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    CAUSAL: tl.constexpr, GATE: tl.constexpr, DATA: tl.constexpr,
):  # fmt: skip
    """The list of one query block: `[lo, sink_end)` and `[near, hi)` forced, the rest by score."""
    row = tl.program_id(0).to(tl.int64)
    if row == 0:
        tl.store(COUNTER, 0)
    bh = row // blocks_q
    policy = POLICY + bh % heads * COLUMNS
    mode = tl.load(policy + MODE)
    tau = tl.load(policy + TAU)
    budget = tl.load(policy + BUDGET)
    theta = gate_of(policy)
    similarity = K_SIMILARITY + bh // group * blocks_k
    first = (row % blocks_q).to(tl.int32) * BLOCK_M
    last = tl.minimum(first + BLOCK_M, length_q) - 1
    lo = first_block(first + offset - window + 1, length_k, BLOCK_N)
    hi = blocks_k
    near = blocks_k
    if CAUSAL:
        hi = end_block(last + offset, length_k, BLOCK_N)
        neighbours = tl.load(policy + NEIGHBOURS).to(tl.int32)
        near = tl.maximum(first + offset - neighbours * BLOCK_N, 0) // BLOCK_N
    sink_end = tl.minimum(tl.cdiv(tl.load(policy + SINK).to(tl.int32), BLOCK_N), hi)
    at = bh // heads * stride_b + bh % heads * stride_h + row % blocks_q
    if DATA:
        moved = tl.minimum(sink_end + tl.load(START + at), hi)
        sink_end = tl.where(mode == WINDOWED, sink_end, moved)
    states = STATES + at * blocks_k
    own_low = first + offset - tl.load(policy + WINDOW).to(tl.int32) + 1
    near = tl.where(mode == WINDOWED, first_block(own_low, length_k, BLOCK_N), near)
    limited = budget > 0.0
    searching = (mode == SPARSE) & (tl.where(limited, budget, tau) < 1.0)
    if GATE:
        searching &= (tl.load(Q_SIMILARITY + row) < theta) == 0
    theta = tl.where(searching, theta, -float("inf"))
    near = tl.where(searching | (mode == WINDOWED), tl.maximum(near, lo), lo)

    # sum, best and number of gated blocks over the part that was scored
    start = tl.maximum(lo, sink_end)
    end = tl.where(limited, tl.minimum(near, hi), hi)
    end = tl.where(searching, tl.maximum(end, start), start)
    scores = SCORES + row * blocks_k
    total = 0.0
    best = -1.0
    best_j = -1
    forced = tl.maximum(sink_end - lo, 0) + tl.maximum(hi - near, 0)
    seen = hi - lo
    fixed = seen - (end - start)  # what a budget cannot leave out
    if DATA:
        forced = 0
        needed = 0
        seen = 0
        for c in range(lo, hi, CHUNK):
            j = c + tl.arange(0, CHUNK)
            state = tl.load(states + j, j < hi, 0)
            visible = state > 0
            seen += tl.sum(visible.to(tl.int32), 0)
            forced += tl.sum((visible & ((j < sink_end) | (j >= near))).to(tl.int32), 0)
            needed += tl.sum((state >= NEEDED).to(tl.int32), 0)
        fixed = forced
        forced += needed
    for c in range(start, end, CHUNK):
        j = c + tl.arange(0, CHUNK)
        s = tl.load(scores + j, j < end, 0.0)
        total += tl.sum(s, 0)
        best_j = tl.where(tl.max(s, 0) > best, c + tl.argmax(s, 0), best_j)
        best = tl.maximum(best, tl.max(s, 0))
        if GATE:
            gated = tl.load(similarity + j, j < end, 1.0) < theta
            if DATA:
                gated &= tl.load(states + j, j < end, 0) > 0
            forced += tl.sum(gated.to(tl.int32), 0)
    near = tl.where(total - total == 0.0, near, lo)  # scores not finite: stay dense
    units = tl.minimum((budget * UNIT + 0.5).to(tl.int32), UNIT)
    wanted = tl.maximum((units * seen + UNIT // 2) // UNIT, 1)
    room = tl.maximum(wanted - fixed, 0)
    low, high, among = kept_bounds(
        scores, start, end, total, best, tau * total, room, limited, CHUNK
    )  # fmt: skip

    kept = 0
    equal = 0
    for c in range(0, blocks_k, CHUNK):
        j = c + tl.arange(0, CHUNK)
        s = tl.load(scores + j, (j >= start) & (j < end), 0.0)
        keep = (j < sink_end) | (j >= near) | ((j == best_j) & (forced == 0))
        bits = s.to(tl.int32, bitcast=True)
        tied = ((bits >= low) & (bits < high) & (j >= start) & (j < end)).to(tl.int32)
        if DATA:  # what is hidden has score 0
            tied *= (tl.load(states + j, j < blocks_k, 0) > 0).to(tl.int32)
        keep |= (bits >= high) & (s > 0.0)
        keep |= (tied > 0) & (equal + tl.cumsum(tied, 0) <= among)
        equal += tl.sum(tied, 0)
        if GATE:
            keep |= tl.load(similarity + j, j < blocks_k, 1.0) < theta
        if DATA:
            state = tl.load(states + j, j < blocks_k, 0).to(tl.int32)
            keep |= state >= tl.where(mode == SPARSE, NEEDED, NEVER)
            keep &= state > 0
        keep = (keep & (j >= lo) & (j < hi)).to(tl.int32)
        before = kept + tl.cumsum(keep, 0) - keep
        # kept blocks fill the list from the front, the others from the back: all in [0, NK)
        slot = tl.where(keep > 0, before, blocks_k - 1 - (j - before))
        tl.store(INDICES + row * blocks_k + slot, j, mask=j < blocks_k)
        kept += tl.sum(keep, 0)
    tl.store(COUNTS + row, kept)


def chunk_of(blocks: int) -> int:
    """Block scores that a program holds at once: as few as hold all, where so few do."""
    return min(CHUNK, max(32, int(triton.next_power_of_2(blocks))))


def select(
    q: Tensor,
    k: Tensor,
    policy: Tensor,
    *,
    mask: Mask,
    scale: float,
    selector: str,
    block_m: int,
    block_n: int,
    data: DataMask | None = None,
) -> tuple[Tensor, Tensor]:
    """Block lists of one attention call; no host synchronisation, can be captured in a CUDA graph.

    Args:
        q: `[B, Hq, Lq, D]`, fp32, fp16 or bf16, any strides.
        k: `[B, Hkv, Lk, D]`; Hkv divides Hq.
        policy: float32 `[Hq, COLUMNS]` on the device of q.
        mask: The site's mask.
        scale: Multiplier on q·k.
        selector: `sub8`, `sub4` or `mean`.
        block_m: Query block, tokens; a power of two from 16 on.
        block_n: Key block, tokens; a power of two from 16 on.
        data: The part of the mask that comes with the call.

    Returns:
        `counts` int32 `[B, Hq, NQ]` and `indices` int32 `[B, Hq, NQ, NK]` (see `kernels.lists`).

    Raises:
        ValueError: For an unknown selector.
    """
    return select_counted(
        q, k, policy, mask=mask, scale=scale, selector=selector, block_m=block_m, block_n=block_n,
        data=data,
    )[:2]  # fmt: skip


def select_counted(
    q: Tensor,
    k: Tensor,
    policy: Tensor,
    *,
    mask: Mask,
    scale: float,
    selector: str,
    block_m: int,
    block_n: int,
    data: DataMask | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`select`, and an int32 of one element, 0, that a persistent kernel may count tiles with."""
    batch, heads, length_q, _ = q.shape
    length_k, policy = k.shape[2], policy.contiguous()
    blocks_q, blocks_k = -(-length_q // block_m), -(-length_k // block_n)
    n = batch * heads * blocks_q
    start = -(-n // 4) * 4  # each part starts at a multiple of 16 bytes
    work = torch.empty(start + 4 + n * blocks_k, dtype=torch.int32, device=q.device)
    counts = work[:n].view(batch, heads, blocks_q)
    counter = work[start : start + 1]
    indices = work[start + 4 :].view(batch, heads, blocks_q, blocks_k)
    key = (
        pick_kernel, q.device.index, q.shape, k.shape, mask, selector, block_m, block_n,
        aligned(policy), data is not None,
    )  # fmt: skip
    seen, strides = None, (0, 0)
    if data is not None:
        seen = shown(data, mask, q, length_q, length_k, block_m=block_m, block_n=block_n)
        strides = seen.strides
    with on_device(q):
        scores, q_similarity, k_similarity = block_scores(
            q, k, policy, mask=mask, scale=scale, selector=selector,
            block_m=block_m, block_n=block_n, shown=seen,
        )  # fmt: skip
        launch(
            pick_kernel, key, q.device, n,
            (scores, q_similarity, k_similarity, policy, counts, indices, counter,
             *((policy, policy) if seen is None else seen[:2]),
             heads, heads // k.shape[1], length_q, length_k, blocks_q, blocks_k,
             mask.offset, site_window(mask), *strides),
            BLOCK_M=block_m, BLOCK_N=block_n, CHUNK=chunk_of(blocks_k),
            CAUSAL=mask.causal, GATE=selector == "mean", DATA=seen is not None,
            num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
    return counts, indices, counter
