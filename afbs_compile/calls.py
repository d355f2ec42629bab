"""May a call that no graph shows run sparse? The rules of `passes.guard`, for real tensors."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from afbs_compile.kernels.refusals import no_data_mask
from afbs_compile.options import disabled
from afbs_compile.passes import guard


def refusal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout_p: float,
    enable_gqa: bool,
    min_length: int,
    compensation: str = "none",
    masked: bool = False,
) -> str | None:
    """Why this call must stay SDPA, or None if the op takes it.

    `masked` tells whether a mask comes with the call that depends on data.

    While a graph is traced, lengths are not looked at: the op compares them when it runs.
    """
    tensors = [q, k, v]
    reason = None
    if disabled():
        reason = "AFBS_DISABLE is set"
    elif dropout_p != 0:
        reason = "dropout"
    elif not torch.compiler.is_compiling():
        reason = transformed(tensors)
    reason = (
        reason
        or guard.shape_refusal(enable_gqa, tensors)
        or guard.dtype_refusal(tensors)
        or guard.gradient_refusal(tensors, compensation)
        or (no_data_mask(compensation) if masked else None)
    )
    if reason is None and not torch.compiler.is_compiling():
        return guard.length_refusal(q.shape[2], min_length)
    return reason


def transformed(tensors: list[Tensor]) -> str | None:
    """Tensors that stand for others, which no kernel can read."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "inside vmap"
    if any(x.is_nested for x in tensors):
        return "nested tensors"
    if forward_ad._current_level >= 0 and any(map(has_tangent, tensors)):
        return "forward-mode derivatives"
    return None


def has_tangent(x: Tensor) -> bool:
    """Does a forward-mode derivative travel with the tensor?"""
    return forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]
