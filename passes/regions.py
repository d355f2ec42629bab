"""Attention inside activation checkpointing and `nested_compile_region`, put into the graph.

Both keep a part of the model as a subgraph that a higher-order operator calls. The subgraph's
nodes may stand in the place of the call: then sites, masks and calibration see them like all
others, and every call has sites of its own. A nested region only saves compile time. A checkpoint
drops activations: where gradients are needed its nodes carry the marks by which the partitioner
of AOTAutograd recomputes them. Selective checkpointing decides by a function of its own, and is
left as it is there.
"""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from afbs_compile.passes.modules import is_module
from afbs_compile.passes.sites import is_sdpa, recorded
from afbs_compile.passes.spellings import is_softmax

KINDS = {"tag_activation_checkpoint": 1, "invoke_subgraph": 2}  # where operands begin
SELECTIVE = "inside selective activation checkpointing"


def is_region(node: Node) -> bool:
    """Does the node call a subgraph that these passes know?"""
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and name in KINDS and body(node) is not None


def body(node: Node) -> GraphModule | None:
    """The subgraph that a node calls."""
    first = node.args[0] if node.args else None
    if not (isinstance(first, Node) and first.op == "get_attr"):
        return None
    found: Any = first.graph.owning_module
    for part in str(first.target).split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, GraphModule) else None


def holds_attention(gm: GraphModule) -> bool:
    """Is there attention in a subgraph, at any depth?"""
    return any(
        is_sdpa(n) or is_softmax(n) or is_module(n) or (is_region(n) and holds_attention(body(n)))  # type: ignore[arg-type]
        for n in gm.graph.nodes
    )


def candidates(gm: GraphModule) -> list[Node]:
    """Calls of subgraphs that hold attention."""
    return [n for n in gm.graph.nodes if is_region(n) and holds_attention(body(n))]  # type: ignore[arg-type]


def lower(gm: GraphModule) -> Iterator[tuple[Node, str]]:
    """Put every subgraph with attention into the graph; a node and a reason for each other one."""
    firsts: dict[str, str] = {}
    while found := [n for n in candidates(gm) if not (differentiated(n) and is_selective(n))]:
        for node in found:
            inline(gm, node, firsts)
    for node in candidates(gm):
        yield node, SELECTIVE


def differentiated(node: Node) -> bool:
    """Will somebody ask for gradients through this call?"""
    values = (recorded(x) for x in node.all_input_nodes)
    needed = any(isinstance(x, Tensor) and x.requires_grad for x in values)
    return torch.is_grad_enabled() and needed


def is_selective(node: Node) -> bool:
    """Does a function decide what the checkpoint keeps?"""
    inner = body(node)
    return inner is not None and "_checkpoint_context_fn" in inner.meta


def inline(gm: GraphModule, node: Node, firsts: dict[str, str]) -> None:
    """Put the nodes of a subgraph in the place of its call."""
    inner, where = body(node), node.args[0]
    assert inner is not None
    assert isinstance(where, Node)
    operands = iter(node.args[KINDS[node.target.__name__] :])  # type: ignore[union-attr]
    own = path(node)
    first = firsts.setdefault(str(where.target), own)
    marks = recomputed(node, len(firsts))
    copies: dict[Node, Any] = {}
    for old in inner.graph.nodes:
        if old.op == "placeholder":
            copies[old] = next(operands)
        elif old.op == "output":
            results = old.args[0]
        else:
            with gm.graph.inserting_before(node):
                new = copies[old] = gm.graph.node_copy(old, lambda n: copies[n])
            if old.op == "get_attr":
                new.target = adopted(gm, inner, f"{where.target}.{old.target}")
            rename(new, first, own)
            new.meta.update(marks)
    hand_over(node, [copies.get(r, r) if isinstance(r, Node) else r for r in results])


def recomputed(node: Node, number: int) -> dict[str, Any]:
    """The marks of a checkpoint's nodes; none where there is nothing to recompute."""
    if "checkpoint" not in str(node.target) or not differentiated(node):
        return {}
    return {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": number}


def hand_over(node: Node, results: list[Any]) -> None:
    """Let the readers of a call read its subgraph's results, and remove the call."""
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        node.graph.erase_node(user)
    where = node.args[0]
    node.graph.erase_node(node)
    if isinstance(where, Node) and not where.users:
        where.graph.erase_node(where)


def adopted(gm: GraphModule, inner: GraphModule, path: str) -> str:
    """A name in `gm` for an attribute of a subgraph."""
    name = path.replace(".", "_")
    found: Any = inner
    for part in path.split(".")[1:]:
        found = getattr(found, part)
    setattr(gm, name, found)
    return name


def path(node: Node) -> str:
    """The module that makes a call, as Dynamo spells it; empty if that is not recorded."""
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else ""


def rename(node: Node, first: str, own: str) -> None:
    """Dynamo traces a shared subgraph once, in its first caller's name: give it its own."""
    stack = node.meta.get("nn_module_stack")
    if stack and first and first != own:
        node.meta["nn_module_stack"] = {
            key: (own + name[len(first) :] if name.startswith(first) else name, kind)
            for key, (name, kind) in stack.items()
        }
