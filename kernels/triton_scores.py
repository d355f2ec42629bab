"""How much attention mass does a block hold, on a GPU? Block scores in Triton.

The score kernel goes twice over the pooled keys, once for the softmax statistics of every query
sub-row and once for the mass of every block: recomputing is cheaper than storing the sub-block
scores. The oracle is `kernels.scores`, which explains the selectors.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from afbs_compile.kernels.geometry import Mask
from afbs_compile.kernels.scores import SELECTORS, SUB_BLOCK
from afbs_compile.kernels.triton_common import (
    COLUMNS,
    LENGTHS,
    LOG2E,
    LOWEST,
    MODE,
    SINK,
    SPARSE,
    TAU,
    THETA,
    end_block,
    first_block,
    shared_memory_bytes,
    site_window,
)
from afbs_compile.kernels.triton_pool import pool


@triton.jit
def pooled_logits(
    q, low, high, k_head, similarity, theta, c, length_k, scale_log2,
    D_PADDED: tl.constexpr, SIZE: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits (base 2) of query sub-rows against key sub-blocks `c`; -inf where not seen.

    A sub-row sees the sub-block if it sees one of its keys: `first <= high and last >= low`.
    """
    first = c * SIZE
    last = tl.minimum(first + SIZE, length_k) - 1
    inside = first < length_k
    d = tl.arange(0, D_PADDED)
    k = tl.load(k_head + c.to(tl.int64)[:, None] * D_PADDED + d[None, :], inside[:, None], 0.0)
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    if GATE:
        inside &= (tl.load(similarity + c, inside, 1.0) < theta) == 0
    else:  # a short sub-block weighs as many tokens as it has
        tokens = tl.maximum(last - first + 1, 1).to(tl.float32)
        x += tl.log2(tokens / SIZE)[None, :]
    seen = (first[None, :] <= high[:, None]) & (last[None, :] >= low[:, None]) & inside[None, :]
    return tl.where(seen, x, -float("inf"))


