"""What does a data mask leave of every block, on a GPU? States of blocks, weights of keys.

One program looks at all pairs of one block; the oracle is `kernels.data_mask.blocked`. The other
kernels read the states: selection leaves hidden blocks out, attention looks at the mask again in
those that are visible in part. Nothing of `[Lq, Lk]` is made.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from afbs_compile.kernels import bias as biases
from afbs_compile.kernels.data_mask import DataMask
from afbs_compile.kernels.geometry import Mask
from afbs_compile.kernels.triton_common import LENGTHS, LN2, LOWEST, on_device, site_window
from afbs_compile.kernels.triton_seen import (
    BIAS_STRIDES,
    HIDDEN,
    LOG2_E,
    MASK_STRIDES,
    above_hidden,
    bias_tile,
    data_seen,
)

PRESENT = ("HAS_KEYS", "HAS_SEGMENTS", "HAS_ELEMENTS")
FLOOR = tl.constexpr(biases.FLOOR)
ROWS, COLUMNS = 32, 128  # of a tile of a bias whose rows are looked at
NEEDED = 4  # added to the state of a block that must not be dropped


class Parts(NamedTuple):
    """A data mask as kernels take it: tensors, strides, and which parts there are.

    Attributes:
        tensors: Keys, segments of queries and of keys, elements; any tensor for a missing one.
        strides: Of the batch for the first three, of batch, head, query and key for elements.
        present: Have keys, have segments, have elements.
        bias: What is added to the scores; any tensor for nothing.
        bias_strides: Of batch, head, query and key.
        biased: Is anything?
    """

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    strides: tuple[int, ...]
    present: tuple[bool, bool, bool]
    bias: Tensor
    bias_strides: tuple[int, ...]
    biased: bool

    @staticmethod
    def of(data: DataMask | None, like: Tensor) -> "Parts":
        """The parts of a mask; of None, none."""
        data = data or DataMask()
        rows = [
            None if x is None else x.contiguous()
            for x in (data.keys, data.q_segments, data.k_segments)
        ]
        elements = data.elements
        tensors = [*(None if x is None else bytes_of(x) for x in rows), None]
        if elements is not None:
            tensors[3] = bytes_of(elements)
        strides = [0 if x is None or x.shape[0] == 1 else x.stride(0) for x in rows]
        strides += steps(elements)
        present = data.keys is not None, data.k_segments is not None, elements is not None
        k, qs, ks, el = (like if x is None else x for x in tensors)
        bias = like if data.bias is None else data.bias
        added = bias, tuple(steps(data.bias)), data.bias is not None
        return Parts((k, qs, ks, el), tuple(strides), present, *added)

    @property
    def any(self) -> bool:
        """Is there any part?"""
        return any(self.present) or self.biased


def steps(x: Tensor | None) -> list[int]:
    """Strides of four axes, 0 where there is one entry for all; zeros for None."""
    if x is None:
        return [0] * 4
    return [0 if n == 1 else step for n, step in zip(x.shape, x.stride(), strict=True)]


def bytes_of(x: Tensor) -> Tensor:
    """A bool tensor as uint8, of which Triton loads are integers; others as int64."""
    return x.view(torch.uint8) if x.dtype == torch.bool else x.long()


@triton.jit(do_not_specialize=[*LENGTHS[2:4], *LENGTHS[6:], *MASK_STRIDES, *BIAS_STRIDES,
                               "heads_of_mask"])  # fmt: skip
def first_kernel(
    KEYS, Q_SEGMENTS, K_SEGMENTS, ELEMENTS, BIAS, FIRST, LIVE, stride_keys, stride_qs, stride_ks,
    stride_eb, stride_eh, stride_eq, stride_ek, stride_bb, stride_bh, stride_bq, stride_bk,
    heads_of_mask, length_q, length_k, offset, window,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_KEYS: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_ELEMENTS: tl.constexpr,
):  # fmt: skip
    """The first key that counts for each of some rows, −1 for none, and is it above `HIDDEN`?"""
    tiles = tl.cdiv(length_q, BLOCK_M)
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b = bh // heads_of_mask
    h = bh % heads_of_mask
    i = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    first_live = tl.zeros([BLOCK_M], tl.int32) + length_k
    first_seen = tl.zeros([BLOCK_M], tl.int32) + length_k
    for start in range(0, length_k, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        seen = data_seen(
            KEYS, Q_SEGMENTS, K_SEGMENTS, ELEMENTS, stride_keys, stride_qs, stride_ks,
            stride_eb, stride_eh, stride_eq, stride_ek, b, h, i, j, i < length_q, j < length_k,
            HAS_KEYS, HAS_SEGMENTS, HAS_ELEMENTS,
        )  # fmt: skip
        if CAUSAL:
            at = i[:, None] + offset
            seen &= (j[None, :] <= at) & (j[None, :] > at - window)
        x = bias_tile(BIAS, stride_bb, stride_bh, stride_bq, stride_bk, b, h, i, j, seen)
        live = tl.where(x > HIDDEN, j[None, :], length_k)
        some = tl.where(x > -float("inf"), j[None, :], length_k)
        first_live = tl.minimum(first_live, tl.min(live, 1))
        first_seen = tl.minimum(first_seen, tl.min(some, 1))
    alive = first_live < length_k
    first = tl.where(alive, first_live, tl.where(first_seen < length_k, first_seen, -1))
    tl.store(FIRST + bh * length_q + i, first, i < length_q)
    tl.store(LIVE + bh * length_q + i, alive.to(tl.uint8), i < length_q)


@triton.jit(do_not_specialize=[*LENGTHS[2:], *MASK_STRIDES, *BIAS_STRIDES, "heads_of_mask"])
def states_kernel(
    KEYS, Q_SEGMENTS, K_SEGMENTS, ELEMENTS, BIAS, STATES, LEVELS, LIVE,
    stride_keys, stride_qs, stride_ks, stride_eb, stride_eh, stride_eq, stride_ek,
    stride_bb, stride_bh, stride_bq, stride_bk,
    heads_of_mask, length_q, length_k, blocks_q, blocks_k, offset, window,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_KEYS: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_ELEMENTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """The state of one block: 0 hidden, 1 visible in part, 2 wholly visible; and its level."""
    pid = tl.program_id(0).to(tl.int64)
    j_block = (pid % blocks_k).to(tl.int32)
    i_block = (pid // blocks_k % blocks_q).to(tl.int32)
    bh = pid // blocks_k // blocks_q
    i = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
    j = j_block * BLOCK_N + tl.arange(0, BLOCK_N)
    seen = data_seen(
        KEYS, Q_SEGMENTS, K_SEGMENTS, ELEMENTS, stride_keys, stride_qs, stride_ks,
        stride_eb, stride_eh, stride_eq, stride_ek, bh // heads_of_mask, bh % heads_of_mask,
        i, j, i < length_q, j < length_k, HAS_KEYS, HAS_SEGMENTS, HAS_ELEMENTS,
    )  # fmt: skip
    if CAUSAL:
        seen &= (j[None, :] <= i[:, None] + offset) & (j[None, :] > i[:, None] + offset - window)
    if HAS_BIAS:
        b = bh // heads_of_mask
        h = bh % heads_of_mask
        x = bias_tile(BIAS, stride_bb, stride_bh, stride_bq, stride_bk, b, h, i, j, seen)
        live = tl.load(LIVE + bh * length_q + i, i < length_q, 0)[:, None] != 0
        seen &= ((x > HIDDEN) & live) | ((x > -float("inf")) & (live == 0))
    count = tl.sum(tl.sum(seen.to(tl.int32), 1), 0)
    if HAS_BIAS:
        x = tl.where(seen, x, -float("inf"))
        top = tl.maximum(tl.max(tl.max(x, 1), 0), LOWEST)
        total = tl.sum(tl.sum(tl.exp2(above_hidden(x - top) * LOG2_E), 1), 0)
        mean = tl.where(count > 0, total / tl.maximum(count, 1).to(tl.float32), 1.0)
        tl.store(LEVELS + pid, tl.maximum(top + tl.log2(mean) * LN2, FLOOR))
    rows = tl.minimum(length_q - i_block * BLOCK_M, BLOCK_M)
    columns = tl.minimum(length_k - j_block * BLOCK_N, BLOCK_N)
    tl.store(STATES + pid, (count > 0).to(tl.int32) + (count == rows * columns).to(tl.int32))


class Shown(NamedTuple):
    """What selection reads of a data mask.

    Attributes:
        states: uint8 `[B', H', NQ, NK]`: 0 hidden, 1 visible in part, 2 wholly visible; `NEEDED`
            more where a row would lose its last key.
        start: int32 `[B', H', NQ]`, the block from which sinks are counted.
        valid: uint8 `[B', Lk]`, contiguous: keys that some query may see.
        levels: fp32 like `states`, what a bias adds to the scores; None without one.
    """

    states: Tensor
    start: Tensor
    valid: Tensor
    levels: Tensor | None = None

    @property
    def strides(self) -> tuple[int, int]:
        """Of batch and head, in query blocks: 0 where all entries have the same."""
        batch, heads, blocks_q = self.start.shape
        return 0 if batch == 1 else heads * blocks_q, 0 if heads == 1 else blocks_q

    def weights(self, size: int) -> Tensor:
        """log2 of the share of valid keys in every sub-block of `size`, fp32 `[B', NS]`."""
        short = -self.valid.shape[1] % size
        filled = torch.nn.functional.pad(self.valid, (0, short))
        return torch.log2(torch.unflatten(filled, 1, (-1, size)).sum(2).float() / size)

    def strides_with(self, weights: Tensor) -> tuple[int, int, int]:
        """`strides`, and that of the batch in `weights`."""
        return *self.strides, 0 if weights.shape[0] == 1 else weights.shape[1]


def shown(
    data: DataMask,
    mask: Mask,
    like: Tensor,
    length_q: int,
    length_k: int,
    *,
    block_m: int,
    block_n: int,
) -> Shown:
    """Look at every pair once; no host synchronisation."""
    parts = Parts.of(data, like)
    square = [x for x in (data.elements, data.bias) if x is not None]
    batch = max(x.shape[0] for x in (data.keys, data.q_segments, data.k_segments, *square)
                if x is not None)  # fmt: skip
    heads = max((x.shape[1] for x in square), default=1)
    blocks_q, blocks_k = -(-length_q // block_m), -(-length_k // block_n)
    states = torch.empty(batch, heads, blocks_q, blocks_k, dtype=torch.uint8, device=like.device)
    shape = (batch, heads, length_q) if parts.biased else (0, 0, 0)
    live = torch.empty(shape, dtype=torch.uint8, device=like.device)
    first = torch.full(shape, -1, dtype=torch.int32, device=like.device)
    levels = torch.empty_like(states if parts.biased else live, dtype=torch.float32)
    present = dict(zip(PRESENT, parts.present, strict=True))
    site = mask.offset, site_window(mask)
    with on_device(like):
        if parts.biased:
            first_kernel[(batch * heads * -(-length_q // ROWS),)](
                *parts.tensors, parts.bias, first, live, *parts.strides, *parts.bias_strides,
                heads, length_q, length_k, *site, BLOCK_M=ROWS, BLOCK_N=COLUMNS,
                CAUSAL=mask.causal, **present, num_warps=4,
            )  # fmt: skip
        states_kernel[(states.numel(),)](
            *parts.tensors, parts.bias, states, levels, live, *parts.strides, *parts.bias_strides,
            heads, length_q, length_k, blocks_q, blocks_k, *site,
            BLOCK_M=block_m, BLOCK_N=block_n, CAUSAL=mask.causal, **present,
            HAS_BIAS=parts.biased, num_warps=4,
        )  # fmt: skip
    start = (states > 0).to(torch.uint8).argmax(3).int()
    if mask.window:
        start.zero_()
    valid = data.seen_keys()
    if valid is None:
        valid = states.new_ones((1, length_k), dtype=torch.bool)
    if parts.biased:
        states += biases.needed(first, blocks_k, block_m, block_n) * NEEDED
    return Shown(states, start, bytes_of(valid.contiguous()), levels if parts.biased else None)
