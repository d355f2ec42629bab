"""Attention written as matmul, softmax, matmul, turned into SDPA.

    o = softmax(mask(c · q kᵀ)) v      →      o = SDPA(q, k, v, mask, scale=c)

The chain is read from its softmax: down to q·k by the patterns of `scores`, up to ·v here. q and k
are taken as they are in the graph, so a scale that was put into them stays there.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from afbs_compile.passes.emit import Emitter
from afbs_compile.passes.forms import Form, swap
from afbs_compile.passes.operands import (
    NotAttention,
    queries_and_keys,
    same_dtype,
    tail,
    values,
)  # fmt: skip
from afbs_compile.passes.scores import Scores, Term, blind_of, mask_of, read
from afbs_compile.passes.sites import BLIND, same, value
from afbs_compile.passes.spellings import (
    Product,
    dropout,
    is_cast,
    is_softmax,
    is_tensor,
    product,
    readers,
    spelling,
)  # fmt: skip

WEIGHTS_READ = "attention weights have other users (output_attentions?)"
ANY_LAYOUT = frozenset(
    {"transpose", "permute", "contiguous", "reshape", "flatten", "matmul", "to"}
)


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain that was read.

    Attributes:
        qk: The product of queries and keys.
        pv: The product of probabilities and values.
        out: The node of `pv`.
        scores: What happens before softmax.
        dropout_p: What happens after it.
        inner: All nodes from q·k to ·v.
        reason: Why it cannot be SDPA, or None.
    """

    qk: Product
    pv: Product
    out: Node
    scores: Scores
    dropout_p: float
    inner: list[Node]
    reason: str | None


def lower(gm: GraphModule) -> Iterator[Form | tuple[Node, str]]:
    """Turn every chain into SDPA; a node and a reason for each one that cannot be."""
    for node in list(gm.graph.nodes):
        if not is_softmax(node):
            continue
        chain = match(node)
        if isinstance(chain, Chain):
            emit = Emitter(chain.out)
            try:
                yield replaced(chain, emit)
            except NotAttention as reason:
                discard(emit)
                yield chain.out, str(reason)
        elif chain:
            yield chain


def discard(emit: Emitter) -> None:
    """Take back what was emitted for nothing."""
    for node in reversed(emit.made):
        node.graph.erase_node(node)


def match(softmax: Node) -> Chain | tuple[Node, str] | None:
    """The chain around a softmax, or its last product and what is wrong with it."""
    after = consumed(softmax)
    if after is None:
        return None
    out, dropout_p, passed, reason = after
    pv = product(out)
    below = read(softmax.args[0])  # type: ignore[arg-type]
    if below is None or pv is None:
        return None
    if isinstance(below, str):
        return out, below
    bottom, scores = below
    qk = product(bottom)
    assert qk is not None
    inner = [bottom, *reversed(scores.inner), softmax, *passed, out]
    return Chain(qk, pv, out, scores, dropout_p, inner, reason)


def consumed(softmax: Node) -> tuple[Node, float, list[Node], str | None] | None:
    """From softmax to ·v: the product, dropout, nodes passed, and a reason against it."""
    node, dropped, passed, reason = softmax, 0.0, list[Node](), None
    for _ in range(5):
        if len(readers(node)) > 1:
            reason = WEIGHTS_READ
        users = [u for u in node.users if is_product_of(u, node) or passes(u, node)]
        first = next((u for u in users if product(u)), users[0] if users else None)
        if first is None:
            return None
        if product(first):
            return first, dropped, passed, reason
        dropped = max(dropped, dropout(first) or 0.0)
        node = first
        passed.append(node)
    return None


def passes(user: Node, node: Node) -> bool:
    """Is the user a step between softmax and ·v?"""
    same_rows = spelling(user) in ("view", "reshape") and is_tensor(user) and (
        same(value(user).shape[-2:], value(node).shape[-2:])
    )  # fmt: skip
    return user.args[:1] == (node,) and (is_cast(user) or dropout(user) is not None or same_rows)


def is_product_of(user: Node, weights: Node) -> bool:
    """Are these the weights of a product with values?"""
    found = product(user)
    if found is None or found.added or found.scale != 1.0:
        return False
    return found.left is weights or (found.equation is not None and found.right is weights)


def replaced(chain: Chain, emit: Emitter) -> Form:
    """Put SDPA beside a chain and let its users read that.

    Raises:
        NotAttention: It cannot be written as SDPA.
    """
    scores, out = chain.scores, chain.out
    q, k = queries_and_keys(chain.qk, emit)
    v, order = values(chain.pv, chain.inner[-2], emit)
    q, k, v = same_dtype(q, k, v)
    if chain.qk.added is not None and (reason := added_below(chain.qk.added, scores)):
        raise NotAttention(reason)
    for how, by in reversed(scores.tensors):
        q = emit.function(how, q, by)
    check(q, k, v, out)
    if scores.shape and any(value(t.node).dim() == 3 for t in scores.terms):
        raise NotAttention("masks are added before and after the scores are reshaped")
    if scores.shape and value(q).dim() == 3:
        q, k, v = (emit.method("reshape", x, *scores.shape[:2], *tail(x)) for x in (q, k, v))
    mask = mask_of(scores, emit, value(q).dtype)
    single = value(k).dim() == 4 and value(k).shape[1] == 1 != value(q).shape[1]
    sdpa = emit.function(
        torch._C._nn.scaled_dot_product_attention, q, k, v, mask, chain.dropout_p,
        scale=scores.scale * chain.qk.scale, **({"enable_gqa": True} if single else {}),
    )  # fmt: skip
    sdpa.meta[BLIND] = blind_of(scores)
    new = laid_out(sdpa, order, out, emit)
    made = list(emit.made)
    pair = swap(out, new, made)
    return Form(sdpa, "softmax", [pair], made, chain.inner, chain.reason)


def added_below(added: Node, scores: Scores) -> str | None:
    """Note what `baddbmm` adds to the product."""
    return scores.mask(Term(added, "added", factor=scores.scale))


def check(q: Node, k: Node, v: Node, out: Node) -> None:
    """Shapes that SDPA takes without broadcasting, and a result like the chain's."""
    shapes = [value(x).shape for x in (q, k, v)]
    if len({len(s) for s in shapes}) > 1 or not 3 <= len(shapes[0]) <= 4:
        raise NotAttention(
            f"{'/'.join(str(len(s)) for s in shapes)}-D factors (3-D or 4-D needed)"
        )
    if not all(same(s[:1], shapes[0][:1]) for s in shapes):
        raise NotAttention("keys are broadcast over the batch")
    heads = [s[1:-2] for s in shapes]
    if not (same(heads[0], heads[1]) or same(heads[1], (1,))) or not same(heads[1], heads[2]):
        raise NotAttention("keys are broadcast over heads")
    if value(out).dtype != value(v).dtype:
        raise NotAttention("the result has another dtype than v")


def laid_out(sdpa: Node, order: list[int] | None, out: Node, emit: Emitter) -> Node:
    """SDPA's result in the shape and, where a user might look at it, the layout of the chain's."""
    new = sdpa
    if value(new).dim() != value(out).dim() and order is None:
        new = emit.method("reshape", new, *value(out).shape)
    if order and order != sorted(order):
        new = emit.method("permute", new, *order)
    if any(spelling(user) not in ANY_LAYOUT for user in out.users):
        new = emit.method("contiguous", new)
    return new
