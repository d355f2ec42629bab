"""The op `afbs::attention`: what a rewritten graph calls.

Registered through `torch.library.Library`, whose call costs a half to a third of a `custom_op`'s.
Opaque to Inductor; q, k and v may have any strides, the output is `[B, Lq, Hq, D]` in memory, as
models read it. Where a gradient is needed it calls `afbs::attention_train` of `kernels.train_op`,
which keeps what a backward reads.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from afbs_compile.kernels import dispatch, mask_arguments, refusals, train_op
from afbs_compile.kernels.flops import flops
from afbs_compile.kernels.geometry import Mask
from afbs_compile.kernels.mask_arguments import mask_of
from afbs_compile.kernels.train_op import as_rows

BIAS = 13  # the place of a bias among the arguments after v
LIBRARY: Any = torch.library.Library("afbs", "DEF")  # type: ignore[no-untyped-call]
LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor policy, bool causal, SymInt offset, "
    "int window, float scale, str selector, int min_length, str compensation='none', "
    f"{mask_arguments.SCHEMA}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    causal: bool,
    offset: int,
    window: int,
    scale: float,
    selector: str,
    min_length: int,
    compensation: str = "none",
    *data: Tensor | str | None,
) -> Tensor:
    """Real implementation; arguments as in `kernels.dispatch.attention`.

    `data` is as in `mask_arguments.mask_of`.

    Raises:
        ValueError: Batches of q, k and v, or lengths of k and v, differ.
    """
    if not (q.shape[0] == k.shape[0] == v.shape[0] and k.shape[2] == v.shape[2]):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v are {shapes}; needed: one batch, and k as long as v")

    def call() -> Tensor:
        return as_rows(dispatch.attention(
            q, k, v, policy, mask=Mask(causal, offset, window),
            scale=scale, selector=selector, min_length=min_length, compensation=compensation,
            data=mask_of(data, (q.shape[2], k.shape[2])),
        ))  # fmt: skip

    if data or compensation != "none" or not q.is_cuda:
        return call()
    from afbs_compile.kernels import replay

    site = causal, offset, window, scale, selector, min_length
    return replay.replayed(site, (q, k, v, policy), call)


def attention_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    """Shape, dtype and strides of the result."""
    return train_op.rows_like(q)


def attention_flops(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    v_shape: tuple[int, ...],
    policy_shape: tuple[int, ...],
    causal: bool,
    *rest: Any,
    **keywords: Any,
) -> int:
    """Upper bound for `torch.utils.flop_counter`: the density is known to the device only."""
    return flops(q_shape, k_shape, causal=causal)


def attention_autograd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    causal: bool,
    offset: int,
    window: int,
    scale: float,
    selector: str,
    min_length: int,
    compensation: str = "none",
    *data: Tensor | str | None,
) -> Tensor:
    """Run what needs no gradient below autograd, everything else through the training op.

    Raises:
        RuntimeError: An input needs a gradient on a device or with a compensation without a
            backward, or the bias does.
    """
    site = causal, offset, window, scale, selector
    biased = any(isinstance(x, Tensor) and x.requires_grad for x in data)
    needed = biased or any(x.requires_grad for x in (q, k, v))
    if not (torch.is_grad_enabled() and needed):
        with torch._C._AutoDispatchBelowAutograd(), torch.no_grad():
            run = torch.ops.afbs.attention
            return cast(Tensor, run(q, k, v, policy, *site, min_length, compensation, *data))
    if q.shape[2] < min_length:
        parts = mask_of(data, (q.shape[2], k.shape[2]))
        out = dispatch.dense(q, k, v, mask=Mask(causal, offset, window), scale=scale, data=parts)
        return as_rows(out)
    reason = refusals.no_backward(q.device.type) or refusals.no_compensated_backward(compensation)
    reason = refusals.NO_BIAS_GRADIENT if biased else reason
    if reason is not None:
        raise RuntimeError(
            f"afbs::attention has {reason}: call it under torch.no_grad() or "
            "torch.inference_mode(), or use scaled_dot_product_attention for training"
        )
    return cast(Tensor, torch.ops.afbs.attention_train(q, k, v, policy, *site, *data)[0])


def attention_autocast(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    """As SDPA in an autocast region: q, k, v and a bias in its dtype, the policy as it is."""
    device = q.device.type
    dtype = torch.get_autocast_dtype(device)
    if len(rest) > BIAS and rest[BIAS] is not None:
        rest = (*rest[:BIAS], rest[BIAS].to(dtype), *rest[BIAS + 1 :])
    with torch.autocast(device, enabled=False):
        return cast(Tensor, torch.ops.afbs.attention(*(x.to(dtype) for x in (q, k, v)), *rest))


LIBRARY.impl("attention", attention, "CompositeExplicitAutograd")
LIBRARY.impl("attention", attention_autograd, "Autograd")
for key in ("AutocastCPU", "AutocastCUDA"):
    LIBRARY.impl("attention", attention_autocast, key)
torch.library.register_fake("afbs::attention", attention_fake, lib=LIBRARY)
register_flop_formula(torch.ops.afbs.attention)(attention_flops)
train_op.register(LIBRARY)
