"""The op `afbs::attention`: what a rewritten graph calls.

Registered through `torch.library.Library`, whose call costs a half to a third of a `custom_op`'s.
Opaque to Inductor; q, k and v may have any strides, the output is `[B, Lq, Hq, D]` in memory, as
models read it. There is no backward yet: the pass leaves calls that need gradients dense.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from afbs_compile.kernels import dispatch
from afbs_compile.kernels.geometry import Mask

LIBRARY: Any = torch.library.Library("afbs", "DEF")  # type: ignore[no-untyped-call]
LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor policy, bool causal, SymInt offset, "
    "int window, float scale, str selector, int min_length) -> Tensor",
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
) -> Tensor:
    """Real implementation; arguments as in `kernels.dispatch.attention`."""
    out = dispatch.attention(
        q, k, v, policy, mask=Mask(causal, offset, window),
        scale=scale, selector=selector, min_length=min_length,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def attention_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    """Shape, dtype and strides of the result."""
    batch, heads, length = q.shape[:3]
    return q.new_empty((batch, length, heads, v.shape[-1])).transpose(1, 2)


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
    return dispatch.flops(q_shape, k_shape, causal=causal)


def attention_autograd(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    """Refuse what would need a backward, run everything else below autograd.

    Raises:
        RuntimeError: An input needs a gradient.
    """
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise RuntimeError(
            "afbs::attention has no backward yet: call it under torch.no_grad() or "
            "torch.inference_mode(), or use scaled_dot_product_attention for training"
        )
    with torch._C._AutoDispatchBelowAutograd(), torch.no_grad():
        return cast(Tensor, torch.ops.afbs.attention(q, k, v, *rest))


LIBRARY.impl("attention", attention, "CompositeExplicitAutograd")
LIBRARY.impl("attention", attention_autograd, "Autograd")
torch.library.register_fake("afbs::attention", attention_fake, lib=LIBRARY)
register_flop_formula(torch.ops.afbs.attention)(attention_flops)
