"""How does a whole call cost the host little? Its launches are recorded once, and repeated.

What a call of `afbs::attention` launches is decided by sizes, strides, dtypes and its site; only
addresses differ from call to call. The second call of a kind is watched: which kernels start, with
which addresses, what was allocated. Later ones allocate the output and one workspace, put the new
addresses into the arguments' memory and start the kernels (`kernels.driver`). A call that computes
anything outside of these kernels, such as a copy, is never recorded.
"""

import ctypes
import logging
import struct
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from afbs_compile.kernels import driver
from afbs_compile.kernels.driver import TensorMap, Unsupported
from afbs_compile.kernels.launch import ALIGNMENT, MOST, TmaView, listened, watching

LOGGER = logging.getLogger(__name__)
PAGE = 512  # bytes; as torch aligns what it allocates
EMPTY = ("aten::empty.memory_format", "aten::empty_strided", "aten::new_empty")
VIEWS = (
    "aten::transpose.int", "aten::view", "aten::_unsafe_view", "aten::slice.Tensor",
    "aten::as_strided", "aten::alias", "aten::detach", "aten::select.int", "aten::expand",
    "aten::unsqueeze", "aten::permute",
)  # fmt: skip
Launched = tuple[Any, int, Sequence[Any]]
Range = tuple[int, int]


@dataclass(slots=True)
class Tape:
    """The launches of a kind of call.

    Attributes:
        launches: In order.
        slots: Memory of all pointers and of the maps' addresses.
        layout: Of `slots`, for `struct`.
        places: For every slot its base (an input, then the output, then the workspace) and the
            offset from there in bytes.
        maps: TMA descriptors and their slots.
        output: Size and strides of the result.
        workspace: Bytes for everything else that is allocated.
        lock: `slots` hold the addresses of one call at a time.
    """

    launches: list[driver.Prepared]
    slots: Any
    layout: struct.Struct
    places: list[tuple[int, int]]
    maps: list[tuple[TensorMap, int]]
    output: tuple[tuple[int, ...], tuple[int, ...]]
    workspace: int
    lock: threading.Lock = field(default_factory=threading.Lock)

    def play(self, tensors: Sequence[Tensor]) -> Tensor:
        """Run with these inputs on the current stream; the first one's device is the current."""
        device, dtype = tensors[0].device, tensors[0].dtype
        o = torch.empty_strided(*self.output, dtype=dtype, device=device)
        work = torch.empty(self.workspace, dtype=torch.uint8, device=device)
        bases = [x.data_ptr() for x in tensors]
        bases += o.data_ptr(), work.data_ptr()
        addresses = [bases[base] + offset for base, offset in self.places]
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        with self.lock:
            self.layout.pack_into(self.slots, 0, *addresses)
            for made, slot in self.maps:
                made.move(addresses[slot])
            driver.start(self.launches, stream)
        return o


TAPES: dict[Hashable, Tape | None] = {}  # None: cannot be recorded


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches one call: its launches, what it allocates, and whether it computes elsewhere."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launched: list[Launched] = []
        self.allocated: list[Range] = []
        self.alive: list[Tensor] = []  # so that no memory is given out twice while this watches
        self.refusal: str | None = None
        self.early = False  # a kernel was only compiled now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator of torch, and note what it means for a repetition."""
        out = func(*args, **(kwargs or {}))
        name = func.name()
        if name in EMPTY:
            storage = out.untyped_storage()
            begin = storage.data_ptr()
            self.allocated.append((begin, begin + storage.nbytes()))
            self.alive.append(out)
        elif name not in VIEWS:
            self.refusal = f"{name} runs beside the kernels"
        return out

    def note(self, made: Any, programs: int, arguments: Sequence[Any]) -> None:
        """A launch; `made` is None if Triton compiled the kernel just now."""
        if made is None:
            self.early = True
        else:
            self.launched.append((made[0], programs, arguments))


def kind_of(site: Hashable, tensors: Sequence[Tensor]) -> Hashable:
    """All that decides what a call launches, or None if it must not be repeated."""
    together = 0
    for x in tensors:
        together |= x.data_ptr()
    if together % ALIGNMENT or listened():
        return None
    q = tensors[0]
    return (site, q.device.index, *[(x.dtype, x.shape, x.stride()) for x in tensors])


