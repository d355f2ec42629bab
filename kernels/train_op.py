"""The ops behind a gradient of `afbs::attention`: `attention_train` and `attention_backward`.

Autograd is registered with the ops, so AOTAutograd traces both into the graphs it compiles. Which
blocks are kept is a constant: no gradient goes through the selection, the policy gets none.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from afbs_compile.kernels import dispatch
from afbs_compile.kernels.blind import blind_gradients, blinded
from afbs_compile.kernels.flops import flops
from afbs_compile.kernels.geometry import Mask
from afbs_compile.kernels.mask_arguments import SCHEMA, mask_of
from afbs_compile.kernels.policy_columns import LAMBDA

SITE = "Tensor policy, bool causal, SymInt offset, int window, float scale"
TRAIN = (
    f"attention_train(Tensor q, Tensor k, Tensor v, {SITE}, str selector, {SCHEMA})"
    " -> (Tensor o, Tensor lse, Tensor counts, Tensor indices)"
)
BACKWARD = (
    "attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
    f"Tensor counts, Tensor indices, {SITE}, {SCHEMA}) -> (Tensor dq, Tensor dk, Tensor dv)"
)
BIAS = 11  # the place of a bias among the arguments of `attention_train` after v
Gradients = tuple[Tensor, Tensor, Tensor]
Saved = tuple[Tensor, Tensor, Tensor, Tensor]


def rows_like(x: Tensor) -> Tensor:
    """Empty `[B, H, L, D]` over `[B, L, H, D]` memory."""
    batch, heads, length, head_dim = x.shape
    return x.new_empty((batch, length, heads, head_dim)).transpose(1, 2)


def train(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    causal: bool,
    offset: int,
    window: int,
    scale: float,
    selector: str,
    *data: Tensor | str | None,
) -> Saved:
    """Forward; results as in `dispatch.select_and_attend`. No head skips by lambda.

    The backward takes every listed block for visited. `data` is as in `mask_arguments.mask_of`.
    """
    policy = policy.clone()
    policy[:, LAMBDA] = -math.inf
    mask, parts = Mask(causal, offset, window), mask_of(data, (q.shape[2], k.shape[2]))
    o, lse, counts, indices = dispatch.select_and_attend(
        q, k, v, policy, mask=mask, scale=scale, selector=selector, data=parts
    )
    o = blinded(o, v, parts, mask)
    # selection may put both lists into one memory; an op's results must have each their own
    return as_rows(o), lse.contiguous(), counts.clone(), indices.clone()


def train_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Saved:
    """Shapes, dtypes and strides of the results."""
    batch, heads, length_q, _ = q.shape
    block_m, block_n = dispatch.block_sizes(q.device.type)
    blocks_q, blocks_k = -(-length_q // block_m), -(-k.shape[2] // block_n)
    biased = len(rest) > BIAS and rest[BIAS] is not None
    parts = (2,) if biased else ()
    return (
        rows_like(q),
        q.new_empty((*parts, batch, heads, length_q), dtype=torch.float32),
        q.new_empty((batch, heads, blocks_q), dtype=torch.int32),
        q.new_empty((batch, heads, blocks_q, blocks_k), dtype=torch.int32),
    )


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
    causal: bool,
    offset: int,
    window: int,
    scale: float,
    *data: Tensor | str | None,
) -> Gradients:
    """Gradients; arguments as in `dispatch.backward`, `data` as in `mask_arguments.mask_of`."""
    mask, parts = Mask(causal, offset, window), mask_of(data, (q.shape[2], k.shape[2]))
    with torch.autocast(q.device.type, enabled=False):  # a backward may be called in a region
        found = dispatch.backward(
            do, q, k, v, o, lse, counts, indices, policy, mask=mask, scale=scale, data=parts
        )
        dq, dk, dv = blind_gradients(found, do, q, k, v, parts, mask, scale)
    return as_rows(dq), as_rows(dk), as_rows(dv)


def as_rows(x: Tensor) -> Tensor:
    """`x` itself if its memory is `[B, L, H, D]`, else a copy that is."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def backward_fake(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Gradients:
    """Shapes, dtypes and strides of the results."""
    return rows_like(q), rows_like(k), rows_like(v)


def keep(ctx: Any, inputs: tuple[Any, ...], output: Saved) -> None:
    """Save what the backward reads."""
    q, k, v, policy, causal, offset, window, scale, _, *data = inputs
    *masks, blind, bias = data
    ctx.save_for_backward(q, k, v, *output, policy, *masks, bias)
    ctx.site, ctx.blind = (causal, offset, window, scale), blind
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros as large as the lists, for nobody


def differentiate(ctx: Any, do: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
    """Gradients of q, k and v where they are wanted; none of the policy, the site, the mask."""
    none = (None,) * (len(ctx.needs_input_grad) - 3)
    if do is None:
        return (None, None, None, *none)
    *tensors, keys, q_segments, k_segments, elements, bias = ctx.saved_tensors
    found = torch.ops.afbs.attention_backward(
        do, *tensors, *ctx.site, keys, q_segments, k_segments, elements, ctx.blind, bias
    )
    wanted = zip(cast(Gradients, found), ctx.needs_input_grad, strict=False)
    return (*(x if needed else None for x, needed in wanted), *none)


def differentiate_twice(ctx: Any, *gradients: Tensor) -> None:
    """There is no backward of the backward.

    Raises:
        RuntimeError: Always.
    """
    raise RuntimeError(
        "afbs::attention cannot be differentiated twice: use scaled_dot_product_attention "
        "(with the math backend) where a gradient of a gradient is needed"
    )


def train_flops(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    v_shape: tuple[int, ...],
    policy_shape: tuple[int, ...],
    causal: bool,
    *rest: Any,
    **keywords: Any,
) -> int:
    """Upper bound, as `attention_flops`."""
    return flops(q_shape, k_shape, causal=causal)


def backward_flops(
    do_shape: tuple[int, ...], q_shape: tuple[int, ...], k_shape: tuple[int, ...],
    v_shape: tuple[int, ...], o_shape: tuple[int, ...], lse_shape: tuple[int, ...],
    counts_shape: tuple[int, ...], indices_shape: tuple[int, ...],
    policy_shape: tuple[int, ...], causal: bool, *rest: Any, **keywords: Any,
) -> int:  # fmt: skip
    """Upper bound: five matrix products where the forward has two."""
    return 5 * flops(q_shape, k_shape, causal=causal) // 2


def register(library: Any) -> None:
    """Define both ops in the library `afbs`."""
    for schema in (TRAIN, BACKWARD):
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("attention_train", train, "CompositeExplicitAutograd")
    library.impl("attention_backward", backward, "CompositeExplicitAutograd")
    torch.library.register_fake("afbs::attention_train", train_fake, lib=library)
    torch.library.register_fake("afbs::attention_backward", backward_fake, lib=library)
    torch.library.register_autograd(
        "afbs::attention_train", differentiate, setup_context=keep, lib=library
    )
    torch.library.register_autograd("afbs::attention_backward", differentiate_twice, lib=library)
    register_flop_formula(torch.ops.afbs.attention_train)(train_flops)
    register_flop_formula(torch.ops.afbs.attention_backward)(backward_flops)
