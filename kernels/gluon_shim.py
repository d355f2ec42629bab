"""Can Gluon, Triton's low-level language for one GPU generation, run here? If not, why?

Gluon ships inside Triton (`triton.experimental.gluon`) and changes between its releases: 3.5 has
another `warp_specialize`, 3.9 renames the TMA copies. The kernel is written for what lies between.
"""

import functools

import torch

KNOWN_TO_WORK = ((3, 6), (3, 7), (3, 8))
HOPPER = (9, 0)


def available(device: torch.device | None = None) -> str | None:
    """Why the Gluon kernel cannot run on `device`, or None if it can.

    Args:
        device: Where the tensors live; None is the current CUDA device.

    Returns:
        None, or the reason in words.
    """
    if not torch.cuda.is_available():
        return "no CUDA device"
    if device is not None and device.type != "cuda":
        return f"no Gluon for device type {device.type!r}"
    index = None if device is None else device.index
    return unusable_device(torch.cuda.current_device() if index is None else index)


@functools.cache
def unusable_device(index: int) -> str | None:
    """Why the Gluon kernel cannot run on CUDA device `index`, or None if it can."""
    capability = torch.cuda.get_device_capability(index)
    if capability != HOPPER:
        return "the Gluon kernel is for sm_90, not sm_{}{}".format(*capability)
    return unusable_triton()


@functools.cache
def unusable_triton() -> str | None:
    """Why the installed Triton cannot compile the Gluon kernel, or None if it can."""
    try:
        import triton
    except ImportError:
        return "Triton is not installed"
    major, minor = triton.__version__.split(".")[:2]
    if (int(major), int(minor)) not in KNOWN_TO_WORK:
        return f"the Gluon kernel is for Triton 3.6 to 3.8, not {triton.__version__}"
    return None
