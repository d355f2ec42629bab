"""Which tensors are q, k and v, given the two products of an attention?

They are brought into SDPA's order of axes: einsums may have any.
"""

from typing import cast

from torch import SymInt
from torch.fx import Node

from afbs_compile.passes.emit import Emitter
from afbs_compile.passes.sites import value
from afbs_compile.passes.spellings import Product, is_cast, untransposed


def queries_and_keys(qk: Product, emit: Emitter) -> tuple[Node, Node]:
    """Queries `[…, Lq, D]` and keys `[…, Lk, D]`."""
    if qk.equation is None:
        return qk.left, untransposed(qk.right) or emit.method("transpose", qk.right, -2, -1)
    left, right, result = qk.equation
    contracted = [c for c in left if c in right and c not in result]
    if len(contracted) != 1 or len(result) < 3:
        raise NotAttention("an einsum that is not q·k")
    lead, row, column = result[:-2], result[-2], result[-1]
    q, k = (qk.left, left), (qk.right, right)
    if row in right:
        q, k = k, q
    wanted = (lead + row + contracted[0], lead + column + contracted[0])
    return permuted(*q, wanted[0], emit), permuted(*k, wanted[1], emit)


def values(pv: Product, before: Node, emit: Emitter) -> tuple[Node, list[int] | None]:
    """Values `[…, Lk, D]`, and the order of SDPA's axes in the product's result if it differs.

    Args:
        pv: Weights times values, either way round.
        before: The weights.
        emit: Where to put new nodes.
    """
    if pv.equation is None:
        return pv.right, None
    left, right, result = pv.equation
    weights, letters, v = (left, right, pv.right) if pv.left is before else (right, left, pv.left)
    free = [c for c in letters if c not in weights]
    if len(free) != 1 or weights[-1] in result:
        raise NotAttention("an einsum that is not weights·v")
    natural = weights[:-1] + free[0]
    if sorted(natural) != sorted(result):
        raise NotAttention("an einsum that is not weights·v")
    order = [natural.index(c) for c in result]
    return permuted(v, letters, weights[:-2] + weights[-1] + free[0], emit), order


def permuted(x: Node, letters: str, wanted: str, emit: Emitter) -> Node:
    """The tensor with its axes as wanted."""
    if sorted(letters) != sorted(wanted):
        raise NotAttention("an einsum that broadcasts")
    order = [letters.index(c) for c in wanted]
    return x if order == sorted(order) else emit.method("permute", x, *order)


def same_dtype(q: Node, k: Node, v: Node) -> tuple[Node, Node, Node]:
    """q, k and v in the dtype of v, behind casts to a higher one."""
    dtype = value(v).dtype
    found = [x if value(x).dtype == dtype else behind_cast(x) for x in (q, k)]
    if any(value(x).dtype != dtype for x in found):
        raise NotAttention("q, k and v differ in dtype")
    return found[0], found[1], v


def behind_cast(x: Node) -> Node:
    """What was cast, else the node."""
    return x.args[0] if is_cast(x) else x  # type: ignore[return-value]


def tail(x: Node) -> tuple[int, int]:
    """The last two sizes."""
    rows, dim = cast(tuple[int | SymInt, int | SymInt], value(x).shape[-2:])
    if isinstance(rows, SymInt) or isinstance(dim, SymInt):
        raise NotAttention("scores are reshaped while lengths are symbolic")
    return rows, dim


class NotAttention(ValueError):
    """The message says why a chain cannot be written as SDPA."""
