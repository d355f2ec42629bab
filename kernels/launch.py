"""How does a kernel start at little host cost? From a compiled kernel that an earlier call made.

Triton binds, specialises and looks up every argument at every launch: 30 to 100 µs. What decides
the compiled kernel (dtypes, constants, the alignment of pointers, the values of integers) is known
to the caller, who passes it as a key; later launches hand their arguments to the compiled kernel.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

MOST = 4096  # prepared launches; lengths that never come back must not fill the memory
ALIGNMENT = 16  # bytes; Triton compiles one kernel for aligned pointers and one for others
PREPARED: dict[Hashable, Any] = {}
WATCH = threading.local()  # `note` is told of this thread's launches


@contextlib.contextmanager
def watching(note: Callable[[Any, int, Sequence[Any]], None]) -> Iterator[None]:
    """Tell `note` of every launch of this thread: what `prepared` gave, programs, arguments."""
    WATCH.note = note
    try:
        yield
    finally:
        WATCH.note = None


def tell(made: Any, programs: int, arguments: Sequence[Any]) -> None:
    """Tell who watches of a launch; `made` is None for a kernel that Triton launches."""
    note = getattr(WATCH, "note", None)
    if note is not None:
        note(made, programs, arguments)


class TmaView:
    """What a compiled kernel asks of a TMA descriptor: where, how large, how far apart.

    Unlike `TensorDescriptor` it checks nothing and keeps no tensor alive.
    """

    __slots__ = ("address", "padding", "round_f32_to_tf32", "shape", "strides")

    def __init__(self, address: int, shape: Sequence[int], strides: Sequence[int]) -> None:
        """A view of `shape` with `strides` in elements, from byte `address` on."""
        self.address = address
        self.shape = shape
        self.strides = strides
        self.padding = "zero"
        self.round_f32_to_tf32 = False

    @property
    def base(self) -> "TmaView":
        """The tensor; all that is asked of it is `data_ptr`."""
        return self

    def data_ptr(self) -> int:
        """Byte address of the first element."""
        return self.address


class Boxed(NamedTuple):
    """A contiguous matrix `[N, D]` that a kernel reads `rows` rows at a time through TMA."""

    x: Tensor
    rows: int

    def descriptor(self) -> TensorDescriptor:
        """As a kernel's first launch takes it."""
        return TensorDescriptor(
            self.x, list(self.x.shape), list(self.x.stride()), [self.rows, self.x.shape[1]]
        )

    def view(self) -> TmaView:
        """As a compiled kernel takes it."""
        return TmaView(self.x.data_ptr(), self.x.shape, self.x.stride())


@functools.cache
def has_copy_engine(device: torch.device) -> bool:
    """Whether a device has TMA: sm_90 and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def aligned(*tensors: Tensor) -> bool:
    """Whether all tensors start at a multiple of 16 bytes."""
    together = 0
    for x in tensors:
        together |= x.data_ptr()
    return together % ALIGNMENT == 0


def described(x: Tensor) -> tuple[Hashable, ...]:
    """All of a tensor that may decide which compiled kernel reads it."""
    return x.dtype, x.shape, x.stride(), aligned(x)


def prepared(key: Hashable) -> Any:
    """The compiled kernel of an earlier launch with this key, or None; None while hooks listen."""
    return None if listened() else PREPARED.get(key)


def listened() -> bool:
    """Whether a profiler has asked Triton to be told of launches, which `again` would not do."""
    runtime = triton.knobs.runtime
    return any(
        hook is not None and getattr(hook, "calls", True)
        for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook)
    )


def first(
    kernel: Any, key: Hashable, programs: int, arguments: Sequence[Any], **constants: Any
) -> None:
    """Launch as Triton does, and keep the compiled kernel for the next call with this key.

    Args:
        kernel: A `triton.jit` or `gluon.jit` function whose constants are its last parameters.
        key: All that the choice of the compiled kernel depends on, the device included.
        programs: Size of the one-dimensional grid.
        arguments: All parameters but the constants, in order.
        constants: The constants by name in the order of the parameters, then Triton's options.
    """
    tell(None, programs, arguments)
    compiled = kernel[(programs,)](*arguments, **constants)
    if hasattr(compiled, "packed_metadata"):  # not so under the interpreter
        if len(PREPARED) >= MOST:
            PREPARED.clear()
        names = kernel.arg_names
        PREPARED[key] = (compiled, tuple(constants[n] for n in names if n in constants))


def again(made: Any, device: int, programs: int, arguments: Sequence[Any]) -> None:
    """Launch what `prepared` returned, on the current stream of the current device `device`."""
    tell(made, programs, arguments)
    compiled, constants = made
    compiled.run(
        programs, 1, 1, torch._C._cuda_getCurrentRawStream(device), compiled.function,
        compiled.packed_metadata, None, None, None, *arguments, *constants,
    )  # fmt: skip


def launch(
    kernel: Any,
    key: Hashable,
    device: torch.device,
    programs: int,
    arguments: Sequence[Any],
    **constants: Any,
) -> None:
    """`again` if the key is known, else `first`; arguments as there."""
    made = prepared(key) if device.type == "cuda" else None
    if made is None:
        described = [x.descriptor() if isinstance(x, Boxed) else x for x in arguments]
        first(kernel, key, programs, described, **constants)
    else:
        viewed = [x.view() if isinstance(x, Boxed) else x for x in arguments]
        again(made, device.index, programs, viewed)
