"""What happens to attention scores between q·k and softmax? Named patterns, read backwards.

Each pattern takes a node and what was read so far, and returns the node below it, a reason why
the chain is more than attention, or None if it is not the pattern's.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import SymFloat, SymInt, Tensor
from torch.fx import Node

from afbs_compile.kernels.blind import MEAN, NAN
from afbs_compile.passes.additive import ABSORBING, NEVER
from afbs_compile.passes.emit import Emitter
from afbs_compile.passes.sites import UNKNOWN, recorded, same, value
from afbs_compile.passes.spellings import (
    CASTS,
    RESHAPES,
    argument,
    is_cast,
    is_tensor,
    number,
    product,
    readers,
    spelling,
    uninverted,
)  # fmt: skip

STEPS_BELOW = 12  # how far scores are followed


@dataclass(frozen=True, slots=True)
class Term:
    """A mask: `node` is added times `factor`, or says where a score is kept.

    Attributes:
        node: The mask's tensor.
        kind: `added`, `kept` or `hidden`.
        fill: What stands in the place of a hidden score: a node, or None for "never".
        factor: What the term was multiplied by before softmax.
        never: A hidden score before softmax, if `fill` is None.
    """

    node: Node
    kind: str
    fill: Node | None = None
    factor: float = 1.0
    never: float = -math.inf


@dataclass(slots=True)
class Scores:
    """What was read of a chain so far.

    Attributes:
        scale: Multiplier on q·k.
        tensors: `(operation, tensor)` by which q·k is multiplied or divided.
        terms: Its masks, the last one first.
        shape: Of the scores where they have four axes, if anywhere.
        inner: All nodes read.
    """

    scale: float = 1.0
    tensors: list[tuple[Callable[..., Any], Node]] = field(default_factory=list)
    terms: list[Term] = field(default_factory=list)
    shape: tuple[int, ...] | None = None
    inner: list[Node] = field(default_factory=list)

    def mask(self, term: Term) -> str | None:
        """Note a mask; a reason if what multiplies it is no number."""
        if self.tensors:
            return "a mask is scaled by a tensor"
        if self.scale <= 0:
            return "a mask is scaled by a number that is not positive"
        self.terms.append(term)
        return None


def leads(node: Any, steps: int = STEPS_BELOW) -> bool:
    """Does the node come from a matrix product, through steps that this file knows?"""
    if not is_tensor(node) or not steps:
        return False
    if product(node):
        return True
    known = spelling(node) in PASSING
    return known and any(leads(n, steps - 1) for n in node.all_input_nodes)


def cast(node: Node, scores: Scores) -> Node | str | None:
    """`scores.float()`, `.to(dtype)`."""
    return node.args[0] if is_cast(node) else None  # type: ignore[return-value]


def reshape(node: Node, scores: Scores) -> Node | str | None:
    """Scores `[B·H, Lq, Lk]` seen as `[B, H, Lq, Lk]` or back."""
    if spelling(node) not in RESHAPES or not is_tensor(node.args[0]):
        return None
    before, after = value(node.args[0]).shape, value(node).shape  # type: ignore[arg-type]
    if not same(before[-2:], after[-2:]):
        return "scores are reshaped"
    for shape in (before, after):
        if len(shape) == 4:
            if any(isinstance(n, SymInt) for n in shape[:2]):
                return "scores are reshaped by a symbolic size"
            scores.shape = tuple(shape)
    return node.args[0]  # type: ignore[return-value]


def scale(node: Node, scores: Scores) -> Node | str | None:
    """`scores * c`, `scores / c`, with a number or a tensor that is the same for all keys."""
    name = spelling(node)
    if name not in ("mul", "div") or len(node.args) != 2 or node.kwargs:
        return None
    below, by = node.args
    if name == "mul" and not leads(below):
        below, by = by, below
    if not is_tensor(below):
        return None
    if isinstance(by, int | float):
        scores.scale *= by if name == "mul" else 1 / by
    elif isinstance(by, Node) and same_for_all_keys(recorded(by)):
        scores.tensors.append((operator.mul if name == "mul" else operator.truediv, by))
    else:
        return "scores are multiplied by a tensor"
    return below  # type: ignore[return-value]


def same_for_all_keys(found: Any) -> bool:
    """May this multiplier of scores multiply q instead?"""
    if isinstance(found, Tensor):
        return found.is_floating_point() and (found.dim() == 0 or found.shape[-1] == 1)
    return isinstance(found, SymFloat | SymInt)


def added(node: Node, scores: Scores) -> Node | str | None:
    """`scores + mask` (BERT, T5, Hugging Face's eager attention)."""
    if spelling(node) != "add" or len(node.args) != 2 or node.kwargs:
        return None
    below, mask = node.args if leads(node.args[0]) else reversed(node.args)
    if not is_tensor(below) or not is_tensor(mask):
        return "a number is added to the scores"
    reason = scores.mask(Term(mask, "added", factor=scores.scale))  # type: ignore[arg-type]
    return reason or below  # type: ignore[return-value]


def where(node: Node, scores: Scores) -> Node | str | None:
    """`where(visible, scores, never)` (GPT-2) and `where(hidden, never, scores)`."""
    if spelling(node) != "where" or len(node.args) != 3:
        return None
    first, second, third = node.args
    seen, one, other = (first, second, third)
    if node.op == "call_method":
        seen, one = second, first
    kept = leads(one)
    below, fill = (one, other) if kept else (other, one)
    return filled(scores, seen, below, fill, "kept" if kept else "hidden")


def masked_fill(node: Node, scores: Scores) -> Node | str | None:
    """`scores.masked_fill(hidden, never)`."""
    if spelling(node) != "masked_fill":
        return None
    hidden, fill = argument(node, 1, "mask"), argument(node, 2, "value")
    return filled(scores, hidden, node.args[0], fill, "hidden")


def filled(scores: Scores, seen: Any, below: Any, fill: Any, kind: str) -> Node | str:
    """Note that scores are replaced where a boolean tensor says so."""
    if not is_tensor(seen) or not is_tensor(below):
        return "scores are replaced by a rule that is no tensor"
    known = number(fill)
    if known is not None:
        if known * scores.scale > NEVER:
            return f"hidden scores become {known}, which is not negative enough to hide them"
        return scores.mask(Term(seen, kind, never=known * scores.scale)) or below
    if not is_tensor(fill):
        return "hidden scores become something that is known only at run time"
    return scores.mask(Term(seen, kind, fill, scores.scale)) or below


PATTERNS: dict[str, Callable[[Node, Scores], Node | str | None]] = {
    "cast": cast,
    "reshape": reshape,
    "scale": scale,
    "added": added,
    "where": where,
    "masked_fill": masked_fill,
}
PASSING = CASTS | RESHAPES | {"mul", "div", "add", "where", "masked_fill"}


def read(node: Node) -> tuple[Node, Scores] | str | None:
    """From softmax's input down to q·k: the product, and what is done to it on the way.

    Returns:
        A reason if the way is more than attention, None if it leads to no product.
    """
    scores = Scores()
    while not product(node):
        if len(readers(node)) > 1:
            return "attention scores have other users" if leads(node) else None
        below = next((b for p in PATTERNS.values() if (b := p(node, scores))), None)
        if below is None:
            behind = node.args[0] if node.args else None
            return f"scores pass through {spelling(node)}" if leads(behind) else None
        if isinstance(below, str):
            return below if leads(node) else None
        scores.inner.append(node)
        node = below
    return "attention scores have other users" if len(readers(node)) > 1 else (node, scores)


def mask_of(scores: Scores, emit: Emitter, dtype: Any) -> Node | None:
    """All masks of a chain as one: boolean if all of them are, else to be added."""
    if not scores.terms:
        return None
    if all(t.kind != "added" and t.fill is None for t in scores.terms):
        parts = [visible(t, emit) for t in scores.terms]
        return joined(parts, operator.and_, emit)
    return joined([addend(t, emit, dtype) for t in scores.terms], operator.add, emit)


def blind_of(scores: Scores) -> str:
    """What softmax gives in a row that sees nothing; see `kernels.blind`.

    A score that was replaced is the same for all keys of such a row: their weights are equal.
    Where masks are added as well, that holds for numbers next to which a score is lost.
    """
    fills = {t.never for t in scores.terms if t.kind != "added" and t.fill is None}
    if any(t.kind != "added" and t.fill is not None for t in scores.terms):
        return UNKNOWN
    if fills <= {-math.inf}:
        return NAN
    if any(t.kind == "added" for t in scores.terms):
        return NAN if max(fills) <= ABSORBING else UNKNOWN
    return MEAN if len(fills) == 1 else UNKNOWN


def joined(parts: list[Node], how: Callable[..., Any], emit: Emitter) -> Node:
    """The parts in one."""
    first, *rest = parts
    for part in rest:
        first = emit.function(how, first, part)
    return first


def visible(term: Term, emit: Emitter) -> Node:
    """A boolean mask, True where a key is seen."""
    if term.kind == "kept":
        return term.node
    return uninverted(term.node) or emit.function(operator.invert, term.node)


def addend(term: Term, emit: Emitter, dtype: Any) -> Node:
    """A mask as what is added to the scores."""
    node = term.node
    if term.kind != "added":
        lowest = -math.inf if term.never == -math.inf else torch.finfo(torch.float32).min
        lowest = max(lowest, torch.finfo(dtype).min) if lowest > -math.inf else lowest
        fill = lowest if term.fill is None else term.fill
        node = emit.function(torch.where, visible(term, emit), 0.0, fill)
    if term.factor != 1.0:
        node = emit.function(operator.mul, node, term.factor)
    return node if value(node).dtype == dtype else emit.method("to", node, dtype)
