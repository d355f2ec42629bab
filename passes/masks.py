"""Is a boolean mask causal, a sliding window or nothing? Decided exactly, never from a sample.

Hugging Face decoders carry a `[B, 1, Lq, Lk]` mask even for plain causal attention. If all that a
mask depends on is `arange` and sizes, it is the same on every call: its part of the graph is run
and the result compared with the candidates, element by element. A mask that depends on a tensor
input may differ on the next call, so it is never classified.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import SymInt, Tensor
from torch.fx import Graph, GraphModule, Node

from afbs_compile.kernels.geometry import Mask
from afbs_compile.passes.sites import recorded

FACTORIES = frozenset(
    {torch.arange, torch.ones, torch.zeros, torch.full, torch.eye, torch.tensor, torch.linspace}
)


@dataclass(frozen=True, slots=True)
class MaskProgram:
    """The part of a graph that computes a mask from sizes.

    Attributes:
        run: Takes the values of `sizes` in order, returns the mask.
        sizes: Symbolic-size placeholders of the graph that it reads.
    """

    run: GraphModule
    sizes: tuple[Node, ...]


def extract(gm: GraphModule, mask: Node) -> MaskProgram | str:
    """Cut out the program of `mask`, or say why it cannot be."""
    needed = ancestors(mask)
    if reason := next((r for n in needed if (r := dependence(n))), None):
        return reason
    graph, copies = Graph(), dict[Node, Node]()
    sizes = [n for n in gm.graph.nodes if n in needed and n.op == "placeholder"]
    for node in gm.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(copies[mask])
    return MaskProgram(GraphModule({}, graph), tuple(sizes))


def ancestors(node: Node) -> set[Node]:
    """The node and all that it is computed from."""
    found, stack = set[Node](), [node]
    while stack:
        current = stack.pop()
        if current not in found:
            found.add(current)
            stack.extend(current.all_input_nodes)
    return found


def dependence(node: Node) -> str | None:
    """Why a mask with this ancestor is more than a function of sizes."""
    if node.op == "placeholder":
        return None if isinstance(recorded(node), SymInt) else "mask depends on an input tensor"
    if node.op == "get_attr":
        return "mask depends on a stored tensor"
    if node.op == "call_module":
        return "mask is computed by a module"
    if not node.all_input_nodes and node.op == "call_function" and node.target not in FACTORIES:
        return f"mask depends on {getattr(node.target, '__name__', node.target)}"
    tags = getattr(node.target, "tags", ())
    random = torch.Tag.nondeterministic_seeded in tags or "rand" in str(node.target)
    return "mask is random" if random else None


def evaluate(program: MaskProgram, sizes: Iterable[int]) -> Tensor:
    """The mask for given sizes, bool, broadcastable to `[B, H, Lq, Lk]`."""
    with torch.no_grad():
        result = program.run(*sizes)
    if not isinstance(result, Tensor):
        raise TypeError(f"a mask program returned {type(result).__name__}")
    return result


def classify(mask: Tensor) -> Mask | None:
    """The `Mask` that equals a boolean tensor `[..., Lq, Lk]` on every element, or None."""
    one = mask[(0,) * (mask.dim() - 2)]
    options = [Mask()] if bool(one.all()) else candidates(one)
    return next((m for m in options if equal(m, mask)), None)


def equal(mask: Mask, tensor: Tensor) -> bool:
    """Is a boolean tensor `[..., Lq, Lk]` this mask, in every leading entry?"""
    wanted = as_tensor(mask, tensor)
    if repeats(tensor):
        return torch.equal(tensor[(0,) * (tensor.dim() - 2)], wanted)
    return all(torch.equal(entry, wanted) for entry in tensor.flatten(0, -3))


def repeats(tensor: Tensor) -> bool:
    """Are the leading entries one and the same memory (an expanded mask)?"""
    leading = zip(tensor.shape[:-2], tensor.stride()[:-2], strict=True)
    return all(size == 1 or stride == 0 for size, stride in leading)


def candidates(mask: Tensor) -> list[Mask]:
    """Causal masks read off single query rows of `[Lq, Lk]`; each must then be compared.

    Where the key axis clips every row, any offset that reaches its end stands for the same mask.
    """
    some = mask.any(1)
    first = row_of(some, -1)
    if first < 0:
        return []
    free = row_of(some & ~mask[:, -1], -1)  # a row that the key axis does not clip
    offset = mask.shape[1] - 1 - first if free < 0 else int(torch.nonzero(mask[free])[-1]) - free
    lower = row_of(some & ~mask[:, 0], -1)
    if lower < 0:
        return [Mask(True, offset)]
    window = lower + offset + 1 - int(torch.nonzero(mask[lower])[0])
    return [Mask(True, offset, window)] if window > 0 else []


def row_of(rows: Tensor, otherwise: int) -> int:
    """The first row of a bool `[Lq]` that is True."""
    found = torch.nonzero(rows)
    return int(found[0]) if len(found) else otherwise


def as_tensor(mask: Mask, like: Tensor) -> Tensor:
    """The boolean tensor `[Lq, Lk]` that a `Mask` stands for."""
    i = torch.arange(like.shape[-2], device=like.device)[:, None]
    j = torch.arange(like.shape[-1], device=like.device)[None]
    low, high = mask.spans(i, i)
    return (j >= low) & (j <= high)
