"""Which parts of a boolean mask depend on data, and how? Read off its conjunctions, never sampled.

A mask is `c₁ & c₂ & …`. Conjuncts that hang on sizes alone make the site's own mask. Of the others
one of shape `[B, 1, 1, Lk]` is key padding, whatever computed it, and `q == k` of `[B, 1, Lq, 1]`
and `[B, 1, 1, Lk]` are segments: broadcasting proves both. A mask with any other conjunct is taken
as it is, element by element.

Hugging Face writes packed texts as segments, counted from the breaks of the position ids, and
compares positions instead of indices; inside a segment positions rise by one a token, so the two
comparisons are the same, and the second one is a function of sizes.
"""

import operator
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from afbs_compile.kernels.data_mask import KINDS
from afbs_compile.passes.sites import recorded

AND = {operator.and_, operator.mul, torch.logical_and, torch.bitwise_and, torch.mul}
AND_METHODS = {"logical_and", "bitwise_and", "mul", "__and__"}
SAME = {torch.clone, torch.broadcast_to}
SAME_METHODS = {"expand", "to", "contiguous", "clone", "bool", "broadcast_to"}
EQUAL = {operator.eq, torch.eq, "eq", "__eq__"}
UNEQUAL = {operator.ne, torch.ne, "ne", "__ne__"}
NOT_AFTER = {operator.le: False, torch.le: False, operator.ge: True, torch.ge: True}  # swapped?


class DataNodes(NamedTuple):
    """Where a graph holds the parts of a data mask; see `kernels.data_mask.gathered`."""

    keys: Node | None = None
    q_segments: Node | None = None
    k_segments: Node | None = None
    elements: Node | None = None
    bias: Node | None = None

    def __bool__(self) -> bool:
        """Is there any part?"""
        return any(part is not None for part in self)

    @property
    def kind(self) -> str:
        """The parts in words."""
        parts = self.keys, self.k_segments, self.elements, self.bias
        found = zip(KINDS, parts, strict=True)
        return " + ".join(name for name, part in found if part is not None)


@dataclass(frozen=True, slots=True)
class Split:
    """A mask as a conjunction.

    Attributes:
        data: What depends on data; `elements` if nothing better is known.
        static: Conjuncts that depend on sizes alone.
        ordered: Pairs of index tensors `(k, q)`, functions of sizes, with the conjunct `k <= q`.
    """

    data: DataNodes
    static: list[Node] = field(default_factory=list)
    ordered: list[tuple[Node, Node]] = field(default_factory=list)


def split(mask: Node, depends: Callable[[Node], bool], unstable: Container[Node]) -> Split:
    """Take a mask apart.

    Args:
        mask: What an SDPA call reads.
        depends: Tells whether a node hangs on more than sizes.
        unstable: Nodes whose values may be others when the call is made.
    """
    static: list[Node] = []
    keys: list[Node] = []
    segments: list[tuple[Node, Node, Node]] = []
    rest: list[Node] = []
    for conjunct in conjuncts(mask, unstable):
        if conjunct in unstable:
            rest.append(conjunct)
        elif not depends(conjunct):
            static.append(conjunct)
        elif hides_keys(conjunct):
            keys.append(conjunct)
        elif found := compared(conjunct, EQUAL):
            segments.append((conjunct, *found))
        else:
            rest.append(conjunct)
    ordered = [pair for c in rest if (pair := order(c, segments, depends))]
    if len(ordered) < len(rest) or len(keys) > 1 or len(segments) > 1:
        return Split(DataNodes(elements=mask), static)
    _, q, k = segments[0] if segments else (None, None, None)
    return Split(DataNodes(keys[0] if keys else None, q, k), static, ordered)


def conjuncts(node: Node, unstable: Container[Node] = ()) -> list[Node]:
    """The nodes whose conjunction, broadcast, is the node; in order, each once."""
    found: dict[Node, None] = {}
    stack = [node]
    while stack:
        current = stack.pop()
        method = current.op == "call_method"
        tensors = [n for n in current.all_input_nodes if shape(n) is not None]
        inner = tensors and all(recorded(n).dtype == torch.bool for n in (current, *tensors))
        inner = inner and current not in unstable
        if inner and current.target in (AND_METHODS if method else AND) and len(tensors) == 2:
            stack.extend(reversed(tensors))
        elif inner and current.target in (SAME_METHODS if method else SAME) and len(tensors) == 1:
            stack.extend(tensors)
        else:
            found[current] = None
    return list(found)


