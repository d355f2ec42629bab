"""Which float masks are boolean ones in disguise? SDPA is given the boolean one instead.

    where(visible, 0, c) · zeros.masked_fill(hidden, c) · (1 − visible.to(float)) · c

with casts, slices and broadcasts of these, and several of them in one. The value c decides what
a row is that sees nothing (`kernels.blind`): for −inf what the call gives anyway, for a number
beside which a score is lost in the rounding the mean of v. A milder c leaves scores in such rows:
those masks stay as they are, and so do functions of sizes, which are classified by value.
"""

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node

from afbs_compile.kernels.blind import EVEN
from afbs_compile.passes import masks
from afbs_compile.passes.additive import ABSORBING
from afbs_compile.passes.emit import Emitter
from afbs_compile.passes.forms import Form, swap
from afbs_compile.passes.sites import BLIND, UNKNOWN, Call, find, recorded, same, value
from afbs_compile.passes.spellings import (
    argument,
    is_cast,
    is_tensor,
    number,
    rounded,
    spelling,
    uninverted,
)

LAYOUT = frozenset(
    {
        "getitem", "__getitem__", "view", "reshape", "expand", "unsqueeze", "squeeze", "transpose",
        "permute", "repeat", "repeat_interleave", "flatten", "unflatten", "broadcast_to", "detach",
        "select", "narrow",
    }
)  # fmt: skip
EMPTY = frozenset({"zeros", "zeros_like", "new_zeros"})
INFINITE = float("-inf")


@dataclass(frozen=True, slots=True)
class Disguise:
    """A float tensor that is 0 where `visible` holds and `fill` elsewhere.

    Attributes:
        visible: A boolean tensor that broadcasts to its shape; None if it holds everywhere.
        fill: The other value.
    """

    visible: Node | None
    fill: float = INFINITE


def candidates(gm: GraphModule) -> list[Call]:
    """Calls whose mask is a float tensor that depends on data and on nothing that changes."""
    calls = [c for c in find(gm) if is_float(c.attn_mask) and c.blind != UNKNOWN]
    if not calls:
        return []
    depends, unstable = masks.dependent(gm), masks.unstable(gm)
    return [c for c in calls if depends(c.attn_mask) and c.attn_mask not in unstable]  # type: ignore[arg-type]


def is_float(x: object) -> bool:
    """Is this a float tensor?"""
    return is_tensor(x) and value(x).is_floating_point()  # type: ignore[arg-type]


def lower(gm: GraphModule) -> Iterator[Form]:
    """Put a call with the boolean mask beside every call with one in disguise."""
    calls = candidates(gm)
    unstable: Container[Node] = masks.unstable(gm) if calls else ()
    known: dict[Node, Disguise | None] = {}
    for call in calls:
        # beside the mask, so that all calls that share it share the boolean one too
        mask = call.attn_mask
        assert isinstance(mask, Node)
        if mask not in known:
            known[mask] = seen_through(mask, unstable)
        if found := known[mask]:
            yield replaced(call, found)


def seen_through(mask: Node, unstable: Container[Node]) -> Disguise | None:
    """The boolean mask in a float one, with its nodes in the graph; None if it is not one."""
    emit = Emitter(mask.next)
    found = read(mask, emit, unstable)
    if found and found.visible and (found.fill == INFINITE or found.fill <= ABSORBING):
        return found
    for node in reversed(emit.made):
        node.graph.erase_node(node)
    return None


def replaced(call: Call, found: Disguise) -> Form:
    """The call with a boolean mask, beside itself."""
    emit = Emitter(call.node)
    sdpa = emit.function(
        torch._C._nn.scaled_dot_product_attention, call.query, call.key, call.value, found.visible,
        call.dropout_p, call.is_causal, scale=call.scale, enable_gqa=call.enable_gqa,
    )  # fmt: skip
    sdpa.meta[BLIND] = call.blind if found.fill == INFINITE else EVEN
    made = list(emit.made)
    return Form(sdpa, "float mask", [swap(call.node, sdpa, made)], made, [call.node])


def read(node: Any, emit: Emitter, unstable: Container[Node]) -> Disguise | None:
    """What a float tensor is, if it is a boolean one in disguise."""
    if not is_float(node) or node in unstable:
        return None
    inner = partial(read, emit=emit, unstable=unstable)
    name = spelling(node)
    if is_cast(node):
        found = inner(node.args[0])
        return found and Disguise(found.visible, rounded(found.fill, node))
    if name in EMPTY or (name in ("full", "full_like") and argument(node, 1, "fill_value") == 0):
        return Disguise(None)
    if name == "where" and len(node.args) == 3:
        return chosen(node, emit, inner)
    if name == "masked_fill":
        return filled(node, emit, unstable)
    if name == "add" and len(node.args) == 2 and not node.kwargs:
        return both(inner(node.args[0]), inner(node.args[1]), emit)
    if name in LAYOUT and node.args and is_tensor(node.args[0]):
        found = inner(node.args[0])
        return found and laid_out(node, found, emit)
    return affine_mask(node, emit)


