"""How is one step of attention written? Products, softmax, casts and transposes by any name.

`torch.matmul`, `@`, `bmm`, `baddbmm` and `einsum`; functions, methods and in-place methods.
"""

import string
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from afbs_compile.passes.sites import recorded, same, value

SAME = {
    "truediv": "div", "true_divide": "div", "divide": "div", "itruediv": "div",
    "multiply": "mul", "imul": "mul", "iadd": "add", "__matmul__": "matmul",
    "swapaxes": "transpose", "swapdims": "transpose", "_softmax": "softmax",
}  # fmt: skip
CASTS = frozenset(
    {"to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone"}
)
RESHAPES = frozenset({"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze"})


@dataclass(frozen=True, slots=True)
class Product:
    """A batched matrix product.

    Attributes:
        left: First factor.
        right: Second factor.
        equation: `(left, right, result)` letters of an einsum; None for `left @ right`.
        scale: Multiplier on the product.
        added: What is added to it, or None.
    """

    left: Node
    right: Node
    equation: tuple[str, str, str] | None = None
    scale: float = 1.0
    added: Node | None = None


def spelling(node: Node) -> str:
    """What a node does, by one name for all spellings."""
    if node.op not in ("call_function", "call_method"):
        return node.op
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return SAME.get(name, name)


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument by place or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def number(x: Any) -> float | None:
    """The number that an argument is: itself, or a constant tensor of no axes."""
    if isinstance(x, int | float):
        return float(x)
    if not isinstance(x, Node) or x.op != "call_function":
        return None
    if x.target is torch.tensor and len(x.args) == 1 and isinstance(x.args[0], int | float):
        return rounded(float(x.args[0]), x)
    if x.target is torch.full and isinstance(x.args[1], int | float) and value(x).dim() == 0:
        return rounded(float(x.args[1]), x)
    return None


def rounded(x: float, node: Node) -> float:
    """A number in the dtype of a node."""
    return float(torch.tensor(x, dtype=torch.float64).to(value(node).dtype))


def is_tensor(x: Any) -> bool:
    """Is this a node that carries a tensor?"""
    return isinstance(x, Node) and isinstance(recorded(x), Tensor)


def product(node: Node) -> Product | None:
    """The node as a matrix product of tensors with two axes or more."""
    name = spelling(node)
    if name in ("matmul", "bmm") and len(node.args) == 2 and all(map(is_tensor, node.args)):
        found = Product(*node.args)  # type: ignore[arg-type]
    elif name == "baddbmm" and all(map(is_tensor, node.args)) and len(node.args) == 3:
        found = scaled_product(node)
    elif name == "einsum":
        return einsum(node)
    else:
        return None
    return found if min(value(found.left).dim(), value(found.right).dim()) > 1 else None


def scaled_product(node: Node) -> Product:
    """`baddbmm(x, left, right, beta, alpha)`; with beta 0, x is not read."""
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    added, left, right = node.args
    if beta not in (0, 1) or not isinstance(alpha, int | float):
        return Product(left, left)  # type: ignore[arg-type]  # nothing that attention would do
    rest = {"scale": float(alpha), "added": added if beta else None}
    return Product(left, right, None, **rest)  # type: ignore[arg-type]


def einsum(node: Node) -> Product | None:
    """A two-operand einsum, its ellipsis spelt out."""
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not (isinstance(equation, str) and len(operands) == 2 and all(map(is_tensor, operands))):
        return None
    left, right = operands
    sides = equation.replace(" ", "").split("->")
    terms = sides[0].split(",")
    if len(sides) != 2 or len(terms) != 2:
        return None
    free = [c for c in string.ascii_letters if c not in equation]
    dots = value(left).dim() - len(terms[0].replace("...", ""))  # type: ignore[arg-type]
    words = [w.replace("...", "".join(free[:dots])) for w in (*terms, sides[1])]
    fits = [len(w) == len(set(w)) for w in words]
    sizes = zip(words[:2], (left, right), strict=True)
    fits += [len(w) == value(x).dim() for w, x in sizes]  # type: ignore[arg-type]
    if not all(fits):
        return None
    return Product(left, right, (words[0], words[1], words[2]))  # type: ignore[arg-type]


def is_softmax(node: Node) -> bool:
    """Is this a softmax over the last axis?"""
    if spelling(node) != "softmax" or not node.args or not is_tensor(node.args[0]):
        return False
    dim = argument(node, 1, "dim")
    return dim in (-1, value(node).dim() - 1)


def is_cast(node: Node) -> bool:
    """Does the node change no more than dtype and memory layout?"""
    if spelling(node) not in CASTS or not node.args or not is_tensor(node.args[0]):
        return False
    before, after = value(node.args[0]), value(node)  # type: ignore[arg-type]
    floats = before.is_floating_point() and after.is_floating_point()
    return floats and same(before.shape, after.shape) and before.device == after.device


def uninverted(node: Node) -> Node | None:
    """`x` if the node is "not x" of a boolean tensor."""
    if spelling(node) not in ("invert", "logical_not", "bitwise_not", "__invert__"):
        return None
    x = node.args[0]
    return x if is_tensor(x) and value(x).dtype == torch.bool else None  # type: ignore[arg-type, return-value]


def readers(node: Node) -> list[Node]:
    """The users that read the node's values, rather than its dtype or sizes."""
    return [user for user in node.users if not reads_meta(user, node)]


def reads_meta(user: Node, node: Node) -> bool:
    """Does a user need no more of the node than its dtype or sizes?"""
    if spelling(user) in ("type_as", "view_as"):
        return user.args[0] is not node
    return spelling(user) in ("size", "dim")


def dropout(node: Node) -> float | None:
    """The probability with which a dropout drops, 0 if it is inactive; None for other nodes."""
    if spelling(node) != "dropout":
        return None
    p, training = argument(node, 1, "p", 0.5), argument(node, 2, "training", True)
    return float(p) if training else 0.0


def untransposed(node: Node) -> Node | None:
    """`x` if the node is `x` with its last two axes swapped."""
    if not node.args or not is_tensor(node.args[0]):
        return None
    last = value(node).dim()
    axes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], list | tuple) else None
    places = list(axes or node.args[1:])
    name = spelling(node)
    if not all(isinstance(p, int) for p in places):
        return None
    places = [p % last for p in places]
    if name == "transpose":
        swaps = sorted(places) == [last - 2, last - 1]
    else:
        swaps = name == "permute" and places == [*range(last - 2), last - 1, last - 2]
    return node.args[0] if swaps else None  # type: ignore[return-value]
