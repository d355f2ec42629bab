"""How does a compiled kernel start without Triton's launcher? Through the CUDA driver, by ctypes.

Arguments lie in memory that is kept from launch to launch; only addresses change. A launch costs
about 4 µs of the host, where Triton's costs 10 to 40, most of it for TMA descriptors.
"""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from afbs_compile.kernels.launch import TmaView

SCALARS: dict[str, Any] = {
    "i1": ctypes.c_int8, "i8": ctypes.c_int8, "i16": ctypes.c_int16, "i32": ctypes.c_int32,
    "i64": ctypes.c_int64, "u1": ctypes.c_uint8, "u8": ctypes.c_uint8, "u16": ctypes.c_uint16,
    "u32": ctypes.c_uint32, "u64": ctypes.c_uint64, "fp32": ctypes.c_float, "f32": ctypes.c_float,
    "fp64": ctypes.c_double,
}  # fmt: skip
MAP_BYTES = 128  # of a CUtensorMap
MAP_ALIGNMENT = 64
WARP = 32
NONE, PROMOTE_128B = 0, 2  # of cuda.h: CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_L2_PROMOTION_…
# Triton's numbers of element types on the device are CUDA's but for these three
HOST_TYPES = {8: 10, 9: 8, 10: 9}


class Unsupported(Exception):
    """Why a compiled kernel can only be started by Triton."""


class Prepared(NamedTuple):
    """One launch: what `start` hands to the driver, and the memory that this points to.

    Attributes:
        head: Function, grid, threads of a program and bytes of shared memory.
        parameters: Array of the arguments' addresses.
        memory: Keeps the arguments and the kernel alive.
    """

    head: tuple[int, ...]
    parameters: Any
    memory: tuple[Any, ...]


class TensorMap:
    """A TMA descriptor in the memory of a launch, whose address can be changed."""

    def __init__(self, view: TmaView, meta: dict[str, Any]) -> None:
        """Encode `view` as the kernel's copies expect it, for a box of `meta["block_size"]`.

        Raises:
            Unsupported: The driver refuses, or the descriptor is of a kind not handled here.
        """
        if meta.get("fp4_padded") or meta.get("is_im2col"):
            raise Unsupported("a TMA descriptor of another kind than tiled")
        self.memory = ctypes.create_string_buffer(MAP_BYTES + MAP_ALIGNMENT)
        start = ctypes.addressof(self.memory)
        self.at = start + -start % MAP_ALIGNMENT
        self.address = view.address
        size = meta["elem_size"]
        kind = HOST_TYPES.get(meta["elem_type"], meta["elem_type"])
        rank = len(view.shape)
        dims = (ctypes.c_uint64 * rank)(*reversed(view.shape))
        steps = (ctypes.c_uint64 * rank)(*(s * size for s in reversed(view.strides[:-1])))
        box = (ctypes.c_uint32 * rank)(*reversed(meta["block_size"]))
        ones = (ctypes.c_uint32 * rank)(*(1,) * rank)
        code = library().cuTensorMapEncodeTiled(
            ctypes.c_void_p(self.at), kind, rank, ctypes.c_void_p(view.address), dims, steps, box,
            ones, NONE, meta["swizzle"], PROMOTE_128B, NONE,
        )  # fmt: skip
        if code:
            raise Unsupported(f"a TMA descriptor that the driver refuses ({code})")

    def move(self, address: int) -> None:
        """Let it describe the same at another address, a multiple of 16 bytes."""
        if address != self.address:
            raised(library().cuTensorMapReplaceAddress(self.at, address))
            self.address = address


@functools.cache
def library() -> Any:
    """The CUDA driver; a call lets other threads run."""
    found = ctypes.CDLL("libcuda.so.1")
    found.cuLaunchKernel.argtypes = [
        ctypes.c_void_p, *(ctypes.c_uint,) * 7, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p,
    ]  # fmt: skip
    found.cuTensorMapReplaceAddress.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    return found


def raised(code: int) -> None:
    """Turn the driver's answer into an exception.

    Raises:
        RuntimeError: It is an error.
    """
    if code:
        name = ctypes.c_char_p()
        library().cuGetErrorString(code, ctypes.byref(name))
        raise RuntimeError(f"CUDA driver: {(name.value or b'error').decode()} ({code})")


def prepare(
    compiled: Any, programs: int, arguments: Sequence[Any], slots: Sequence[int | TensorMap]
) -> Prepared:
    """A launch of a Triton kernel with its arguments laid out.

    Args:
        compiled: Triton's compiled kernel.
        programs: Size of the one-dimensional grid.
        arguments: All but trailing constants: pointers (anything), TMA views, numbers.
        slots: For every pointer among them the memory address that will hold its value, and for
            every view its map, in order.

    Raises:
        Unsupported: The kernel needs what only Triton's launcher does.
    """
    metadata = compiled.metadata
    if reason := special(metadata):
        raise Unsupported(reason)
    taken = iter(slots)
    parameters: list[int] = []
    memory: list[Any] = []

    def keep(value: Any) -> None:
        memory.append(value)
        parameters.append(ctypes.addressof(value))

    for kind, argument in zip(compiled.src.signature.values(), arguments, strict=False):
        if kind == "constexpr":
            continue
        if kind.startswith("*"):
            parameters.append(place(next(taken)))
        elif kind.startswith("tensordesc"):
            parameters.append(place(next(taken)))
            for number in argument.shape:
                keep(ctypes.c_int32(number))
            for number in argument.strides:
                keep(ctypes.c_int64(number))
        elif kind in SCALARS:
            keep(SCALARS[kind](argument))
        else:
            raise Unsupported(f"an argument of type {kind}")
    for _ in range(2):  # Triton's scratch memories, which `special` saw to be empty
        keep(ctypes.c_void_p())
    head = (compiled.function, programs, 1, 1, WARP * metadata.num_warps, 1, 1, metadata.shared)
    return Prepared(head, (ctypes.c_void_p * len(parameters))(*parameters), (compiled, *memory))


def place(slot: int | TensorMap) -> int:
    """Where the driver finds an argument."""
    return slot.at if isinstance(slot, TensorMap) else slot


def special(metadata: Any) -> str | None:
    """What a kernel asks for that `cuLaunchKernel` does not give, or None."""
    for name, usual in (
        ("num_ctas", 1), ("launch_cooperative_grid", False), ("launch_pdl", False),
        ("global_scratch_size", 0), ("profile_scratch_size", 0),
    ):  # fmt: skip
        if getattr(metadata, name, usual) not in (usual, None):
            return f"{name} {getattr(metadata, name)}"
    if getattr(metadata, "instrumentation_mode", ""):
        return "an instrumented kernel"
    return None


def start(launches: Sequence[Prepared], stream: int) -> None:
    """Launch one after the other on a stream of the current device.

    Raises:
        RuntimeError: The driver refuses.
    """
    run = library().cuLaunchKernel
    for launch in launches:
        if code := run(*launch.head, stream, launch.parameters, None):
            raised(code)
