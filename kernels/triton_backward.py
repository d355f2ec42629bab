"""How are the gradients of block-sparse attention launched? Three kernels and a transpose.

The statistics of a row (here), dq (`kernels.triton_dq`), dk and dv (`kernels.triton_dkdv`). The
probabilities are computed again from the forward's lse; which blocks are kept is a constant. The
oracle is `kernels.reference.backward`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from afbs_compile.kernels.boxes import Box, launch, readable
from afbs_compile.kernels.data_mask import DataMask
from afbs_compile.kernels.geometry import Mask
from afbs_compile.kernels.launch import aligned, described
from afbs_compile.kernels.transpose import transposed
from afbs_compile.kernels.triton_common import (
    LENGTHS,
    LOG2E,
    interpreted,
    rows_contiguous,
    shared_memory_bytes,
    site_window,
)
from afbs_compile.kernels.triton_dkdv import dkdv_kernel, dkdv_tiling
from afbs_compile.kernels.triton_dq import dq_kernel, dq_tiling
from afbs_compile.kernels.triton_mask import PRESENT, Parts

ROWS = 32  # queries of one program of `statistics_kernel`
BASE2 = tl.constexpr(LOG2E)


@triton.jit(do_not_specialize=[*LENGTHS, "padded_q"])
def statistics_kernel(
    O, DO, LSE, LSE2, DELTA, stride_ob, stride_oh, stride_ol, stride_db, stride_dh, stride_dl,
    heads, length_q, padded_q, D: tl.constexpr, D_PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The row's do · o, and its lse in base 2: +inf, p = 0, if it sees nothing or is not there."""
    programs = tl.cdiv(padded_q, ROWS)
    pid = tl.program_id(0)
    b = (pid // programs // heads).to(tl.int64)
    h = (pid // programs % heads).to(tl.int64)
    i = pid % programs * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D_PADDED)
    both = (i < length_q)[:, None] & (d < D)[None, :]
    i_rows = i.to(tl.int64)[:, None]
    o_rows = O + b * stride_ob + h * stride_oh + i_rows * stride_ol
    do_rows = DO + b * stride_db + h * stride_dh + i_rows * stride_dl
    o = tl.load(o_rows + d[None, :], mask=both, other=0.0).to(tl.float32)
    do = tl.load(do_rows + d[None, :], mask=both, other=0.0).to(tl.float32)
    lse = tl.load(LSE + (b * heads + h) * length_q + i, mask=i < length_q, other=-float("inf"))
    lse2 = tl.where(lse == -float("inf"), float("inf"), lse * BASE2)
    out = (b * heads + h) * padded_q + i
    tl.store(LSE2 + out, lse2, mask=i < padded_q)
    tl.store(DELTA + out, tl.sum(o * do, 1), mask=i < padded_q)


@dataclass(frozen=True, slots=True)
class Call:
    """What the gradient kernels share; tensors as in `backward`, with last strides of 1.

    Attributes:
        q, k, v, do, policy, scale, mask, block_m, block_n: See `backward`.
        lse2: lse in base 2, `[B, Hq, NQ * block_m]`.
        delta: do · o, `[B, Hq, NQ * block_m]`.
        parts: The part of the mask that comes with the call.
        top: Largest score of every query, `[B, Hq, Lq]`, lse2 counted from it; read with a bias.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    policy: Tensor
    lse2: Tensor
    delta: Tensor
    mask: Mask
    scale: float
    block_m: int
    block_n: int
    parts: Parts
    top: Tensor

    def tiling(self, choose: Any) -> tuple[int, int, int, int]:
        """`choose` is `dq_tiling` or `dkdv_tiling`."""
        blocks = self.block_m, self.block_n, shared_memory_bytes(self.q.device)
        chosen: tuple[int, int, int, int] = choose(
            padded(self.q.shape[-1]), self.q.element_size(), *blocks
        )
        return chosen

    def launch(
        self, kernel: Any, programs: int, tiling: tuple[int, int, int, int],
        outputs: tuple[Tensor, ...], stream: tuple[Tensor, Tensor], rows: int,
        lists: tuple[Tensor, Tensor], more: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        """Launch a gradient kernel; it reads `stream` in boxes of `rows` rows if it can."""
        q, k, v, do, mask, parts = self.q, self.k, self.v, self.do, self.mask, self.parts
        boxed = rows > 0 and all(readable(x) for x in stream)
        boxes = [Box(x, rows) if boxed else None for x in stream]
        tile_m, tile_n, warps, stages = tiling
        heads, length_q, head_dim = q.shape[1:]
        blocks = -(-length_q // self.block_m), -(-k.shape[2] // self.block_n)
        key = (
            tiling, boxed, mask, self.scale, self.block_m, self.block_n, aligned(*lists),
            aligned(self.policy), *(y for x in (q, k, v, do) for y in described(x)),
            *self.described_mask(),
        )  # fmt: skip
        launch(
            kernel, key, q, programs,
            (q, k, v, do, *outputs, *boxes, self.lse2, self.delta, *lists, self.policy,
             self.scale, self.scale * LOG2E,
             *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3],
             *outputs[0].stride()[:3], *more, heads, length_q, k.shape[2], *blocks,
             mask.offset, site_window(mask),
             *parts.tensors, parts.bias, self.top, *parts.strides, *parts.bias_strides),
            D=head_dim, D_PADDED=padded(head_dim), BLOCK_M=self.block_m, BLOCK_N=self.block_n,
            TILE_M=tile_m, TILE_N=tile_n, CAUSAL=mask.causal, GROUP=heads // k.shape[1],
            BOXES=boxed, **dict(zip(PRESENT, parts.present, strict=True)), HAS_BIAS=parts.biased,
            num_warps=warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip

    def described_mask(self) -> tuple[Hashable, ...]:
        """All of the mask that may decide which compiled kernel reads it."""
        parts = self.parts
        if not parts.any:
            return ()
        tensors = (*parts.tensors, parts.bias, self.top)
        return parts.present, parts.biased, *(y for x in tensors for y in described(x))


def padded(head_dim: int) -> int:
    """Head dimension as the kernels take it: a power of two."""
    return max(16, int(triton.next_power_of_2(head_dim)))


def empty_rows(x: Tensor) -> Tensor:
    """Memory for a gradient: `[B, H, L, D]` over `[B, L, H, D]`."""
    batch, heads, length, head_dim = x.shape
    out = torch.empty(batch, length, heads, head_dim, dtype=x.dtype, device=x.device)
    return out.transpose(1, 2)


def statistics(o: Tensor, do: Tensor, lse: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """`lse2` and `delta` of every query, fp32 `[B, Hq, length]`; `length` is at least Lq."""
    batch, heads, length_q, head_dim = o.shape
    lse, o = lse.contiguous(), rows_contiguous(o)
    shape = batch, heads, length
    lse2, delta = (torch.empty(shape, dtype=torch.float32, device=o.device) for _ in range(2))
    programs = batch * heads * -(-length // ROWS)
    launch(
        statistics_kernel, (length, described(o), described(do), aligned(lse)), o, programs,
        (o, do, lse, lse2, delta, *o.stride()[:3], *do.stride()[:3], heads, length_q, length),
        D=head_dim, D_PADDED=padded(head_dim), ROWS=ROWS, num_warps=4,
    )  # fmt: skip
    return lse2, delta


def roomy(tiling: tuple[int, int, int, int], parts: Parts) -> tuple[int, int, int, int]:
    """A tiling of `dq_kernel` that leaves registers to the mask's tile, so that none spill."""
    if not parts.any:
        return tiling
    tile_m, tile_n, warps, stages = tiling
    vector = parts.present == (True, False, False) and not parts.biased  # keys alone
    return tile_m, min(tile_n, 64 if vector else 32), warps, stages


def query_gradient(call: Call, counts: Tensor, indices: Tensor) -> Tensor:
    """Gradient of q, over the lists of the forward."""
    dq, tiling = empty_rows(call.q), roomy(call.tiling(dq_tiling), call.parts)
    batch, heads, length_q, _ = call.q.shape
    programs = batch * heads * -(-length_q // tiling[0])
    # a box is a part of one listed block: a step of two blocks is read through pointers
    rows = tiling[1] if tiling[1] <= call.block_n else 0
    lists = counts.contiguous(), indices.contiguous()
    call.launch(dq_kernel, programs, tiling, (dq,), (call.k, call.v), rows, lists)
    return dq


def key_gradients(call: Call, counts: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of k and v, over the transposed lists of the forward."""
    dk, dv, tiling = empty_rows(call.k), empty_rows(call.k), call.tiling(dkdv_tiling)
    if call.parts.any and tiling[0] * tiling[1] >= 64 * 64:  # the mask's tile takes registers too
        tiling = *tiling[:2], 8, tiling[3]
    batch, kv_heads, length_k, _ = call.k.shape
    programs = batch * kv_heads * -(-length_k // tiling[1])
    lists, more = transposed(counts, indices), (batch * kv_heads,)
    boxes = call.q, call.do
    call.launch(dkdv_kernel, programs, tiling, (dk, dv), boxes, tiling[0], lists, more)
    return dk, dv


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    counts: Tensor,
    indices: Tensor,
    policy: Tensor,
    *,
    mask: Mask,
    scale: float,
    block_m: int,
    block_n: int,
    data: DataMask | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `triton_forward.forward`; no host synchronisation, the same bits on every run.

    Args:
        do: Gradient of o, `[B, Hq, Lq, D]`, any strides.
        q: `[B, Hq, Lq, D]`, fp32, fp16 or bf16, any strides.
        k: `[B, Hkv, Lk, D]`; Hkv divides Hq.
        v: `[B, Hkv, Lk, D]`.
        o: The forward's output.
        lse: The forward's lse, fp32 `[B, Hq, Lq]`, with a bias in two parts.
        counts: int32 `[B, Hq, NQ]` (see `kernels.lists`).
        indices: int32 `[B, Hq, NQ, NK]`.
        policy: float32 `[Hq, COLUMNS]`; windows and sinks of windowed heads are read.
        mask: The site's mask.
        scale: Multiplier on q·k, of any sign.
        block_m: Query block, tokens; a power of two from 16 on.
        block_n: Key block, tokens; a power of two from 16 on.
        data: The part of the mask that comes with the call; looked at in every listed block.

    Returns:
        `dq`, `dk`, `dv` in the dtypes of q, k and v, `[B, H, L, D]` over `[B, L, H, D]` memory.
        What sees nothing, or is seen by nobody, gets 0.
    """
    dtypes = q.dtype, k.dtype, v.dtype
    do = do.to(q.dtype)
    if interpreted() and q.dtype == torch.bfloat16:  # the interpreter's bf16 tl.dot is wrong
        q, k, v, do, o = (x.float() for x in (q, k, v, do, o))
    q, k, v, do = (rows_contiguous(x) for x in (q, k, v, do))
    policy = policy.contiguous()
    parts = Parts.of(data, policy)
    top, lse = lse.contiguous() if parts.biased else (policy, lse)
    lse2, delta = statistics(o, do, lse, indices.shape[2] * block_m)
    call = Call(q, k, v, do, policy, lse2, delta, mask, scale, block_m, block_n, parts, top)
    dq = query_gradient(call, counts, indices)
    dk, dv = key_gradients(call, counts, indices)
    return dq.to(dtypes[0]), dk.to(dtypes[1]), dv.to(dtypes[2])
