"""SDPA on tensors of three axes, as SDPA on four.

`[B·H, L, D]` that is a view of `[B, H, L, D]` becomes that again, so that every head keeps a
policy of its own; any other `[N, L, D]` is N batch entries of one head.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import SymInt
from torch.fx import GraphModule, Node

from afbs_compile.passes.emit import Emitter
from afbs_compile.passes.forms import Form, swap
from afbs_compile.passes.sites import BLIND, Call, find, same, value
from afbs_compile.passes.spellings import RESHAPES, is_tensor, spelling


def candidates(gm: GraphModule) -> list[Call]:
    """Calls on three axes."""
    return [c for c in find(gm) if all(axes(x) == 3 for x in (c.query, c.key, c.value))]


def axes(x: Node) -> int | None:
    """How many axes, if that is recorded."""
    return value(x).dim() if is_tensor(x) else None


def lower(gm: GraphModule) -> Iterator[Form]:
    """Put a call on four axes beside every call on three, and let its users read that."""
    for call in candidates(gm):
        emit = Emitter(call.node)
        q, k, v, split = widened(call, emit)
        mask = call.attn_mask
        if isinstance(mask, Node) and axes(mask) == 3:
            mask = wide_mask(mask, value(q).shape[:2] if split else None, emit)
        sdpa = emit.function(
            torch._C._nn.scaled_dot_product_attention, q, k, v, mask, call.dropout_p,
            call.is_causal, scale=call.scale,
        )  # fmt: skip
        sdpa.meta[BLIND] = call.blind
        new = emit.method("flatten", sdpa, 0, 1) if split else emit.method("squeeze", sdpa, 1)
        made = list(emit.made)
        yield Form(sdpa, "3-D", [swap(call.node, new, made)], made, [call.node])


def widened(call: Call, emit: Emitter) -> tuple[Node, Node, Node, bool]:
    """q, k and v with four axes, and whether the first axis held heads."""
    tensors = (call.query, call.key, call.value)
    split = [unflattened(x) for x in tensors]
    found = [x for x in split if x is not None]
    if len(found) == 3 and all(same(value(x).shape[:2], value(found[0]).shape[:2]) for x in found):
        return found[0], found[1], found[2], True
    q, k, v = (emit.method("unsqueeze", x, 1) for x in tensors)
    return q, k, v, False


def unflattened(x: Node) -> Node | None:
    """`[B, H, L, D]` of which `x` is `[B·H, L, D]`, or None."""
    if spelling(x) == "contiguous":
        return unflattened(x.args[0])  # type: ignore[arg-type]
    if spelling(x) not in RESHAPES or not is_tensor(x.args[0]):
        return None
    source: Node = x.args[0]  # type: ignore[assignment]
    before: Sequence[int | SymInt] = value(source).shape
    if len(before) != 4 or isinstance(before[1], SymInt):
        return None
    return source if same((before[0] * before[1], *before[2:]), value(x).shape) else None


def wide_mask(mask: Node, lead: tuple[int, ...] | None, emit: Emitter) -> Node:
    """A mask `[N, Lq, Lk]` for a call on four axes; `lead` is (B, H) where N was B·H."""
    if lead is None or value(mask).shape[0] == 1:
        return emit.method("unsqueeze", mask, 1)
    return emit.method("unflatten", mask, 0, (-1, lead[1]))
