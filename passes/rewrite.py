"""Replace accepted SDPA calls by `afbs::attention`, whose policy is a new input of the graph.

All sites share one policy input `[sites, Hmax, COLUMNS]`: values that change never recompile.
"""

import operator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

import afbs_compile.kernels.op  # noqa: F401  registers the op
from afbs_compile.kernels.blind import ZERO
from afbs_compile.kernels.geometry import Mask
from afbs_compile.passes.copying import copy
from afbs_compile.passes.data_masks import DataNodes
from afbs_compile.passes.sites import Call, value


@dataclass(frozen=True, slots=True)
class Site:
    """An SDPA call that will be rewritten.

    Attributes:
        call: The normalised call.
        key: k without its repeated heads `[B, Hkv, Lk, D]`.
        value: v without its repeated heads.
        mask: What the call's mask was recognised as at `lengths`.
        from_end: The offset is counted from `Lk - Lq` (chunked prefill), not from 0.
        scale: Multiplier on q·k; None if it is a node, then q is scaled in the graph.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Head dim.
        data: The part of the call's mask that depends on data.
        blind: What a row is that sees nothing because of `data`, see `kernels.blind`.
    """

    call: Call
    key: Node
    value: Node
    mask: Mask
    from_end: bool
    scale: float | None
    heads: int
    kv_heads: int
    head_dim: int
    data: DataNodes = field(default_factory=DataNodes)
    blind: str = ZERO

    @property
    def name(self) -> str:
        """The path of the module that made the call."""
        return self.call.name


def rewrite(
    gm: GraphModule,
    sites: list[Site],
    policy: Tensor,
    *,
    selector: str,
    min_length: int,
    compensation: str = "none",
) -> GraphModule:
    """A copy of `gm` with `sites` rewritten; `policy` becomes its last input.

    Args:
        gm: Dynamo's graph; it reads its own placeholders again later, so it is left as it is.
        sites: What to rewrite.
        policy: `[len(sites), Hmax, COLUMNS]`.
        selector: The block selector of every site.
        min_length: Calls with fewer queries run dense inside the op.
        compensation: What stands for a block that is left out, at every site.
    """
    result, copies = copy(gm)
    last = [n for n in result.graph.nodes if n.op == "placeholder"][-1]
    with result.graph.inserting_after(last):
        source = result.graph.placeholder("afbs_policy")
    source.meta["example_value"] = policy
    source._dynamo_source = None  # AOTAutograd: not from user code
    for row, site in enumerate(sites):
        replace(result.graph, site, copies, source, row, selector, min_length, compensation)
    # masks and repeated heads that nobody reads any more go in Inductor, which knows what is pure;
    # fx's own elimination would take in-place calls without users with them
    result.graph.lint()
    result.recompile()
    return result


def replace(
    graph: Graph,
    site: Site,
    copies: dict[Node, Node],
    policy: Node,
    row: int,
    selector: str,
    min_length: int,
    compensation: str,
) -> None:
    """Put one op in the place of one SDPA node."""
    node, query = copies[site.call.node], copies[site.call.query]
    key, val = copies[site.key], copies[site.value]
    with graph.inserting_before(node):
        own = graph.call_function(operator.getitem, (policy, (row, slice(0, site.heads))))
        offset = offset_node(graph, site, query, key)
        scale = site.scale
        if scale is None:  # a symbolic scale goes into q, so that the op's stays a constant
            scale = site.head_dim**-0.5
            symbolic = copies[cast(Node, site.call.scale)]
            factor = graph.call_function(operator.mul, (symbolic, site.head_dim**0.5))
            query = graph.call_function(operator.mul, (query, factor))
        new = graph.call_function(
            torch.ops.afbs.attention.default,
            (query, key, val, own, site.mask.causal, offset, site.mask.window,
             scale, selector, min_length, compensation, *data_nodes(site, copies)),
        )  # fmt: skip
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def data_nodes(site: Site, copies: dict[Node, Node]) -> tuple[Node | str | None, ...]:
    """The op's arguments for the part of the mask that depends on data."""
    if not site.data:
        return ()
    *rest, bias = (part and copies[part] for part in site.data)
    return (*rest, site.blind, bias) if bias else (*rest, site.blind)


def offset_node(graph: Graph, site: Site, query: Node, key: Node) -> Node | int:
    """The offset of the site's mask, computed in the graph if it hangs on the lengths."""
    if not site.from_end:
        return site.mask.offset
    length_q = graph.call_method("size", (query, 2))
    length_k = graph.call_method("size", (key, 2))
    end = graph.call_function(operator.sub, (length_k, length_q))
    return graph.call_function(operator.add, (end, site.mask.offset))


def lengths(call: Call) -> tuple[int | torch.SymInt, int | torch.SymInt]:
    """Query and key length of a call, symbolic where they are."""
    return value(call.query).shape[2], value(call.key).shape[2]
