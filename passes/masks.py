"""Is a boolean mask causal, a sliding window or nothing? Decided exactly, never from a sample.

Hugging Face decoders carry a `[B, 1, Lq, Lk]` mask even for plain causal attention. If all that a
mask depends on is `arange` and sizes, it is the same on every call: its part of the graph is run
and the result compared with the candidates, element by element. A mask that depends on a tensor
input may differ on the next call, so it is never classified; `passes.data_masks` takes it apart.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import SymInt, Tensor
from torch.fx import Graph, GraphModule, Node

from afbs_compile.kernels.geometry import Mask
from afbs_compile.passes.sites import recorded

FACTORIES = frozenset(
    {torch.arange, torch.ones, torch.zeros, torch.full, torch.eye, torch.tensor, torch.linspace}
)
OPERATORS = frozenset({"and_", "or_", "not_", "is_"})  # of the module `operator`: not in place
WRITERS = frozenset({"setitem", "iadd", "imul", "isub", "iand", "ior", "ixor"})
FRESH = frozenset(  # never views of what they are given
    {
        "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full",
        "new_empty", "zeros", "ones", "full", "empty", "arange", "clone", "where", "masked_fill",
        "invert", "eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "and_", "or_",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class MaskProgram:
    """The part of a graph that computes a mask from sizes.

    Attributes:
        run: Takes the values of `inputs` in order, returns the mask.
        inputs: Placeholders of the graph that it reads.
    """

    run: GraphModule
    inputs: tuple[Node, ...]


def conjunction(
    gm: GraphModule, nodes: Sequence[Node], ordered: Sequence[tuple[Node, Node]] = ()
) -> MaskProgram:
    """Cut out the program of `nodes`, and of `k <= q` for pairs of nodes: all that must hold."""
    needed = ancestors(*nodes, *(n for pair in ordered for n in pair))
    graph, copies = Graph(), dict[Node, Node]()
    inputs = [n for n in gm.graph.nodes if n in needed and n.op == "placeholder"]
    for node in gm.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    parts = [copies[n] for n in nodes]
    parts += [graph.call_function(operator.le, (copies[k], copies[q])) for k, q in ordered]
    while len(parts) > 1:
        parts.append(graph.call_function(torch.logical_and, (parts.pop(0), parts.pop(0))))
    graph.output(parts[0])
    return MaskProgram(GraphModule(gm, graph), tuple(inputs))


def ancestors(*nodes: Node) -> set[Node]:
    """The nodes and all that they are computed from."""
    found, stack = set[Node](), list(nodes)
    while stack:
        current = stack.pop()
        if current not in found:
            found.add(current)
            stack.extend(current.all_input_nodes)
    return found


def dependent(gm: GraphModule) -> Callable[[Node], bool]:
    """Tells whether a node of the graph is more than a function of sizes."""
    return reached(gm, depends).__contains__


def unstable(gm: GraphModule) -> set[Node]:
    """Nodes whose values may be others when they are used than when they are computed again.

    Those that hang on memory that some node writes to, but not on that node: a program cut out of
    the graph would miss the write. What hangs on the writer as well brings it along, in order.
    """
    found = set[Node]()
    for node in gm.graph.nodes:
        if targets := overwritten(node):
            found |= reached(gm, targets.__contains__) - reached(gm, {node}.__contains__)
    return found


def reached(gm: GraphModule, origin: Callable[[Node], bool]) -> set[Node]:
    """The nodes that are an origin or are computed from one."""
    found = set[Node]()
    for node in gm.graph.nodes:
        if origin(node) or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def depends(node: Node) -> bool:
    """Does the node bring in something else than sizes: a tensor, a module, chance?"""
    if node.op == "placeholder":
        return not isinstance(recorded(node), SymInt)
    if node.op in ("get_attr", "call_module"):
        return True
    if not node.all_input_nodes and node.op == "call_function" and node.target not in FACTORIES:
        return True
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags or "rand" in str(node.target)


def overwritten(node: Node) -> set[Node]:
    """What a node changes in place: the tensor, and all that it may be a view of."""
    found = set[Node]()
    if node.op not in ("call_function", "call_method"):
        return found
    name = name_of(node)
    in_place = name.endswith("_") and not name.endswith("__") and name not in OPERATORS
    if in_place or name in WRITERS or "out" in node.kwargs:
        written = node.kwargs.get("out", node.args[0] if node.args else None)
        while isinstance(written, Node) and written not in found:
            found.add(written)
            fresh = written.op == "placeholder" or name_of(written) in FRESH
            written = written.args[0] if written.args and not fresh else None
    return found


def name_of(node: Node) -> str:
    """The name of what a node calls, as a method or as a function."""
    return node.target if isinstance(node.target, str) else node_name(node)


def node_name(node: Node) -> str:
    """The name of what a node calls."""
    return str(getattr(node.target, "__name__", ""))


def evaluate(program: MaskProgram, sizes: Iterable[object]) -> Tensor:
    """The mask for given values of what it reads, bool, of two axes or more, broadcastable."""
    with torch.no_grad():
        result = program.run(*sizes)
    if not isinstance(result, Tensor):
        raise TypeError(f"a mask program returned {type(result).__name__}")
    return result[(None,) * (2 - result.dim())]


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
