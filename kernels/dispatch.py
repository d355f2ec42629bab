"""Which kernel runs a call, and with which blocks?

| device | selection | attention | blocks |
|---|---|---|---|
| CPU | compiled torch | FlexAttention; `kernels.pairs` with gradients or a bias | 64 × 64 |
| Hopper, Triton 3.6 to 3.8 | Triton | Gluon for half precision, head dim 64 or 128 | 128 × 64 |
| other CUDA | Triton | Triton | 128 × 64 |
Masks that depend on data and biases run in Triton's attention everywhere.
Calls shorter than `min_length` go to SDPA: there is nothing to win. The choice depends on sizes
and device only, which the host knows: no synchronisation.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from afbs_compile.kernels import compensation as tangents
from afbs_compile.kernels import flex, pairs, selection
from afbs_compile.kernels.bias import added
from afbs_compile.kernels.blind import blinded
from afbs_compile.kernels.data_mask import DataMask, MaskedBlocks, blocked
from afbs_compile.kernels.fused import fused
from afbs_compile.kernels.geometry import Mask, site_tokens
from afbs_compile.kernels.on_gpu import gpu_backward, gpu_forward
from afbs_compile.kernels.refusals import no_data_mask
from afbs_compile.kernels.scores import sub_scores


def block_sizes(device_type: str) -> tuple[int, int]:
    """`(block_m, block_n)` in tokens that the kernels of a device use."""
    return (128, 64) if device_type == "cuda" else (64, 64)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    *,
    mask: Mask,
    scale: float,
    selector: str,
    min_length: int = 0,
    compensation: str = "none",
    data: DataMask | None = None,
) -> Tensor:
    """Select blocks, then attend over them.

    Args:
        q: `[B, Hq, Lq, D]`.
        k: `[B, Hkv, Lk, D]`, Hq a multiple of Hkv.
        v: `[B, Hkv, Lk, D]`.
        policy: float32 `[Hq, COLUMNS]` on the device of q.
        mask: The site's mask.
        scale: Multiplier on q·k.
        selector: `sub8`, `sub4` or `mean`.
        min_length: Below this many queries the call is dense.
        compensation: What stands for a dropped block: `none` or `tangent`.
        data: The part of the mask that comes with the call.

    Returns:
        `o` `[B, Hq, Lq, D]` in q's dtype. A row that sees nothing is 0, as SDPA's, or what
        `data.blind` says.

    Raises:
        ValueError: For an unknown selector or compensation, or a compensation with `data`.
    """
    tangent = tangents.known(compensation) == "tangent"
    if q.shape[2] < min_length:
        return dense(q, k, v, mask=mask, scale=scale, data=data)
    if data is not None and (reason := no_data_mask(compensation)):
        raise ValueError(f"afbs::attention has {reason}: use scaled_dot_product_attention")
    if q.device.type == "cuda":
        o, lse, counts, indices = select_and_attend(
            q, k, v, policy, mask=mask, scale=scale, selector=selector, data=data
        )
        if tangent:
            return compensated(o, lse, q, k, v, counts, indices, policy, mask, scale)
    else:
        o, _ = on_cpu(q, k, v, policy, mask, scale, selector, tangent, data)
    return blinded(o, v, data, mask)


def on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    mask: Mask,
    scale: float,
    selector: str,
    tangent: bool,
    data: DataMask | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention` without a GPU: `o`, and how many blocks each query block visited."""
    site = site_of(q, mask, scale)
    masked, counts, indices = chosen(q, k, policy, selector, data, site)
    tensors = q, k, v, counts, indices, policy
    beside = tangents.attend(*tensors, **site) if tangent else None
    if data is not None and data.bias is not None:  # Inductor gets a `score_mod` wrong that reads
        return pairs.forward(*tensors, data=data, **site)[0], counts
    return flex.forward(*tensors, beside=beside, masked=masked, **site), counts


def site_of(q: Tensor, mask: Mask, scale: float) -> dict[str, Any]:
    """What kernels are told of a site beside its tensors."""
    block_m, block_n = block_sizes(q.device.type)
    return {"mask": mask, "scale": scale, "block_m": block_m, "block_n": block_n}


