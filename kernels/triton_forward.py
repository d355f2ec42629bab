"""How does a GPU attend over block lists? The portable Triton forward, sm_80 and later.

It serves the GPUs, head dims, dtypes and versions of Triton that `kernels.gluon_forward` does not.
Hopper's copy engine reads keys and values where it can. The kernel is
`kernels.triton_forward_kernel`, the oracle `kernels.reference`.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from afbs_compile.kernels.boxes import Box, launch, readable
from afbs_compile.kernels.geometry import Mask
from afbs_compile.kernels.launch import aligned
from afbs_compile.kernels.triton_common import (
    LOG2E,
    interpreted,
    rows_contiguous,
    shared_memory_bytes,
    site_window,
)
from afbs_compile.kernels.triton_forward_kernel import forward_kernel
from afbs_compile.kernels.triton_steps import load_rows, whole_blocks

__all__ = ["Tiling", "forward", "forward_kernel", "load_rows", "tiling", "whole_blocks"]


BARRIERS = 1024  # bytes of shared memory for what copies are waited for with


class Tiling(NamedTuple):
    """Which variant of the kernel runs.

    Attributes:
        tile_m: Queries of a program; divides the query block.
        tile_n: Keys of a tile; divides the key block.
        pair: Whether a step takes two tiles.
        ahead: Whether P·V runs while the weights of the next step are made.
        warps: Warps of a program.
        stages: Steps whose keys and values are in shared memory.
    """

    tile_m: int
    tile_n: int
    pair: bool
    ahead: bool
    warps: int
    stages: int


def tiling(
    head_dim: int,
    itemsize: int,
    block_m: int,
    block_n: int,
    shared_bytes: int,
    *,
    causal: bool = False,
    boxed: bool = False,
) -> Tiling:
    """The variant for a call: the largest tiles that fit.

    fp32 runs on the FMA units, whose operands stay in registers: it takes smaller tiles.

    Args:
        head_dim: Head dimension, padded to a power of two.
        itemsize: Bytes of one element of q, k and v.
        block_m: Query block, tokens.
        block_n: Key block, tokens.
        shared_bytes: Shared memory that one program may use.
        causal: Whether the site's mask is causal.
        boxed: Whether the copy engine reads k and v.

    Returns:
        Tiles with which q takes a third of the shared memory at most, and two stages of k and v
        fit into the rest.
    """
    exact = itemsize == 4
    row_bytes = head_dim * itemsize
    tile_m = min(block_m, 64 if exact else 128)
    while tile_m > 16 and 3 * tile_m * row_bytes > shared_bytes:
        tile_m //= 2
    room = shared_bytes - BARRIERS - tile_m * row_bytes
    tile_n = min(block_n, 4096 // head_dim if exact else 64)
    while tile_n > 16 and 4 * tile_n * row_bytes > room:
        tile_n //= 2
    stages = min(3, room // (2 * tile_n * row_bytes))
    many = exact or tile_m >= 128 or tile_m * head_dim >= 16384  # registers for the output
    return Tiling(tile_m, tile_n, False, boxed, 8 if many else 4, stages)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    policy: Tensor,
    *,
    mask: Mask,
    scale: float,
    block_m: int,
    block_n: int,
    counter: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over block lists; no host synchronisation, can be captured in a CUDA graph.

    Args:
        q: `[B, Hq, Lq, D]`, fp32, fp16 or bf16, any strides.
        k: `[B, Hkv, Lk, D]`; Hkv divides Hq.
        v: `[B, Hkv, Lk, D]`.
        counts: int32 `[B, Hq, NQ]` (see `kernels.lists`).
        indices: int32 `[B, Hq, NQ, NK]`.
        policy: float32 `[Hq, COLUMNS]`; windows and sinks of windowed heads are read.
        mask: The site's mask.
        scale: Multiplier on q·k.
        block_m: Query block, tokens; a power of two from 16 on.
        block_n: Key block, tokens; a power of two from 16 on.
        counter: Taken for the signature of `kernels.gluon_forward`; not used.

    Returns:
        `o` in q's dtype, `[B, Hq, Lq, D]` over `[B, Lq, Hq, D]` memory, and `lse` fp32
        `[B, Hq, Lq]`, natural log. A row that sees nothing is 0 with lse −inf.
    """
    if scale <= 0:  # the online softmax takes maxima before it scales
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    dtype = q.dtype
    if interpreted() and dtype == torch.bfloat16:  # the interpreter's bf16 tl.dot is wrong
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    counts, indices, policy = counts.contiguous(), indices.contiguous(), policy.contiguous()
    k, v = seen_rows(mask, q, k), seen_rows(mask, q, v)
    batch, heads, length_q, head_dim = q.shape
    itemsize = q.element_size()
    padded = max(16, triton.next_power_of_2(head_dim))
    # fp32 products leave the copy engine nothing to hide
    boxed = itemsize == 2 and k.numel() > 0 and readable(k) and readable(v)
    chosen = tiling(
        padded, itemsize, block_m, block_n, shared_memory_bytes(q.device),
        causal=mask.causal, boxed=boxed,
    )  # fmt: skip
    o = torch.empty(batch, length_q, heads, head_dim, dtype=q.dtype, device=q.device)
    o = o.transpose(1, 2)
    lse = torch.empty(batch, heads, length_q, dtype=torch.float32, device=q.device)
    key = (
        chosen, boxed, mask.causal, block_m, block_n, aligned(counts), aligned(indices),
        aligned(policy), *((x.dtype, x.shape, x.stride(), aligned(x)) for x in (q, k, v)),
    )  # fmt: skip
    launch(
        forward_kernel, key, q, batch * heads * triton.cdiv(length_q, chosen.tile_m),
        (q, k, v, o, *(Box(x, chosen.tile_n) if boxed else None for x in (k, v)), lse, counts,
         indices, policy, scale * LOG2E, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
         *o.stride()[:3], heads, heads // k.shape[1], length_q, k.shape[2], *indices.shape[-2:],
         mask.offset, site_window(mask)),
        D=head_dim, D_PADDED=padded, BLOCK_M=block_m, BLOCK_N=block_n, TILE_M=chosen.tile_m,
        TILE_N=chosen.tile_n, PAIR=chosen.pair, AHEAD=chosen.ahead, BOXES=boxed,
        CAUSAL=mask.causal, num_warps=chosen.warps, num_stages=chosen.stages,
        enable_fp_fusion=True,
    )  # fmt: skip
    return o.to(dtype), lse


def seen_rows(mask: Mask, q: Tensor, x: Tensor) -> Tensor:
    """`k` or `v` up to the last key that any query sees; at least one key, if there is one."""
    if not mask.causal:
        return x
    return x[:, :, : max(1, q.shape[2] + mask.offset)]
