"""What do the Triton kernels share? Constants, the geometry of visible blocks, launch details.

Kernels are written once for sm_80 and later and for the interpreter (`TRITON_INTERPRET=1`), on
Triton 3.6 to 3.9. Integers on the device never go negative before a division: Triton truncates
towards zero, the interpreter floors.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from afbs_compile.kernels import policy_columns as col
from afbs_compile.kernels.geometry import Mask

MODE = tl.constexpr(col.MODE)
TAU = tl.constexpr(col.TAU)
THETA = tl.constexpr(col.THETA)
LAMBDA = tl.constexpr(col.LAMBDA)
WINDOW = tl.constexpr(col.WINDOW)
SINK = tl.constexpr(col.SINK)
NEIGHBOURS = tl.constexpr(col.NEIGHBOURS)
BUDGET = tl.constexpr(col.BUDGET)
COLUMNS = tl.constexpr(col.COLUMNS)
SPARSE = tl.constexpr(col.SPARSE)
WINDOWED = tl.constexpr(col.WINDOWED)

# arguments that change from call to call: a new length must not compile a new kernel
LENGTHS = ["heads", "group", "length_q", "length_k", "blocks_q", "blocks_k", "offset", "window"]
HERE = contextlib.nullcontext()
LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite: exp2(-inf - LOWEST) is 0, not NaN
UNLIMITED = 1 << 30  # window of a site without one; leaves room for offsets in int32


@triton.jit
def first_block(key, length, BLOCK: tl.constexpr):
    """Index of the first block that holds a position >= `key`; the block count if none does."""
    return tl.where(key < length, tl.maximum(key, 0) // BLOCK, tl.cdiv(length, BLOCK))


@triton.jit
def end_block(key, length, BLOCK: tl.constexpr):
    """One past the last block that holds a position <= `key`."""
    end = tl.minimum(tl.maximum(key, 0) // BLOCK + 1, tl.cdiv(length, BLOCK))
    return tl.where(key < 0, 0, end)


@triton.jit
def gate_of(policy):
    """Self-similarity below which the head of a policy row is gated; a budget has no gate."""
    return tl.where(tl.load(policy + BUDGET) > 0.0, -1.0, tl.load(policy + THETA))


def interpreted() -> bool:
    """Whether Triton kernels run in the interpreter (fixed when Triton is imported)."""
    return bool(triton.knobs.runtime.interpret)


def site_window(mask: Mask) -> int:
    """The site's window as the kernels take it: a number, also where there is none."""
    return mask.window or UNLIMITED


def rows_contiguous(x: Tensor) -> Tensor:
    """`x` itself if its last stride is 1, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the device of `x` the current one: Triton launches on the current device."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return HERE
    return torch.cuda.device(x.device)


@functools.cache
def shared_memory_bytes(device: torch.device) -> int:
    """Shared memory one program may use on `device`; that of an sm_86 for the interpreter."""
    if device.type != "cuda":
        return 101_376
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return int(properties["max_shared_mem"])