def chosen(
    q: Tensor,
    k: Tensor,
    policy: Tensor,
    selector: str,
    data: DataMask | None,
    site: dict[str, Any],
) -> tuple[MaskedBlocks | None, Tensor, Tensor]:
    """Selection without a GPU: what a data mask makes of the blocks, and the block lists."""
    sizes = {"block_m": site["block_m"], "block_n": site["block_n"]}
    masked = blocked(data, site["mask"], q.shape[2], k.shape[2], **sizes)
    core = fused_scores(q, k, selector, masked)
    return masked, *selection.select(q, k, policy, selector=selector, core=core, masked=masked,
                                     **site)  # fmt: skip


def select_and_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    *,
    mask: Mask,
    scale: float,
    selector: str,
    data: DataMask | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`attention` with what its backward needs beside o.

    Returns:
        `o` in which blind rows are 0, `lse` fp32 `[B, Hq, Lq]`, with a bias `[2, B, Hq, Lq]` (see
        `triton_forward.forward`), and the block lists `counts` and `indices`.
    """
    site = site_of(q, mask, scale)
    if by_pairs(q.device.type):
        _, counts, indices = chosen(q, k, policy, selector, data, site)
        o, lse = pairs.forward(q, k, v, counts, indices, policy, data=data, **site)
        return o, lse, counts, indices
    from afbs_compile.kernels import triton_selection

    counts, indices, counter = triton_selection.select_counted(
        q, k, policy, selector=selector, data=data, **site
    )
    more: dict[str, Tensor | DataMask] = {"counter": counter}
    if data is None:
        run = gpu_forward(q, k, v, block_m=site["block_m"], block_n=site["block_n"])
    else:
        from afbs_compile.kernels import triton_forward

        run, more = triton_forward.forward, {"data": data}
    o, lse = run(q, k, v, counts, indices, policy, **more, **site)
    return o, lse, counts, indices


def compensated(
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    policy: Tensor,
    mask: Mask,
    scale: float,
) -> Tensor:
    """What `select_and_attend` returns, with the tangents of the dropped blocks taken in."""
    from afbs_compile.kernels import triton_compensation

    site = site_of(q, mask, scale)
    return triton_compensation.compensate(o, lse, q, k, v, counts, indices, policy, **site)[0]


def by_pairs(device_type: str) -> bool:
    """Do calls that need gradients go through `kernels.pairs` rather than Triton?"""
    return device_type == "cpu"


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
    data: DataMask | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `select_and_attend` with its blocks held fixed: `dq`, `dk`, `dv`.

    What blind rows hold in `o` counts for nothing: their gradients are `blind.blind_gradients`.
    """
    run = pairs.backward
    if not by_pairs(q.device.type):
        block_m, block_n = block_sizes(q.device.type)
        run = gpu_backward(q, k, v, scale=scale, data=data, block_m=block_m, block_n=block_n)
    more: dict[str, Any] = {} if data is None else {"data": data}
    return run(do, q, k, v, o, lse, counts, indices, policy, **more, **site_of(q, mask, scale))


def fused_scores(
    q: Tensor, k: Tensor, selector: str, masked: MaskedBlocks | None = None
) -> Callable[..., Tensor]:
    """`scores.sub_scores` fused by Inductor, once for all lengths."""
    kind = (min(q.shape[0], 2), q.shape[1], k.shape[1], q.shape[3], selector)
    if masked is None:
        return fused(sub_scores, kind)
    shared = (n == 1 for n in masked.some.shape[:2])
    return fused(sub_scores, (*kind, *shared, masked.level is None))


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float,
    data: DataMask | None = None,
) -> Tensor:
    """SDPA under the whole mask; what a sparse call is measured against."""
    causal = mask.causal and mask.offset == 0 and not mask.window and data is None
    attn_mask = None
    if mask.causal and not causal:
        i = torch.arange(q.shape[2], device=q.device)
        j = torch.arange(k.shape[2], device=q.device)
        attn_mask = site_tokens(mask, i, j)
    if data is not None:
        tokens = data.tokens(0, q.shape[2])
        attn_mask = tokens if attn_mask is None else tokens & attn_mask
        if data.bias is not None:
            attn_mask = added(attn_mask, data.bias, q)
    o = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return blinded(o, v, data, mask)
