"""How does a GPU attend with one query over a cache? Split-K decoding in Triton, sm_80 and later.

A program serves all query heads of a KV head over one share of its live rows; a second launch
joins the shares by their lse (Flash-Decoding, Dao et al. 2023; lse in base 2). How many shares a
head has, and how long they are, follows from its live rows alone, on the device, and nothing is
read that is not live. `work` lists the shares that there can be, those of long heads first: an
idle program costs as much as one that reads a kilobyte. The oracle is `kernels.decode`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from afbs_compile.kernels.launch import aligned, launch
from afbs_compile.kernels.triton_common import (
    LOG2E,
    LOWEST,
    interpreted,
    on_device,
    shared_memory_bytes,
)
from afbs_compile.kernels.triton_forward import load_rows, softmax_step

LEAST = 256  # rows of a share, at least: fewer are not worth a program
TOGETHER = tl.constexpr(16)  # shares that are joined at a time
SIZES = ["stride_qb", "stride_qh", "rows", "batch", "kv_heads", "splits"]


@triton.jit
def share(live, splits, LEAST: tl.constexpr, TILE_N: tl.constexpr):
    """Rows of a share: whole tiles, in no more than `splits` shares of `LEAST` rows or more."""
    count = tl.maximum(tl.minimum(tl.cdiv(live, LEAST), splits), 1)
    return tl.maximum(tl.cdiv(tl.cdiv(live, count), TILE_N), 1) * TILE_N


@triton.jit(do_not_specialize=SIZES)
def decode_kernel(
    Q, K, V, PARTS, LSE, BASES, SLOTS, LENGTHS, WORK, scale_log2,
    stride_qb, stride_qh, rows, batch, kv_heads, splits,
    D: tl.constexpr, D_PADDED: tl.constexpr, GROUP: tl.constexpr, TILE_G: tl.constexpr,
    TILE_N: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """One share of one KV head: normalised output and lse (base 2) of its query heads."""
    pid = tl.program_id(0)
    item = tl.load(WORK + pid // batch)
    split = item % splits
    h = item // splits
    b = (pid % batch).to(tl.int64)
    live = tl.minimum(tl.load(LENGTHS + b), tl.load(SLOTS + h))
    long = share(live, splits, LEAST, TILE_N)
    start = split * long
    if start < live:
        end = tl.minimum(start + long, live)
        whole = start + (end - start) // TILE_N * TILE_N
        d = tl.arange(0, D_PADDED)
        g = tl.arange(0, TILE_G)
        q_rows = Q + b * stride_qb + (h * GROUP + g).to(tl.int64)[:, None] * stride_qh
        q_mask = (g < GROUP)[:, None] & (d < D)[None, :]
        q = tl.load(q_rows + d[None, :], mask=q_mask, other=0.0)
        head = b * rows + tl.load(BASES + h)  # int64: a cache may hold more than 2^31 numbers
        total = tl.zeros([TILE_G], tl.float32)
        top = tl.full([TILE_G], LOWEST, tl.float32)
        acc = tl.zeros([TILE_G, D_PADDED], tl.float32)
        for n0 in range(start, whole, TILE_N):
            n_rows = (head + n0 + tl.arange(0, TILE_N))[:, None] * D
            k = load_rows(K + n_rows, d, D, D_PADDED)
            v = load_rows(V + n_rows, d, D, D_PADDED)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            total, top, acc = softmax_step(s, v, total, top, acc, scale_log2)
        if whole < end:
            n = whole + tl.arange(0, TILE_N)
            n_rows = (head + n)[:, None] * D
            kv_mask = (n < end)[:, None] & (d < D)[None, :]
            k = tl.load(K + n_rows + d[None, :], mask=kv_mask, other=0.0)
            v = tl.load(V + n_rows + d[None, :], mask=kv_mask, other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            s = tl.where((n < end)[None, :], s, -float("inf"))
            total, top, acc = softmax_step(s, v, total, top, acc, scale_log2)
        part = ((b * kv_heads + h) * GROUP + g) * splits + split
        tl.store(LSE + part, top + tl.log2(total), mask=g < GROUP)
        tl.store(PARTS + part[:, None] * D + d[None, :], acc / total[:, None], mask=q_mask)


@triton.jit(do_not_specialize=["kv_heads", "splits"])
def join_kernel(
    PARTS, LSE, O, SLOTS, LENGTHS, kv_heads, splits,
    D: tl.constexpr, D_PADDED: tl.constexpr, GROUP: tl.constexpr, TILE_N: tl.constexpr,
    LEAST: tl.constexpr,
):  # fmt: skip
    """The shares of one query head, weighted by their lse; 0 where nothing is live."""
    row = tl.program_id(0).to(tl.int64)  # b * heads + query head
    h = row // GROUP % kv_heads
    live = tl.minimum(tl.load(LENGTHS + row // GROUP // kv_heads), tl.load(SLOTS + h))
    count = tl.cdiv(live, share(live, splits, LEAST, TILE_N))
    d = tl.arange(0, D_PADDED)
    total = 0.0
    top = LOWEST
    acc = tl.zeros([D_PADDED], tl.float32)
    for s0 in range(0, count, TOGETHER):
        s = s0 + tl.arange(0, TOGETHER)
        lse = tl.load(LSE + row * splits + s, mask=s < count, other=-float("inf"))
        top_new = tl.maximum(top, tl.max(lse, 0))
        weight = tl.exp2(lse - top_new)
        shrink = tl.exp2(top - top_new)
        mask = (s < count)[:, None] & (d < D)[None, :]
        parts = tl.load(PARTS + (row * splits + s)[:, None] * D + d[None, :], mask=mask, other=0.0)
        total = total * shrink + tl.sum(weight, 0)
        acc = acc * shrink + tl.sum(parts * weight[:, None], 0)
        top = top_new
    acc = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(O + row * D + d, acc.to(O.dtype.element_ty), mask=d < D)


def tiling(head_dim: int, itemsize: int, shared_bytes: int) -> tuple[int, int, int]:
    """`(tile_n, num_warps, num_stages)`: rows of a tile, and tiles that are under way at a time.

    fp32 runs on the FMA units, whose operands stay in registers: it takes more warps.
    """
    tile_n = 64 if itemsize < 4 else 32
    while tile_n > 16 and 4 * tile_n * head_dim * itemsize > shared_bytes:
        tile_n //= 2
    stages = shared_bytes // (2 * tile_n * head_dim * itemsize)
    return tile_n, 8 if itemsize == 4 else 4, max(1, min(3, stages))


def decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    bases: Tensor,
    slots: Tensor,
    lengths: Tensor,
    work: Tensor,
    *,
    scale: float,
    splits: int,
) -> Tensor:
    """Attention of one query a head; no host synchronisation, can be captured in a CUDA graph.

    Arguments and result as in `kernels.decode.decode`.
    """
    if scale <= 0:  # the online softmax takes maxima before it scales
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    dtype = q.dtype
    if interpreted() and dtype == torch.bfloat16:  # the interpreter's bf16 tl.dot is wrong
        q, keys, values = q.float(), keys.float(), values.float()
    if q.stride(3) != 1:
        q = q.contiguous()
    batch, heads, _, dim = q.shape
    kv_heads = len(slots)
    group, padded = heads // kv_heads, max(16, triton.next_power_of_2(dim))
    tile_n, warps, stages = tiling(padded, q.element_size(), shared_memory_bytes(q.device))
    parts = torch.empty(batch, heads, splits, dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, heads, splits, dtype=torch.float32, device=q.device)
    o = torch.empty(batch, heads, 1, dim, dtype=q.dtype, device=q.device)
    shape = {"D": dim, "D_PADDED": padded, "GROUP": group}
    kind = (q.device, q.dtype, tuple(shape.values()))
    with on_device(q):
        launch(
            decode_kernel, ("decode", *kind, aligned(q, keys, values)), q.device,
            batch * len(work),
            (q, keys, values, parts, lse, bases, slots, lengths, work, scale * LOG2E,
             q.stride(0), q.stride(1), keys.shape[1], batch, kv_heads, splits),
            **shape, TILE_G=max(16, triton.next_power_of_2(group)), TILE_N=tile_n, LEAST=LEAST,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        launch(
            join_kernel, ("join", *kind), q.device, batch * heads,
            (parts, lse, o, slots, lengths, kv_heads, splits),
            **shape, TILE_N=tile_n, LEAST=LEAST, num_warps=4,
        )  # fmt: skip
    return o.to(dtype)
