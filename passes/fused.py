"""SDPA called by the name of one of its fused kernels, as SDPA.

The operators also return log-sum-exps and random states; a call whose readers want no more than
the first result is SDPA. `is_causal` of the kernels is aligned to the end of the keys, SDPA's to
the start: only square calls are taken.
"""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from afbs_compile.passes.emit import Emitter
from afbs_compile.passes.forms import Form, swap
from afbs_compile.passes.sites import same, value
from afbs_compile.passes.spellings import is_tensor

NAMES = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
OVERLOADS = {
    spelling: getattr(torch.ops.aten, name).default
    for name in NAMES
    for spelling in (getattr(torch.ops.aten, name), getattr(torch.ops.aten, name).default)
}


def is_fused(node: Node) -> bool:
    """Is this a call of a fused kernel?"""
    return node.op == "call_function" and node.target in OVERLOADS


def lower(gm: GraphModule) -> Iterator[Form | tuple[Node, str]]:
    """Put SDPA beside every fused call; a node and a reason for each one that cannot be."""
    for node in [n for n in gm.graph.nodes if is_fused(n)]:
        given = arguments(node)
        parts = {user.args[1]: user for user in node.users if user.target is operator.getitem}
        q, k = given["query"], given["key"]
        if len(parts) < len(node.users) or any(n and part.users for n, part in parts.items()):
            yield node, "log-sum-exps of a fused kernel are read"
        elif not (is_tensor(q) and is_tensor(k)):
            yield node, "shapes are not recorded in the graph"
        elif given["is_causal"] and not same(value(q).shape[2:3], value(k).shape[2:3]):
            yield node, "causal fused kernel with fewer queries than keys"
        elif 0 in parts:
            yield replaced(node, given, parts)


def arguments(node: Node) -> dict[str, Any]:
    """The call's arguments by name, with defaults."""
    schema = OVERLOADS[node.target]._schema.arguments
    given = {a.name: a.default_value for a in schema if a.has_default_value()}
    return given | dict(zip((a.name for a in schema), node.args, strict=False)) | dict(node.kwargs)


def replaced(node: Node, given: dict[str, Any], parts: dict[Any, Node]) -> Form:
    """SDPA beside a fused call."""
    emit = Emitter(node)
    sdpa = emit.function(
        torch._C._nn.scaled_dot_product_attention, given["query"], given["key"], given["value"],
        given.get("attn_bias", given.get("attn_mask")), given["dropout_p"], given["is_causal"],
        scale=given["scale"],
    )  # fmt: skip
    made = list(emit.made)
    return Form(sdpa, "fused kernel", [swap(parts[0], sdpa, made)], made, [node, *parts.values()])
