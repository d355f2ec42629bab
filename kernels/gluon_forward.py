"""How is the Gluon kernel launched? The block-sparse forward for Hopper, over views as they are.

TMA reads q, k, v through 4-D descriptors with their real strides and fills what lies past the end
with zeros: no copy, no padding. The kernel is `kernels.gluon_kernel`, the oracle
`kernels.reference`. Policy column LAMBDA is not read: no P·V is skipped here.
"""

import functools

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from afbs_compile.kernels.geometry import Mask
from afbs_compile.kernels.gluon_kernel import forward_kernel
from afbs_compile.kernels.triton_common import LOG2E, on_device, site_window

BLOCK_M = 128
BLOCK_N = 64
BOX_ROWS = 64  # rows of one TMA copy, of queries and of keys
STAGES = {64: 4, 128: 2}  # K and V tiles in flight, by head dim
DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}
TMA_ALIGNMENT = 16  # bytes, of addresses and strides


def supported(q: Tensor, k: Tensor, v: Tensor, *, block_m: int, block_n: int) -> str | None:
    """Why the Gluon kernel cannot take these tensors, or None if it can.

    The device and the version of Triton are `kernels.gluon_shim`'s question.

    Args:
        q: `[B, Hq, Lq, D]`.
        k: `[B, Hkv, Lk, D]`.
        v: `[B, Hkv, Lk, D]`.
        block_m: Query block of the lists, tokens.
        block_n: Key block of the lists, tokens.
    """
    if (block_m, block_n) != (BLOCK_M, BLOCK_N):
        return f"blocks of {block_m} x {block_n} tokens, not {BLOCK_M} x {BLOCK_N}"
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return f"dtypes {q.dtype}, {k.dtype}, {v.dtype}; need one of fp16, bf16"
    if q.shape[-1] not in STAGES or not q.shape[-1] == k.shape[-1] == v.shape[-1]:
        return f"head dims {q.shape[-1]}, {k.shape[-1]}, {v.shape[-1]}; need one of 64, 128"
    for name, x in (("q", q), ("k", k), ("v", v)):
        reason = unreadable(x)
        if reason is not None:
            return f"{name}: {reason}"
    return None


def unreadable(x: Tensor) -> str | None:
    """Why TMA cannot read a view, or None if it can."""
    if x.numel() == 0:
        return "empty"
    if x.data_ptr() % TMA_ALIGNMENT:
        return "the address is no multiple of 16 bytes"
    if x.stride(-1) != 1:
        return f"the last stride is {x.stride(-1)}, not 1"
    steps = [step for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    if any(step == 0 or step * x.element_size() % TMA_ALIGNMENT for step in steps):
        return f"strides {x.stride()} are not all positive multiples of 16 bytes"
    return None


def descriptor(x: Tensor, length: int) -> TensorDescriptor:
    """A TMA descriptor of the first `length` rows of `[B, H, L, D]`, copied 64 rows at a time."""
    batch, heads, _, head_dim = x.shape
    # the stride of an axis of one element is never used, and need not be a valid one
    strides = [
        s if n > 1 else head_dim for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True)
    ]
    box = [1, 1, BOX_ROWS, head_dim]
    return TensorDescriptor(
        x, [batch, heads, length, head_dim], [*strides, 1], box, box_layout(head_dim, x.dtype)
    )


@functools.cache
def box_layout(head_dim: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a copied box lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([1, 1, BOX_ROWS, head_dim], DTYPES[dtype])


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


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
    block_m: int = BLOCK_M,
    block_n: int = BLOCK_N,
) -> tuple[Tensor, Tensor]:
    """Attention over block lists; no host synchronisation, can be captured in a CUDA graph.

    Args:
        q: `[B, Hq, Lq, D]`, fp16 or bf16, any view that `supported` accepts.
        k: `[B, Hkv, Lk, D]`; Hkv divides Hq.
        v: `[B, Hkv, Lk, D]`.
        counts: int32 `[B, Hq, NQ]` (see `kernels.lists`).
        indices: int32 `[B, Hq, NQ, NK]`.
        policy: float32 `[Hq, COLUMNS]`; windows and sinks of windowed heads are read.
        mask: The site's mask.
        scale: Multiplier on q·k.
        block_m: Query block, tokens; 128.
        block_n: Key block, tokens; 64.

    Returns:
        `o` in q's dtype, `[B, Hq, Lq, D]` over `[B, Lq, Hq, D]` memory, and `lse` fp32
        `[B, Hq, Lq]`, natural log. A row that sees nothing is 0 with lse −inf.

    Raises:
        ValueError: If `supported` gives a reason.
    """
    reason = supported(q, k, v, block_m=block_m, block_n=block_n)
    if reason is not None:
        raise ValueError(f"the Gluon forward cannot run this call: {reason}")
    if scale <= 0:  # the online softmax takes maxima before it scales
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    counts, indices, policy = counts.contiguous(), indices.contiguous(), policy.contiguous()
    batch, heads, length_q, head_dim = q.shape
    length_k = seen_length(mask, length_q, k.shape[2])
    o = torch.empty(batch, length_q, heads, head_dim, dtype=q.dtype, device=q.device)
    o = o.transpose(1, 2)
    lse = torch.empty(batch, heads, length_q, dtype=torch.float32, device=q.device)
    # its own counter for every launch: launches on two streams must not share one
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    blocks_q, blocks_k = indices.shape[-2:]
    tiles = batch * heads * blocks_q
    with on_device(q):
        forward_kernel[(min(tiles, processors(q.device)),)](
            descriptor(q, length_q), descriptor(k, length_k), descriptor(v, length_k),
            descriptor(o, length_q), counts, indices, counter, policy, lse, scale * LOG2E,
            tiles, heads, heads // k.shape[1], blocks_q, blocks_k, length_q, length_k,
            mask.offset, site_window(mask),
            D=head_dim, STAGES=STAGES[head_dim], CAUSAL=mask.causal, num_warps=4,
        )  # fmt: skip
    return o, lse


def seen_length(mask: Mask, length_q: int, length_k: int) -> int:
    """Keys up to the last one that any query sees, at least one: the rest is never read."""
    if not mask.causal:
        return length_k
    return max(1, min(length_k, length_q + mask.offset))
