"""How much attention mass does a block hold, on a GPU? Block scores in Triton.

One pass over the pooled keys: every query sub-row's softmax runs online, and a block's mass is
kept, relative to the maximum so far, in a scratch that a program uses again for its next tile: it
stays in the L2 cache, and no sub-block score is ever stored. A second pass over the masses puts
them on one scale. The oracle is `kernels.scores`, which explains the selectors.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from afbs_compile.kernels.geometry import Mask
from afbs_compile.kernels.launch import aligned, launch
from afbs_compile.kernels.scores import SELECTORS, SUB_BLOCK
from afbs_compile.kernels.triton_common import (
    COLUMNS,
    LENGTHS,
    LOG2E,
    LOWEST,
    SINK,
    THETA,
    UNLIMITED,
    end_block,
    first_block,
    shared_memory_bytes,
    site_window,
)
from afbs_compile.kernels.triton_pool import needs_scores, pool

NO_WINDOW = tl.constexpr(UNLIMITED)


@triton.jit
def sub_block(c, N: tl.constexpr):
    """Which key sub-block stands in column `c` of a tile?

    A thread of a tensor-core result holds columns 8 i + 2 t and the next one, t of four in its
    row. Permuted so, all N sub-blocks of a block lie in one thread: no exchange to add them up.
    """
    if N > 1:
        wide: tl.constexpr = 4 * N
        c = c // wide * wide + c % 8 // 2 * N + c % wide // 8 * 2 + c % 2
    return c


@triton.jit
def fold_keys(e, ROWS: tl.constexpr, COLS: tl.constexpr, N: tl.constexpr):
    """Sums over the sub-blocks of every block: `[ROWS, COLS]` to `[ROWS, COLS / N]`."""
    if N > 1:
        parts = tl.reshape(e, [ROWS, COLS // (4 * N), N // 2, 4, 2])
        e = tl.reshape(tl.sum(tl.sum(parts, 4), 2), [ROWS, COLS // N])
    return e


@triton.jit
def fold_rows(w, ROWS: tl.constexpr, COLS: tl.constexpr, M: tl.constexpr):
    """Root mean squares over the sub-rows of every query block: `[ROWS / M, COLS]`."""
    if M > 1:
        w = tl.sqrt(tl.sum(tl.reshape(w * w, [ROWS // M, M, COLS]), 1) / M)
    return w


@triton.jit
def logits(
    q, low, high, k_head, similarity, theta, c, length_k, scale_log2,
    D_PADDED: tl.constexpr, SIZE: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Logits (base 2) of query sub-rows against key sub-blocks `c`; -inf where not seen.

    A sub-row sees the sub-block if it sees one of its keys: `first <= high and last >= low`.
    """
    d = tl.arange(0, D_PADDED)
    rows = k_head + c.to(tl.int64)[:, None] * D_PADDED + d[None, :]
    if not MASKED:
        k = tl.load(rows)
        return tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    first = c * SIZE
    last = tl.minimum(first + SIZE, length_k) - 1
    inside = first < length_k
    k = tl.load(rows, inside[:, None], 0.0)
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    if GATE:
        inside &= (tl.load(similarity + c, inside, 1.0) < theta) == 0
    else:  # a short sub-block, the last one, weighs as many tokens as it has
        short = (length_k - 1) % SIZE + 1
        x += tl.where(last + 1 == length_k, tl.log2(short.to(tl.float32) / SIZE), 0.0)[None, :]
    seen = (first[None, :] <= high[:, None]) & (last[None, :] >= low[:, None]) & inside[None, :]
    return tl.where(seen, x, -float("inf"))


