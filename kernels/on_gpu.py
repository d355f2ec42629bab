"""Which of the attention kernels for GPUs runs a call? Gluon's where they fit, else Triton's."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from afbs_compile.kernels.data_mask import DataMask

LOGGER = logging.getLogger(__name__)


def kernel_of(
    device: torch.device, dtype: torch.dtype, head_dim: int, data_mask: bool = False
) -> str:
    """The attention kernel for such calls, in words, and why it is not the fastest one."""
    if device.type != "cuda":
        return "FlexAttention"
    from afbs_compile.kernels import gluon_shim

    reason = gluon_shim.available(device)
    if reason is None and dtype not in (torch.float16, torch.bfloat16):
        reason = f"Gluon takes half precision, not {dtype}"
    if reason is None and head_dim not in (64, 128):
        reason = f"Gluon takes head dims 64 and 128, not {head_dim}"
    if reason is None and data_mask:
        reason = "Gluon takes no mask that depends on data"
    return "Gluon" if reason is None else f"Triton: {reason}"


def gpu_forward(
    q: Tensor, k: Tensor, v: Tensor, *, block_m: int, block_n: int
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The attention kernel for a call on a GPU: Gluon's on Hopper where it fits, else Triton's."""
    from afbs_compile.kernels import gluon_shim, triton_forward

    reason = gluon_shim.available(q.device)
    if reason is None:
        from afbs_compile.kernels import gluon_forward

        reason = gluon_forward.supported(q, k, v, block_m=block_m, block_n=block_n)
        if reason is None:
            return gluon_forward.forward
    LOGGER.debug("Triton instead of Gluon: %s", reason)
    return triton_forward.forward


def gpu_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    block_m: int,
    block_n: int,
    data: DataMask | None = None,
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The gradient kernels for a call on a GPU: Gluon's on Hopper if they fit, else Triton's."""
    from afbs_compile.kernels import gluon_shim, triton_backward

    reason = gluon_shim.available(q.device) if data is None else "a mask that depends on data"
    if reason is None:
        from afbs_compile.kernels import gluon_backward

        reason = gluon_backward.supported(q, k, v, scale=scale, block_m=block_m, block_n=block_n)
        if reason is None:
            return gluon_backward.backward
    LOGGER.debug("Triton's backward instead of Gluon's: %s", reason)
    return triton_backward.backward
