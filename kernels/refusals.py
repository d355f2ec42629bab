"""What can no kernel run, and why? Reasons in words, or None."""

import torch

HEAD_DIMS = range(32, 257)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NO_BIAS_GRADIENT = "no gradient of a mask that is added to the scores"


def unsupported(device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why no kernel can run such a call, or None if one can."""
    if device_type not in ("cpu", "cuda"):
        return f"no kernel for device type {device_type!r}"
    if dtype not in DTYPES:
        return f"no kernel for dtype {dtype}"
    if not HEAD_DIMS.start <= head_dim < HEAD_DIMS.stop:  # `in` will not do for a SymInt
        return f"head dim {head_dim} is outside {HEAD_DIMS.start}..{HEAD_DIMS.stop - 1}"
    return None


def no_data_mask(compensation: str) -> str | None:
    """Why calls whose mask depends on data cannot run, or None if they can."""
    if compensation != "none":
        return f"no masks that depend on data with compensation {compensation!r}"
    return None


def no_compensated_backward(compensation: str) -> str | None:
    """Why calls with a compensation cannot be differentiated, or None if they can."""
    return None if compensation == "none" else f"no backward with compensation {compensation!r}"


def no_backward(device_type: str) -> str | None:
    """Why calls on a device cannot be differentiated, or None if they can."""
    known = device_type in ("cpu", "cuda")
    return None if known else f"no backward on {device_type.upper()}"