@triton.jit(do_not_specialize=[*LENGTHS, "tiles", "width"])
def score_kernel(
    Q_MEANS, K_MEANS, K_SIMILARITY, POLICY, MASSES, TOPS, SCORES, scale_log2,
    heads, group, length_q, length_k, blocks_q, blocks_k, offset, window, tiles, width,
    D_PADDED: tl.constexpr, SIZE_M: tl.constexpr, SIZE_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    CAUSAL: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Block scores of `ROWS` query sub-rows of one head after another."""
    M: tl.constexpr = BLOCK_M // SIZE_M
    N: tl.constexpr = BLOCK_N // SIZE_N
    rows = tl.cdiv(length_q, SIZE_M)
    row_tiles = tl.cdiv(rows, ROWS)
    subs = tl.cdiv(length_k, SIZE_N)
    local = tl.arange(0, ROWS)
    d = tl.arange(0, D_PADDED)
    masses = MASSES + (tl.program_id(0).to(tl.int64) * ROWS + local)[:, None] * width
    tops = TOPS + (tl.program_id(0).to(tl.int64) * ROWS + local) * (width // (COLS // N))
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        bh = (tile // row_tiles).to(tl.int64)
        h = bh % heads
        first_row = (row_tiles - 1 - tile % row_tiles) * ROWS  # the longest causal rows first
        r = first_row + local
        first = r * SIZE_M
        last = tl.minimum(first + SIZE_M, length_q) - 1
        low = first + offset - window + 1
        high = tl.zeros([ROWS], tl.int32) + length_k
        end_key = length_k
        first_high = length_k
        if CAUSAL:
            high = last + offset
            end_key = tl.minimum((first_row + ROWS) * SIZE_M, length_q) - 1 + offset
            first_high = tl.minimum(first_row * SIZE_M + SIZE_M, length_q) - 1 + offset
        high = tl.where(r < rows, high, -1)

        # the key blocks that some row sees, without the sink's; those that all rows see whole
        begin = first_block(first_row * SIZE_M + offset - window + 1, length_k, BLOCK_N)
        sink = tl.load(POLICY + h * COLUMNS + SINK).to(tl.int32)
        begin = tl.maximum(begin, tl.cdiv(sink, BLOCK_N)) * N
        end = end_block(end_key, length_k, BLOCK_N) * N
        end = tl.where(needs_scores(POLICY, h, 1, 1) > 0, end, 0)
        whole = tl.minimum(tl.maximum(first_high + 1, 0) // SIZE_N, length_k // SIZE_N)
        whole = tl.where(window < NO_WINDOW, 0, tl.minimum(whole, end))
        whole = begin + tl.maximum(whole - begin, 0) // COLS * COLS
        if GATE:
            whole = begin

        theta = tl.load(POLICY + h * COLUMNS + THETA)
        q_rows = Q_MEANS + (bh * rows + r)[:, None] * D_PADDED
        q = tl.load(q_rows + d[None, :], mask=(r < rows)[:, None], other=0.0)
        k_head = K_MEANS + bh // group * subs * D_PADDED
        similarity = K_SIMILARITY + bh // group * subs
        top = tl.full([ROWS], LOWEST, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        j = tl.arange(0, COLS // N)
        column = sub_block(tl.arange(0, COLS), N)
        for c in range(begin, whole, COLS):
            x = logits(q, low, high, k_head, similarity, theta, c + column, length_k, scale_log2,
                       D_PADDED, SIZE_N, GATE, PRECISION, False)  # fmt: skip
            top_new = tl.maximum(top, tl.max(x, 1))
            mass = fold_keys(tl.exp2(x - top_new[:, None]), ROWS, COLS, N)
            total = total * tl.exp2(top - top_new) + tl.sum(mass, 1)
            top = top_new
            at = (c - begin) // N
            tl.store(masses + (at + j)[None, :], mass.to(MASSES.dtype.element_ty))
            tl.store(tops + (c - begin) // COLS, top)
        for c in range(whole, end, COLS):
            x = logits(q, low, high, k_head, similarity, theta, c + column, length_k, scale_log2,
                       D_PADDED, SIZE_N, GATE, PRECISION, True)  # fmt: skip
            top_new = tl.maximum(top, tl.max(x, 1))
            mass = fold_keys(tl.exp2(x - top_new[:, None]), ROWS, COLS, N)
            total = total * tl.exp2(top - top_new) + tl.sum(mass, 1)
            top = top_new
            at = (c - begin) // N
            tl.store(masses + (at + j)[None, :], mass.to(MASSES.dtype.element_ty))
            tl.store(tops + (c - begin) // COLS, top)

        tl.debug_barrier()  # what other threads of the program have stored is read now
        inverse = tl.where(r < rows, 1.0 / tl.where(total == 0.0, 1.0, total), 0.0)
        i = first_row // M + tl.arange(0, ROWS // M)
        out = SCORES + (bh * blocks_q + i)[:, None] * blocks_k + begin // N
        n_blocks = tl.maximum(end - begin, 0) // N
        for a in range(0, n_blocks, 2 * (COLS // N)):  # both loads are under way at once
            b = a + j
            w = tl.load(masses + b[None, :], (b < n_blocks)[None, :], 0.0)
            then = tl.load(tops + a // (COLS // N))
            b_next = b + COLS // N
            w_next = tl.load(masses + b_next[None, :], (b_next < n_blocks)[None, :], 0.0)
            then_next = tl.load(tops + a // (COLS // N) + 1, a + COLS // N < n_blocks, LOWEST)
            w = fold_rows(w * (tl.exp2(then - top) * inverse)[:, None], ROWS, COLS // N, M)
            tl.store(out + b[None, :], w, mask=(i < blocks_q)[:, None] & (b < n_blocks)[None, :])
            w = fold_rows(w_next * (tl.exp2(then_next - top) * inverse)[:, None], ROWS,
                          COLS // N, M)  # fmt: skip
            stored = (i < blocks_q)[:, None] & (b_next < n_blocks)[None, :]
            tl.store(out + b_next[None, :], w, mask=stored)
        tl.debug_barrier()  # the next tile writes where this one has read


def pooled_sizes(selector: str, block_m: int, block_n: int) -> tuple[int, int]:
    """Tokens of a query and of a key sub-block under `selector`.

    Raises:
        ValueError: For an unknown selector.
    """
    if selector not in SELECTORS:
        raise ValueError(f"unknown selector {selector!r}: use one of {', '.join(SELECTORS)}")
    size = SUB_BLOCK.get(selector)
    return (size, size) if size else (block_m, block_n)


def tiling(
    head_dim: int, itemsize: int, fold_m: int, fold_n: int, shared_bytes: int
) -> tuple[int, int, int, int, int | None]:
    """Query sub-rows and key sub-blocks of a tile, warps, pipeline stages, registers of a thread.

    fp32 runs on the FMA units, whose operands stay in registers: it takes smaller tiles.

    Args:
        head_dim: Head dimension, padded to a power of two.
        itemsize: Bytes of one element of the means.
        fold_m: Sub-rows of a query block: a tile holds whole blocks.
        fold_n: Sub-blocks of a key block: a tile holds four blocks at least.
        shared_bytes: Shared memory that one program may use, for q and two stages of k.
    """
    exact = itemsize == 4
    rows = max(32 if exact else 128 if fold_m > 1 else 64, fold_m)
    cols = max(32 if exact else 64 if fold_n == 1 else 128, 4 * fold_n)
    while cols > max(16, 4 * fold_n) and (rows + 2 * cols) * head_dim * itemsize > shared_bytes:
        cols //= 2
    if exact or rows < 128:
        return rows, cols, 8 if exact else 4, 2, None
    return rows, cols, 8, 2, 128  # two programs a multiprocessor


@functools.cache
def most_programs(device: torch.device) -> int:
    """Programs of the persistent kernel: two a multiprocessor."""
    if device.type != "cuda":
        return 3
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def block_scores(
    q: Tensor,
    k: Tensor,
    policy: Tensor,
    *,
    mask: Mask,
    scale: float,
    selector: str,
    block_m: int,
    block_n: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of the key blocks of every query block, on the current device.

    Args:
        q: `[B, Hq, Lq, D]`, fp32, fp16 or bf16, any strides.
        k: `[B, Hkv, Lk, D]`; Hkv divides Hq.
        policy: float32 `[Hq, COLUMNS]`, contiguous.
        mask: The site's mask.
        scale: Multiplier on q·k.
        selector: `sub8`, `sub4` or `mean`.
        block_m: Query block, tokens.
        block_n: Key block, tokens.

    Returns:
        `scores` fp32 `[B, Hq, NQ, NK]`, not normalised, undefined where a head needs none and
        where the query block sees nothing or only the sink; for `mean` the self-similarities fp32
        `[B, Hq, NQ]` and `[B, Hkv, NK]`, undefined otherwise.

    Raises:
        ValueError: For an unknown selector.
    """
    size_m, size_n = pooled_sizes(selector, block_m, block_n)
    gate = selector == "mean"
    batch, heads, length_q, _ = q.shape
    length_k, group = k.shape[2], heads // k.shape[1]
    blocks_q, blocks_k = -(-length_q // block_m), -(-length_k // block_n)
    pooled = pool(q, k, policy, size_q=size_m, size_k=size_n, cosine=gate)
    padded, itemsize = pooled.q.shape[-1], pooled.q.element_size()
    rows, cols, warps, stages, registers = tiling(
        padded, itemsize, block_m // size_m, block_n // size_n, shared_memory_bytes(q.device)
    )
    tiles = batch * heads * -(-pooled.q.shape[2] // rows)
    programs = min(tiles, most_programs(q.device))
    step = cols // (block_n // size_n)  # key blocks of a tile
    width = (blocks_k // step + 2) * step
    scores = torch.empty(batch, heads, blocks_q, blocks_k, dtype=torch.float32, device=q.device)
    exact = q.dtype == torch.float32
    masses, tops = scratch(programs * rows, width, step, exact, q.device)
    key = (
        score_kernel, q.device.index, q.dtype, q.shape, k.shape, mask, scale, selector, block_m,
        block_n, aligned(policy),
    )  # fmt: skip
    launch(
        score_kernel, key, q.device, programs,
        (pooled.q, pooled.k, pooled.k_similarity, policy, masses, tops, scores, scale * LOG2E,
         heads, group, length_q, length_k, blocks_q, blocks_k, mask.offset, site_window(mask),
         tiles, width),
        D_PADDED=padded, SIZE_M=size_m, SIZE_N=size_n, BLOCK_M=block_m, BLOCK_N=block_n,
        ROWS=rows, COLS=cols, CAUSAL=mask.causal, GATE=gate,
        PRECISION="ieee" if exact else "tf32",
        num_warps=warps, num_stages=stages, maxnreg=registers, enable_fp_fusion=True,
    )  # fmt: skip
    return scores, pooled.q_similarity, pooled.k_similarity


def scratch(
    rows: int, width: int, step: int, exact: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Block masses and, for every `step` of them, the maximum that they are relative to.

    A mass is at most 16, so fp16 will do for inputs that are not fp32 themselves.
    """
    dtype = torch.float32 if exact else torch.float16
    return (
        torch.empty(rows, width, dtype=dtype, device=device),
        torch.empty(rows, width // step, dtype=torch.float32, device=device),
    )
