"""How is the Gluon kernel launched? The block-sparse forward for Hopper, over views as they are.

TMA reads q, k, v through 4-D descriptors with their real strides and fills what lies past the end
with zeros: no copy, no padding. The kernel is `kernels.gluon_kernel`, the oracle
`kernels.reference`.
"""

import functools
from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from afbs_compile.kernels.geometry import Mask
from afbs_compile.kernels.gluon_kernel import forward_kernel
from afbs_compile.kernels.launch import MOST, TmaView, again, aligned, first, prepared
from afbs_compile.kernels.triton_common import LOG2E, on_device, site_window

BLOCK_M = 128
BLOCK_N = 64
BOX_ROWS = 64  # rows of one TMA copy, of queries and of keys
STAGES = {64: 4, 128: 2}  # K and V tiles in flight, by head dim
DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}
MOST_KEYS = 128 * ((1 << 15) - 1)  # `gluon_ring.announce` packs steps into 15 bits
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
    if k.shape[2] > MOST_KEYS:
        return f"{k.shape[2]} keys; at most {MOST_KEYS}"
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


@functools.cache
def box_layout(head_dim: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a copied box lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([1, 1, BOX_ROWS, head_dim], DTYPES[dtype])


class Described(NamedTuple):
    """Shape and strides, in elements, of the TMA descriptor of a `[B, H, L, D]` view."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @staticmethod
    def of(x: Tensor, length: int) -> "Described":
        """The first `length` rows of `x`, copied 64 rows at a time."""
        batch, heads, _, head_dim = x.shape
        # the stride of an axis of one element is never used, and need not be a valid one
        strides = (
            s if n > 1 else head_dim for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True)
        )
        return Described((batch, heads, length, head_dim), (*strides, 1))

    def descriptor(self, x: Tensor) -> TensorDescriptor:
        """As a kernel's first launch takes it."""
        head_dim = self.shape[-1]
        box = [1, 1, BOX_ROWS, head_dim]
        layout = box_layout(head_dim, x.dtype)
        return TensorDescriptor(x, list(self.shape), list(self.strides), box, layout)

    def view(self, x: Tensor) -> TmaView:
        """As a compiled kernel takes it."""
        return TmaView(x.data_ptr(), self.shape, self.strides)


class Plan(NamedTuple):
    """What a call needs that only its sizes, strides and mask decide."""

    described: tuple[Described, ...]
    numbers: tuple[float, ...]
    programs: int


PLANS: dict[Hashable, Plan] = {}


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
    counter: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over block lists; no host synchronisation, can be captured in a CUDA graph.

    Args:
        q: `[B, Hq, Lq, D]`, fp16 or bf16, any view that `supported` accepts.
        k: `[B, Hkv, Lk, D]`; Hkv divides Hq.
        v: `[B, Hkv, Lk, D]`.
        counts: int32 `[B, Hq, NQ]` (see `kernels.lists`).
        indices: int32 `[B, Hq, NQ, NK]`.
        policy: float32 `[Hq, COLUMNS]`; windows and sinks of windowed heads are read, and LAMBDA:
            64 queries by 128 keys are skipped if no score comes within lambda of the running
            maximum of its row (log2 units; the diagonal's step first, then from the end).
        mask: The site's mask.
        scale: Multiplier on q·k.
        block_m: Query block, tokens; 128.
        block_n: Key block, tokens; 64.
        counter: int32 of one element, 0, of this call alone; made if None.

    Returns:
        `o` in q's dtype, `[B, Hq, Lq, D]` over `[B, Lq, Hq, D]` memory, and `lse` fp32
        `[B, Hq, Lq]`, natural log. A row that sees nothing is 0 with lse −inf.

    Raises:
        ValueError: If `supported` gives a reason.
    """
    if scale <= 0:  # the online softmax takes maxima before it scales
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    counts, indices, policy = counts.contiguous(), indices.contiguous(), policy.contiguous()
    batch, heads, length_q, head_dim = q.shape
    o = torch.empty(batch, length_q, heads, head_dim, dtype=q.dtype, device=q.device)
    o = o.transpose(1, 2)
    lse = torch.empty(batch, heads, length_q, dtype=torch.float32, device=q.device)
    if counter is None:  # its own for every launch: launches on two streams must not share one
        counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    key = (
        forward_kernel, q.device.index, q.dtype, k.dtype, v.dtype, q.shape, q.stride(), k.shape,
        k.stride(), v.shape, v.stride(), indices.shape, mask, scale, block_m, block_n,
        aligned(q, k, v), aligned(counts, indices, counter, policy),
    )  # fmt: skip
    plan = PLANS.get(key) or planned(key, q, k, v, o, indices, mask, scale, block_m, block_n)
    rest = (counts, indices, counter, policy, lse, *plan.numbers)
    with on_device(q):
        made = prepared(key)
        if made is None:
            tensors = (d.descriptor(x) for d, x in zip(plan.described, (q, k, v, o), strict=True))
            first(
                forward_kernel, key, plan.programs, (*tensors, *rest),
                D=head_dim, STAGES=STAGES[head_dim], CAUSAL=mask.causal, num_warps=4,
            )  # fmt: skip
        else:
            views = (d.view(x) for d, x in zip(plan.described, (q, k, v, o), strict=True))
            again(made, q.device.index, plan.programs, (*views, *rest))
    return o, lse


def planned(
    key: Hashable,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    indices: Tensor,
    mask: Mask,
    scale: float,
    block_m: int,
    block_n: int,
) -> Plan:
    """The plan of a call, kept for the next one with this key.

    Raises:
        ValueError: If `supported` gives a reason.
    """
    reason = supported(q, k, v, block_m=block_m, block_n=block_n)
    if reason is not None:
        raise ValueError(f"the Gluon forward cannot run this call: {reason}")
    batch, heads, length_q, _ = q.shape
    length_k = seen_length(mask, length_q, k.shape[2])
    blocks_q, blocks_k = indices.shape[-2:]
    tiles = batch * heads * blocks_q
    numbers = (
        scale * LOG2E, tiles, heads, heads // k.shape[1], blocks_q, blocks_k, length_q, length_k,
        mask.offset, site_window(mask),
    )  # fmt: skip
    lengths = (length_q, length_k, length_k, length_q)
    described = tuple(Described.of(x, n) for x, n in zip((q, k, v, o), lengths, strict=True))
    if len(PLANS) >= MOST:
        PLANS.clear()
    PLANS[key] = Plan(described, numbers, min(tiles, processors(q.device)))
    return PLANS[key]


def seen_length(mask: Mask, length_q: int, length_k: int) -> int:
    """Keys up to the last one that any query sees, at least one: the rest is never read."""
    if not mask.causal:
        return length_k
    return max(1, min(length_k, length_q + mask.offset))