def replayed(site: Hashable, tensors: Sequence[Tensor], call: Callable[[], Tensor]) -> Tensor:
    """`call()`, or the launches of an earlier call of its kind for these tensors.

    Args:
        site: All that decides what the call launches, beside the tensors' sizes, strides, dtypes.
        tensors: The inputs, on one CUDA device.
        call: Reads nothing but the tensors, on their device.
    """
    kind = kind_of(site, tensors)
    tape = TAPES.get(kind)
    if tape is None:
        return call() if kind is None or kind in TAPES else recorded(kind, tensors, call)
    if tensors[0].device.index == torch.cuda.current_device():
        return tape.play(tensors)
    with torch.cuda.device(tensors[0].device):
        return tape.play(tensors)


def recorded(kind: Hashable, tensors: Sequence[Tensor], call: Callable[[], Tensor]) -> Tensor:
    """`call()`, watched; its kind is known from then on if no kernel had to be compiled."""
    recorder = Recorder()
    with recorder, watching(recorder.note):
        out = call()
    if recorder.early:
        return out
    if len(TAPES) >= MOST:
        TAPES.clear()
    try:
        TAPES[kind] = taped(recorder, tensors, out)
    except Unsupported as reason:
        LOGGER.debug("a call of afbs::attention is not recorded: %s", reason)
        TAPES[kind] = None
    return out


def taped(recorder: Recorder, tensors: Sequence[Tensor], out: Tensor) -> Tape:
    """What a recorder saw, ready to be repeated.

    Raises:
        Unsupported: It cannot be.
    """
    if recorder.refusal or not recorder.launched:
        raise Unsupported(recorder.refusal or "no kernel ran")
    storage = out.untyped_storage()
    result = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    memory = [one for one in recorder.allocated if one[0] < one[1]]
    if result not in memory or out.data_ptr() != result[0]:
        raise Unsupported("the output's memory is not its own")
    memory.remove(result)
    known = {x.data_ptr(): n for n, x in enumerate(tensors)}
    if len(known) < len(tensors):
        raise Unsupported("two inputs begin at one address")
    known[result[0]] = len(tensors)
    tape = assembled(recorder.launched, Workspace(memory, known, len(tensors) + 1), out)
    if all(base != len(tensors) for base, _ in tape.places):
        raise Unsupported("none of the kernels that were seen writes the output")
    return tape


class Workspace:
    """Where an address of the watched call lies in a later one."""

    def __init__(self, memory: Sequence[Range], known: dict[int, int], base: int) -> None:
        """`known` are inputs and output by their first byte; `base` counts them."""
        self.known = known
        self.base = base
        self.ranges: list[tuple[int, int, int]] = []
        self.size = 0
        for begin, end in memory:
            self.ranges.append((begin, end, self.size))
            self.size += -(-(end - begin) // PAGE) * PAGE

    def find(self, address: int) -> tuple[int, int]:
        """Base and offset.

        Raises:
            Unsupported: Nobody knows what lies there.
        """
        if address in self.known:
            return self.known[address], 0
        for begin, end, offset in self.ranges:
            if begin <= address < end:
                return self.base, offset + address - begin
        raise Unsupported("a kernel reads memory that is neither input nor allocated here")


def assembled(launched: Sequence[Launched], workspace: Workspace, out: Tensor) -> Tape:
    """Lay all arguments out."""
    wanted = [pointers(compiled, arguments) for compiled, _, arguments in launched]
    flat = [one for each in wanted for one in each]
    places = [workspace.find(address) for address, _ in flat]
    layout = struct.Struct(f"={len(flat)}Q")
    slots = ctypes.create_string_buffer(layout.size)
    at = ctypes.addressof(slots)
    homes: list[int | TensorMap] = [at + 8 * n for n in range(len(flat))]
    maps: list[tuple[TensorMap, int]] = []
    for n, (_, described) in enumerate(flat):
        if described is not None:
            made = TensorMap(*described)
            homes[n] = made
            maps.append((made, n))
    left = iter(homes)
    launches = [
        driver.prepare(compiled, programs, arguments, [next(left) for _ in each])
        for (compiled, programs, arguments), each in zip(launched, wanted, strict=True)
    ]
    output = tuple(out.shape), out.stride()
    return Tape(launches, slots, layout, places, maps, output, workspace.size)


def pointers(compiled: Any, arguments: Sequence[Any]) -> list[tuple[int, Any]]:
    """Address of every pointer and view among a kernel's arguments, a view with its box.

    Raises:
        Unsupported: A view that is not read by TMA.
    """
    metas = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    found: list[tuple[int, Any]] = []
    for kind, argument in zip(compiled.src.signature.values(), arguments, strict=False):
        if kind.startswith("*"):
            found.append((argument.data_ptr(), None))
        elif kind.startswith("tensordesc"):
            meta = next(metas, None)
            if meta is None or not isinstance(argument, TmaView):
                raise Unsupported("a descriptor that is not TMA's")
            found.append((argument.address, (argument, meta)))
    return found