def chosen(node: Node, emit: Emitter, inner: Callable[[Any], Disguise | None]) -> Disguise | None:
    """`where(visible, 0, c)`, `where(hidden, c, 0)`; another mask may stand for the 0."""
    order = (0, 1, 2) if node.op == "call_function" else (1, 0, 2)
    seen, one, other = (node.args[n] for n in order)
    if not is_bool(seen):
        return None
    for visible, kept, fill in ((True, one, other), (False, other, one)):
        never = number(fill)
        if never is None or not never < 0:
            continue
        if under := Disguise(None) if number(kept) == 0 else inner(kept):
            part: Any = seen if visible else inverse(seen, emit)
            return both(Disguise(part, rounded(never, node)), under, emit, exclusive=True)
    return None


def filled(node: Node, emit: Emitter, unstable: Container[Node]) -> Disguise | None:
    """`zeros.masked_fill(hidden, c)`, in place or not; another mask may stand for the zeros."""
    below, hidden = node.args[0], argument(node, 1, "mask")
    never = number(argument(node, 2, "value"))
    if never is None or not never < 0 or not is_bool(hidden) or not isinstance(below, Node):
        return None
    alone = set(below.users) == {node}  # what it holds is read before it is written to
    under = read(below, emit, () if alone else unstable)
    if under is None:
        return None
    part = Disguise(inverse(hidden, emit), rounded(never, node))
    return both(part, under, emit, exclusive=True)


def both(
    one: Disguise | None, other: Disguise | None, emit: Emitter, *, exclusive: bool = False
) -> Disguise | None:
    """Two masks in one: their sum, or with `exclusive` one that takes the other's place.

    A sum of two numbers is another number where both hide: only −inf stays what it is.
    """
    if one is None or other is None:
        return None
    if one.visible is None or other.visible is None:
        return other if one.visible is None else one
    if one.fill != other.fill or (one.fill != INFINITE and not exclusive):
        return None
    return Disguise(emit.function(torch.logical_and, one.visible, other.visible), one.fill)


def laid_out(node: Node, found: Disguise, emit: Emitter) -> Disguise | None:
    """A view or a repetition of a mask: the same of the boolean one."""
    if found.visible is None:
        return found
    source, *rest = node.args
    assert isinstance(source, Node)
    if any(is_tensor(x) for x in (*rest, *node.kwargs.values())):
        return None
    if any(is_tensor(x) for index in rest if isinstance(index, tuple) for x in index):
        return None
    visible = found.visible
    if not same(value(visible).shape, value(source).shape):
        visible = emit.method("expand_as", visible, source)
    if node.op == "call_method":
        made = emit.method(str(node.target), visible, *rest, **node.kwargs)
    else:
        made = emit.function(node.target, visible, *rest, **node.kwargs)  # type: ignore[arg-type]
    return Disguise(made, found.fill)


def affine_mask(node: Node, emit: Emitter) -> Disguise | None:
    """`(1 − visible.to(float)) * c`, `hidden.to(float) * c` and other sums of these."""
    found = affine(node)
    if found is None:
        return None
    flag, factor, shift = found
    off, on = rounded(shift, node), rounded(factor + shift, node)
    if off == 0 and on < 0:
        return Disguise(inverse(flag, emit), on)
    return Disguise(flag, off) if on == 0 and off < 0 else None


def affine(x: Any) -> tuple[Node, float, float] | None:
    """`(b, f, s)` of a float tensor `f · b + s`, b boolean."""
    if not is_tensor(x):
        return None
    name = spelling(x)
    if name in ("to", "type", "float", "double", "half", "bfloat16") and is_bool(x.args[0]):
        return (x.args[0], 1.0, 0.0) if value(x).is_floating_point() else None
    if is_cast(x):
        return affine(x.args[0])
    if name == "neg":
        return mapped(x.args[0], -1.0, 0.0)
    if name not in ("add", "sub", "rsub", "mul", "div") or len(x.args) != 2 or x.kwargs:
        return None
    first, second = x.args
    by, before = number(second), number(first)
    if by is not None:
        steps = {"add": (1.0, by), "sub": (1.0, -by), "rsub": (-1.0, by), "mul": (by, 0.0)}
        return mapped(first, *steps[name]) if name in steps else mapped(first, 1 / by, 0.0)
    if before is not None and name in ("add", "sub", "mul"):
        steps = {"add": (1.0, before), "sub": (-1.0, before), "mul": (before, 0.0)}
        return mapped(second, *steps[name])
    return None


def mapped(x: Any, factor: float, shift: float) -> tuple[Node, float, float] | None:
    """`factor · x + shift` of an affine x; infinities would make NaN of 0."""
    found = affine(x)
    if found is None or not all(abs(n) < float("inf") for n in (factor, shift)):
        return None
    return found[0], factor * found[1], factor * found[2] + shift


def inverse(x: Any, emit: Emitter) -> Node:
    """Not x, which may be "not y" itself: conjunctions are read off the mask later."""
    return uninverted(x) or emit.function(torch.logical_not, x)


def is_bool(x: Any) -> bool:
    """Is this a boolean tensor?"""
    return is_tensor(x) and recorded(x).dtype == torch.bool