@triton.jit
def fold_blocks(mass, ROWS: tl.constexpr, COLS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Block scores `[ROWS / M, COLS / N]`: sum over keys, root mean square over query sub-rows."""
    if N > 1:
        mass = tl.sum(tl.reshape(mass, [ROWS, COLS // N, N]), 2)
    if M > 1:
        mass = tl.sqrt(tl.sum(tl.reshape(mass * mass, [ROWS // M, M, COLS // N]), 1) / M)
    return mass


@triton.jit(do_not_specialize=LENGTHS)
def score_kernel(
    Q_MEANS, K_MEANS, K_SIMILARITY, POLICY, SCORES, scale_log2,
    heads, group, length_q, length_k, blocks_q, blocks_k, offset, window,
    D_PADDED: tl.constexpr, SIZE_M: tl.constexpr, SIZE_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    CAUSAL: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Block scores of `ROWS` query sub-rows of one head; nothing for a head that needs none."""
    M: tl.constexpr = BLOCK_M // SIZE_M
    N: tl.constexpr = BLOCK_N // SIZE_N
    rows = tl.cdiv(length_q, SIZE_M)
    tiles = tl.cdiv(rows, ROWS)
    pid = tl.program_id(0)
    bh = (pid // tiles).to(tl.int64)
    h = bh % heads
    tile = tiles - 1 - pid % tiles  # the longest rows of a causal head start first

    r = tile * ROWS + tl.arange(0, ROWS)
    first = r * SIZE_M
    last = tl.minimum(first + SIZE_M, length_q) - 1
    low = first + offset - window + 1
    high = tl.zeros([ROWS], tl.int32) + length_k
    end_key = length_k
    if CAUSAL:
        high = last + offset
        end_key = tl.minimum((tile + 1) * ROWS * SIZE_M, length_q) - 1 + offset
    high = tl.where(r < rows, high, -1)

    # the key blocks that some row sees, without the sink's
    start = first_block(tile * ROWS * SIZE_M + offset - window + 1, length_k, BLOCK_N)
    start = tl.maximum(start, tl.cdiv(tl.load(POLICY + h * COLUMNS + SINK).to(tl.int32), BLOCK_N))
    tau = tl.load(POLICY + h * COLUMNS + TAU)
    sparse = (tl.load(POLICY + h * COLUMNS + MODE) == SPARSE) & (tau < 1.0)
    end = tl.where(sparse, end_block(end_key, length_k, BLOCK_N) * N, 0)

    theta = tl.load(POLICY + h * COLUMNS + THETA)
    d = tl.arange(0, D_PADDED)
    q_rows = Q_MEANS + (bh * rows + r)[:, None] * D_PADDED
    q = tl.load(q_rows + d[None, :], mask=(r < rows)[:, None], other=0.0)
    subs = tl.cdiv(length_k, SIZE_N)
    k_head = K_MEANS + (bh // group * subs) * D_PADDED
    similarity = K_SIMILARITY + bh // group * subs
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for c in range(start * N, end, COLS):
        x = pooled_logits(q, low, high, k_head, similarity, theta, c + tl.arange(0, COLS),
                          length_k, scale_log2, D_PADDED, SIZE_N, GATE, PRECISION)  # fmt: skip
        top_new = tl.maximum(top, tl.max(x, 1))
        total = total * tl.exp2(top - top_new) + tl.sum(tl.exp2(x - top_new[:, None]), 1)
        top = top_new

    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    i = tile * (ROWS // M) + tl.arange(0, ROWS // M)
    out = SCORES + (bh * blocks_q + i)[:, None] * blocks_k
    for c in range(start * N, end, COLS):
        x = pooled_logits(q, low, high, k_head, similarity, theta, c + tl.arange(0, COLS),
                          length_k, scale_log2, D_PADDED, SIZE_N, GATE, PRECISION)  # fmt: skip
        mass = tl.exp2(x - top[:, None]) * inverse[:, None]
        j = c // N + tl.arange(0, COLS // N)
        stored = (i < blocks_q)[:, None] & (j < blocks_k)[None, :]
        tl.store(out + j[None, :], fold_blocks(mass, ROWS, COLS, M, N), mask=stored)


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
    head_dim: int, dtype: torch.dtype, fold_m: int, fold_n: int, shared_bytes: int
) -> tuple[int, int, int]:
    """Query sub-rows and key sub-blocks of a tile, and warps.

    fp32 runs on the FMA units, whose operands stay in registers: it takes smaller tiles.

    Args:
        head_dim: Head dimension, padded to a power of two.
        dtype: Of q and k; the pooled means are fp32.
        fold_m: Sub-rows of a query block: a tile holds whole blocks.
        fold_n: Sub-blocks of a key block.
        shared_bytes: Shared memory that one program may use, for q, two stages of k and scores.
    """
    exact = dtype == torch.float32
    rows = max(64 if head_dim <= 128 else 32, fold_m)
    cols = max(min(32, 4096 // head_dim) if exact else 64, fold_n)
    room = shared_bytes // 4 - rows * head_dim
    while cols > max(16, fold_n) and cols * (rows + 2 * head_dim) > room:
        cols //= 2
    return rows, cols, 8 if exact else 4


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
    blocks_q, blocks_k = triton.cdiv(length_q, block_m), triton.cdiv(length_k, block_n)
    k_means, k_similarity = pool(k, size_n, cosine=gate)
    q_means, q_similarity = pool(q, size_m, cosine=gate)
    scores = torch.empty(batch, heads, blocks_q, blocks_k, dtype=torch.float32, device=q.device)
    padded = q_means.shape[-1]
    rows, cols, warps = tiling(
        padded, q.dtype, block_m // size_m, block_n // size_n, shared_memory_bytes(q.device)
    )
    tiles = triton.cdiv(triton.cdiv(length_q, size_m), rows)
    score_kernel[(batch * heads * tiles,)](
        q_means, k_means, k_similarity, policy, scores, scale * LOG2E,
        heads, group, length_q, length_k, blocks_q, blocks_k, mask.offset, site_window(mask),
        D_PADDED=padded, SIZE_M=size_m, SIZE_N=size_n, BLOCK_M=block_m,
        BLOCK_N=block_n, ROWS=rows, COLS=cols, CAUSAL=mask.causal, GATE=gate,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=warps, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip
    return scores, q_similarity, k_similarity
