"""May a kernel read a tensor through TMA, in boxes of rows, and how is that described?

Hopper's copy engine computes the addresses: a kernel keeps no pointers in registers. It needs
strides and addresses in multiples of 16 bytes; what it cannot read is read through pointers.
"""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from afbs_compile.kernels.launch import TmaView, again, first, has_copy_engine, prepared
from afbs_compile.kernels.triton_common import on_device

ALIGNMENT = 16  # bytes, of addresses and strides


def readable(x: Tensor) -> bool:
    """Whether TMA can read `[B, H, L, D]`, D a power of two, on the device where it lies."""
    steps = [step for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    return (
        has_copy_engine(x.device)
        and x.stride(-1) == 1
        and x.shape[-1] & (x.shape[-1] - 1) == 0
        and x.data_ptr() % ALIGNMENT == 0
        and all(step > 0 and step * x.element_size() % ALIGNMENT == 0 for step in steps)
    )


class Box(NamedTuple):
    """`[B, H, L, D]`, read `rows` rows at a time; zeros beyond the last one."""

    x: Tensor
    rows: int

    def strides(self) -> list[int]:
        """In elements; that of an axis of one element is never used, and need not be valid."""
        x, head_dim = self.x, self.x.shape[-1]
        steps = zip(x.shape[:-1], x.stride()[:-1], strict=True)
        return [*(step if size > 1 else head_dim for size, step in steps), 1]

    def descriptor(self) -> TensorDescriptor:
        """As a kernel's first launch takes it."""
        shape = list(self.x.shape)
        return TensorDescriptor(self.x, shape, self.strides(), [1, 1, self.rows, shape[-1]])

    def view(self) -> TmaView:
        """As a compiled kernel takes it."""
        return TmaView(self.x.data_ptr(), self.x.shape, self.strides())


def launch(
    kernel: Any, key: Hashable, x: Tensor, programs: int, arguments: Sequence[Any],
    **constants: Any,
) -> None:  # fmt: skip
    """Launch where `x` lies, from the second time on at little host cost.

    Args:
        kernel: See `kernels.launch.first`, for the other arguments too.
        key: All that the choice of the compiled kernel depends on beside the device.
        x: Any tensor on the device.
        programs: Size of the grid.
        arguments: A `Box` becomes a TMA descriptor.
        constants: Constants, then Triton's options.
    """
    with on_device(x):
        place = kernel, x.device.index, key
        made = prepared(place) if x.is_cuda else None
        if made is None:
            described = [x.descriptor() if isinstance(x, Box) else x for x in arguments]
            first(kernel, place, programs, described, **constants)
        else:
            viewed = [x.view() if isinstance(x, Box) else x for x in arguments]
            again(made, x.device.index, programs, viewed)