def shape(node: object) -> tuple[Any, ...] | None:
    """The recorded shape of a node; None if it is no tensor."""
    value = recorded(node) if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else None


def singles(node: object) -> tuple[bool, ...]:
    """Which axes of a 4-D tensor have one entry for sure; empty for anything else."""
    found = shape(node)
    if found is None or len(found) != 4:
        return ()
    return tuple(isinstance(n, int) and n == 1 for n in found)


def hides_keys(node: Node) -> bool:
    """Is the shape `[B', 1, 1, Lk]`?"""
    return singles(node)[1:] == (True, True, False)


def compared(node: Node, targets: Iterable[object]) -> tuple[Node, Node] | None:
    """Query and key side of a comparison of integers of all queries with those of all keys."""
    if node.target not in targets or len(node.args) != 2 or node.kwargs:
        return None
    for q, k in (node.args, node.args[::-1]):
        if singles(q)[1:] == (True, False, True) and singles(k)[1:] == (True, True, False):
            assert isinstance(q, Node)
            assert isinstance(k, Node)
            floats = recorded(q).is_floating_point() or recorded(k).is_floating_point()
            return None if floats else (q, k)
    return None


def order(
    node: Node, segments: list[tuple[Node, Node, Node]], depends: Callable[[Node], bool]
) -> tuple[Node, Node] | None:
    """Indices `(k, q)` with `k <= q` iff the node holds, inside the segments; else None."""
    if node.target not in NOT_AFTER or len(segments) != 1 or len(node.args) != 2:
        return None
    k, q = node.args[::-1] if NOT_AFTER[node.target] else node.args
    taken = [taken_from(n) for n in (k, q, segments[0][2], segments[0][1])]
    if None in taken:
        return None
    (k_ids, *k_at), (q_ids, *q_at), (k_segment, *k_segment_at), (q_segment, *q_segment_at) = (
        t for t in taken if t
    )
    same = k_ids is q_ids and k_segment is q_segment
    same &= k_at == k_segment_at and q_at == q_segment_at and k_at[0] is q_at[0]
    if not same or counted_from(k_segment) is not unexpanded(k_ids):
        return None
    known = not any(depends(n) for n in (*k_at, *q_at))
    return (k_at[1], q_at[1]) if known else None


def taken_from(node: object) -> tuple[Node, Node, Node] | None:
    """`(x, batch, position)` of `x[batch, position]`."""
    if not isinstance(node, Node) or node.target is not operator.getitem:
        return None
    source, index = node.args
    if not (isinstance(source, Node) and isinstance(index, tuple) and len(index) == 2):
        return None
    batch, position = index
    if not (isinstance(batch, Node) and isinstance(position, Node)):
        return None
    return source, batch, position


def counted_from(node: Node) -> Node | None:
    """The p of `cumsum(diff(p, prepend=one) != 1, -1)`: the segments that its breaks make."""
    node = unexpanded(node)
    if node.target not in ("cumsum", torch.cumsum) or not last_axis(node):
        return None
    breaks = node.args[0]
    if not isinstance(breaks, Node) or breaks.target not in UNEQUAL or breaks.args[1] != 1:
        return None
    step = breaks.args[0]
    if not isinstance(step, Node) or step.target is not torch.diff:
        return None
    rest = dict(step.kwargs)
    one = shape(rest.pop("prepend", None))
    if not one or one[-1] != 1 or rest.pop("dim", -1) != -1 or rest or len(step.args) != 1:
        return None
    ids = step.args[0]
    return unexpanded(ids) if isinstance(ids, Node) else None


def last_axis(node: Node) -> bool:
    """Does a cumulative sum run over the last axis?"""
    return bool((node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")) == -1)


def unexpanded(node: Node) -> Node:
    """The node behind `expand`s, which repeat the batch only."""
    while node.target == "expand" and isinstance(node.args[0], Node):
        node = node.args[0]
    return node
