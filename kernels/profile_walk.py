"""How does a GPU make the tables of a profile? Dense pass, lists by rank, walk, look-up.

Lambda levels go over the key blocks in groups (`kernels.triton_profile`). A group walks only over
the blocks that its most permissive level keeps: between two of them no error of the group changes,
so that the tables of all ranks are a look-up in what the walk wrote.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from afbs_compile.kernels.geometry import Mask
from afbs_compile.kernels.triton_common import (
    LOG2E,
    interpreted,
    on_device,
    rows_contiguous,
    shared_memory_bytes,
    site_window,
)
from afbs_compile.kernels.triton_profile import dense_kernel, walk_kernel

MOST_LEVELS = 4  # whose sums fit into the registers of one program


class Tiling(NamedTuple):
    """Queries and keys of a tile, warps, pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


class Call(NamedTuple):
    """A profiled attention call as the kernels take it.

    Attributes:
        q: `[B, Hq, Lq, D]`, last stride 1.
        k: `[B, Hkv, Lk, D]`, last stride 1.
        v: `[B, Hkv, Lk, D]`, last stride 1.
        rows: int64 `[R]`, the query blocks.
        mask: The site's mask.
        scale: Multiplier on q·k.
        block_m: Query block, tokens.
        block_n: Key block, tokens.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rows: Tensor
    mask: Mask
    scale: float
    block_m: int
    block_n: int

    @property
    def blocks_k(self) -> int:
        """Key blocks NK."""
        return -(-self.k.shape[2] // self.block_n)

    @property
    def width(self) -> int:
        """Head dimension as the tensor cores take it."""
        return max(16, int(triton.next_power_of_2(self.q.shape[3])))

    @property
    def rowed(self) -> tuple[int, int, int]:
        """B, Hq and R."""
        return self.q.shape[0], self.q.shape[1], len(self.rows)


class Dense(NamedTuple):
    """What the dense pass knows of the profiled rows.

    Attributes:
        top: fp32 `[B, H, R, M]`, largest score of every row, log2 units.
        o: fp32 `[B, H, R, M, D']`, output; D' is D up to a power of two.
        gain: fp32 `[B, H, R, NK]`, by how much a block comes closest to a row's largest score.
    """

    top: Tensor
    o: Tensor
    gain: Tensor


def call_of(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, mask: Mask, scale: float,
    block_m: int, block_n: int,
) -> Call:  # fmt: skip
    """The call with strides and types that the kernels take; `rows` on the device of q."""
    if interpreted() and q.dtype == torch.bfloat16:  # the interpreter's bf16 tl.dot is wrong
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    return Call(q, k, v, rows.contiguous(), mask, scale, block_m, block_n)


def tiling(call: Call, levels: int) -> Tiling:
    """How a walk that holds the sums of `levels` levels cuts its work; 0 is the dense kernel.

    Sums live in registers, 255 a thread at most: four of `[64, 128]` on eight warps take 128 of
    them, o* and PV 32 each. fp32 runs on the FMA units, whose operands are there too.
    """
    width, size = call.width, call.q.element_size()
    elements = 4096 if size == 4 else 8192 if levels > 1 else 16384
    rows = max(16, min(call.block_m, elements // width))
    room = shared_memory_bytes(call.q.device) - rows * width * size
    keys = max(16, min(call.block_n, 64 if size < 4 else 4096 // width))
    while keys > 16 and 4 * keys * width * size > room:
        keys //= 2
    stages = 1 if size * width > 512 else max(1, min(3, room // (3 * keys * width * size)))
    return Tiling(rows, keys, 8, stages)


def arguments(call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What both kernels take after their tensors, and their constants."""
    numbers = (
        call.scale * LOG2E, *call.q.stride()[:3], *call.k.stride()[:3], *call.v.stride()[:3],
        call.q.shape[1], call.q.shape[1] // call.k.shape[1], call.q.shape[2], call.k.shape[2],
        len(call.rows), call.blocks_k, call.mask.offset, site_window(call.mask),
    )  # fmt: skip
    constants = {
        "D": call.q.shape[3], "D_PADDED": call.width, "BLOCK_M": call.block_m,
        "BLOCK_N": call.block_n, "CAUSAL": call.mask.causal,
        "WINDOWED": call.mask.window > 0, "enable_fp_fusion": True,
    }  # fmt: skip
    return numbers, constants


