"""How is the Gluon backward launched? The gradients on Hopper, over views as they are.

The statistics of a row and the transposed lists are `kernels.triton_backward`'s; dq comes from
`kernels.gluon_dq`, dk and dv from `kernels.gluon_dkdv`. TMA reads q, k, v, do with their real
strides. The oracle is `kernels.reference.backward`.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afbs_compile.kernels import gluon_forward
from afbs_compile.kernels.geometry import Mask
from afbs_compile.kernels.gluon_dkdv import dkdv_kernel
from afbs_compile.kernels.gluon_dq import dq_kernel
from afbs_compile.kernels.gluon_forward import (
    BLOCK_M,
    BLOCK_N,
    Described,
    processors,
    seen_length,
    unreadable,
)
from afbs_compile.kernels.launch import again, aligned, first, prepared
from afbs_compile.kernels.transpose import transposed
from afbs_compile.kernels.triton_backward import empty_rows, statistics
from afbs_compile.kernels.triton_common import LOG2E, on_device, rows_contiguous, site_window

STAGES = {64: 4, 128: 2}  # steps in flight of both kernels, by head dim
# registers of a thread at entry of `dkdv_kernel`: two programs of 8 warps share a processor
SHARED_PROCESSOR = 65_536 // (2 * 8 * 32)


def supported(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, block_m: int, block_n: int
) -> str | None:
    """Why the Gluon backward cannot take these tensors, or None if it can.

    The device and the version of Triton are `kernels.gluon_shim`'s question.

    Args:
        q: `[B, Hq, Lq, D]`.
        k: `[B, Hkv, Lk, D]`.
        v: `[B, Hkv, Lk, D]`.
        scale: Multiplier on q·k.
        block_m: Query block of the lists, tokens.
        block_n: Key block of the lists, tokens.
    """
    if scale <= 0:  # hidden scores are -inf before they are scaled
        return f"scale {scale}; it must be positive"
    return gluon_forward.supported(q, k, v, block_m=block_m, block_n=block_n)


class Call(NamedTuple):
    """What both kernels read; tensors as in `backward`, `do` readable by TMA.

    Attributes:
        q, k, v, do, policy, mask, scale: See `backward`.
        lse2: lse in base 2, `[B, Hq, NQ * 128]`.
        delta: do · o, `[B, Hq, NQ * 128]`.
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

    def launch(
        self, kernel: Any, programs: int, views: tuple[tuple[Tensor, int], ...],
        rest: tuple[Tensor, ...], numbers: tuple[int, ...], **options: int,
    ) -> None:  # fmt: skip
        """Launch a kernel: TMA views of tensors with their lengths, other tensors, integers."""
        q, head_dim = self.q, self.q.shape[-1]
        described = [(Described.of(x, length), x) for x, length in views]
        tensors = *rest, self.policy, self.lse2, self.delta
        arguments = *tensors, self.scale, self.scale * LOG2E, *numbers
        key: Hashable = (
            kernel, q.device.index, q.dtype, self.mask, self.scale, numbers,
            tuple((d, x.shape, x.stride()) for d, x in described), aligned(*tensors),
        )  # fmt: skip
        with on_device(q):
            made = prepared(key)
            if made is None:
                first(
                    kernel, key, programs, (*(d.descriptor(x) for d, x in described), *arguments),
                    D=head_dim, STAGES=STAGES[head_dim], CAUSAL=self.mask.causal, num_warps=4,
                    **options,
                )  # fmt: skip
            else:
                viewed = (d.view(x) for d, x in described)
                again(made, q.device.index, programs, (*viewed, *arguments))

    def site(self, length_k: int) -> tuple[int, ...]:
        """Block counts, lengths and the mask's numbers, in the kernels' order."""
        length_q = self.q.shape[2]
        blocks = -(-length_q // BLOCK_M), -(-self.k.shape[2] // BLOCK_N)
        return *blocks, length_q, length_k, self.mask.offset, site_window(self.mask)


def query_gradient(call: Call, counts: Tensor, indices: Tensor) -> Tensor:
    """Gradient of q, over the lists of the forward."""
    q, k = call.q, call.k
    dq = empty_rows(q)
    batch, heads, length_q, _ = q.shape
    length_k = seen_length(call.mask, length_q, k.shape[2])
    tiles = batch * heads * -(-length_q // BLOCK_M)
    # its own for every launch: launches on two streams must not share one
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    views = (q, length_q), (call.do, length_q), (k, length_k), (call.v, length_k), (dq, length_q)
    numbers = tiles, heads, heads // k.shape[1], *call.site(length_k)
    lists = counts.contiguous(), indices.contiguous()
    programs = min(tiles, processors(q.device))
    call.launch(dq_kernel, programs, views, (*lists, counter), numbers)
    return dq


def key_gradients(call: Call, counts: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of k and v, over the transposed lists of the forward."""
    q, k = call.q, call.k
    dk, dv = empty_rows(k), empty_rows(k)
    batch, kv_heads, length_k, _ = k.shape
    length_q = q.shape[2]
    # a key that only queries past the last one would see arrives as zeros: it may be NaN
    seen = seen_length(call.mask, length_q, length_k)
    views = ((q, length_q), (call.do, length_q), (k, seen), (call.v, seen),
             (dk, length_k), (dv, length_k))  # fmt: skip
    numbers = batch * kv_heads, kv_heads, q.shape[1] // kv_heads, *call.site(length_k)
    programs = batch * kv_heads * -(-length_k // BLOCK_N)
    call.launch(
        dkdv_kernel, programs, views, transposed(counts, indices), numbers,
        maxnreg=SHARED_PROCESSOR,
    )  # fmt: skip
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the forward; no host synchronisation, the same bits on every run.

    Args:
        do: Gradient of o, `[B, Hq, Lq, D]`, any strides; copied if TMA cannot read it.
        q: `[B, Hq, Lq, D]`, fp16 or bf16, any view that `supported` accepts.
        k: `[B, Hkv, Lk, D]`; Hkv divides Hq.
        v: `[B, Hkv, Lk, D]`.
        o: The forward's output.
        lse: The forward's lse, fp32 `[B, Hq, Lq]`.
        counts: int32 `[B, Hq, NQ]` (see `kernels.lists`).
        indices: int32 `[B, Hq, NQ, NK]`.
        policy: float32 `[Hq, COLUMNS]`; windows and sinks of windowed heads are read.
        mask: The site's mask.
        scale: Multiplier on q·k, positive.
        block_m: Query block, tokens; 128.
        block_n: Key block, tokens; 64.

    Returns:
        `dq`, `dk`, `dv` in the dtypes of q, k and v, `[B, H, L, D]` over `[B, L, H, D]` memory.
        What sees nothing, or is seen by nobody, gets 0.

    Raises:
        ValueError: If `supported` gives a reason.
    """
    reason = supported(q, k, v, scale=scale, block_m=block_m, block_n=block_n)
    if reason is not None:
        raise ValueError(f"the Gluon backward cannot run this call: {reason}")
    do = rows_contiguous(do.to(q.dtype))
    if unreadable(do) is not None:
        do = do.contiguous() if not do.is_contiguous() else do.clone()
    lse2, delta = statistics(o, do, lse, indices.shape[2] * BLOCK_M)
    call = Call(q, k, v, do, policy.contiguous(), lse2, delta, mask, scale)
    dq = query_gradient(call, counts, indices)
    dk, dv = key_gradients(call, counts, indices)
    return dq, dk, dv