def dense(call: Call) -> Dense:
    """The dense pass over the profiled rows; costs one and a half of theirs."""
    tile = tiling(call, 0)
    tiles, shape = call.block_m // tile.rows, call.rowed
    made: dict[str, Any] = {"dtype": torch.float32, "device": call.q.device}
    top = torch.empty(*shape, call.block_m, **made)
    o = torch.empty(*shape, call.block_m, call.width, **made)
    near = torch.full((*shape, tiles, call.blocks_k), -math.inf, **made)
    numbers, constants = arguments(call)
    with on_device(call.q):
        dense_kernel[(math.prod(shape) * tiles,)](
            call.q, call.k, call.v, call.rows, top, o, near, *numbers, **constants,
            TILE_M=tile.rows, TILE_N=tile.keys, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return Dense(top, o, near.amax(3) if tiles > 1 else near[:, :, :, 0])


def walk(call: Call, known: Dense, levels: Tensor, counts: Tensor, order: Tensor) -> Tensor:
    """Errors after every block of every group's order.

    Args:
        call: The call.
        known: Its dense pass.
        levels: fp32 `[G, S]`, log2 units; S is 1, 2 or 4.
        counts: int32 `[G, B, H, R]`, blocks of an order.
        order: int32 `[G, B, H, R, NK]`.

    Returns:
        fp32 `[G, S, B, H, R, NK + 1]`, undefined after `counts`.
    """
    tile = tiling(call, levels.shape[1])
    tiles, shape = call.block_m // tile.rows, call.rowed
    error = torch.empty(
        *levels.shape, *shape, tiles, call.blocks_k + 1, dtype=torch.float32, device=call.q.device
    )
    numbers, constants = arguments(call)
    with on_device(call.q):
        walk_kernel[(len(levels) * math.prod(shape) * tiles,)](
            call.q, call.k, call.v, call.rows, known.top, known.o, known.gain, levels, counts,
            order, error, *numbers, shape[0] * shape[1], **constants, TILE_M=tile.rows,
            TILE_N=tile.keys, LEVELS_HELD=levels.shape[1], num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip
    return error.sum(5) if tiles > 1 else error[:, :, :, :, :, 0]


def grouped(lambdas: Sequence[float]) -> tuple[list[int], list[list[float]]]:
    """Groups of equal size, most permissive levels first, and where each level went."""
    held = 1
    while held < min(len(lambdas), MOST_LEVELS):
        held *= 2
    by_level = sorted(range(len(lambdas)), key=lambda z: lambdas[z])
    levels = [lambdas[z] for z in by_level] + [math.inf] * (-len(lambdas) % held)
    places = [by_level.index(z) for z in range(len(lambdas))]
    return places, [levels[n : n + held] for n in range(0, len(levels), held)]


def tables(
    call: Call,
    known: Dense,
    order: Tensor,
    forced: Tensor,
    visible: Tensor,
    lambdas: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Tables of all levels by droppable blocks kept.

    Args:
        call: The call.
        known: Its dense pass.
        order: int64 `[B, H, R, NK]`, forced blocks, then the others by rank, invisible ones last.
        forced: int `[B, H, R]`, how many are forced.
        visible: int `[B, H, R]`, how many are visible.
        lambdas: Levels in log2 units, in any order.

    Returns:
        `error` fp32 and `computed` int32 `[Z, B, H, R, NK + 1]`, and `norm` fp32 `[B, H, R]`;
        after the last visible block the tables stay as they are there.
    """
    places, groups = grouped(lambdas)
    levels = torch.tensor(groups, dtype=torch.float32).to(call.q.device, non_blocking=True)
    ranked = known.gain.gather(-1, order)
    column = torch.arange(call.blocks_k + 1, device=call.q.device)
    ranked = ranked.masked_fill(column[:-1] >= visible[..., None], math.nan)  # live nowhere
    live = ranked[None] >= levels[:, :1, None, None, None]
    before = torch.nn.functional.pad(live.cumsum(-1, dtype=torch.int32), (1, 0))
    # what a group keeps moves to the front; the rest goes to a column that nobody reads
    slot = torch.where(live, before[..., :-1], call.blocks_k).long()
    lists = order.new_zeros(*live.shape[:-1], call.blocks_k + 1, dtype=torch.int32)
    lists.scatter_(-1, slot, order.int().expand(live.shape))
    lists = lists[..., :-1].contiguous()
    errors = walk(call, known, levels, before[..., -1].contiguous(), lists)
    kept = torch.minimum(column + forced[..., None], visible[..., None]).long()
    at = before.long().gather(-1, kept.expand(before.shape))
    errors = errors.gather(-1, at[:, None].expand(errors.shape)).flatten(0, 1)
    counted = (ranked >= levels.flatten()[:, None, None, None, None]).cumsum(-1, dtype=torch.int32)
    counted = torch.nn.functional.pad(counted, (1, 0))
    computed = counted.gather(-1, kept.expand(counted.shape))
    if places != list(range(len(groups) * len(groups[0]))):
        errors, computed = errors[places], computed[places]
    return errors, computed, known.o.abs().sum((3, 4))
