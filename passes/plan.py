"""Which calls of a graph will be rewritten, as what, and which stay dense for which reason?"""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

import torch
from torch import SymInt, Tensor
from torch.fx import GraphModule, Node

from afbs_compile.kernels.data_mask import gathered
from afbs_compile.kernels.geometry import Mask
from afbs_compile.passes import data_masks, gqa, guard, masks
from afbs_compile.passes.data_masks import DataNodes, Split
from afbs_compile.passes.masks import MaskProgram
from afbs_compile.passes.rewrite import Site, lengths
from afbs_compile.passes.sites import Call, find, value

MOST_NODES = 400  # of a mask's program that is run to check what it was taken for


@dataclass(frozen=True, slots=True)
class MaskRule:
    """A mask that was classified at one size and must be again at every other.

    Attributes:
        program: Computes, from sizes, the part that does not depend on data; None if it is empty.
        mask: What that part was classified as; with `from_end`, its offset counts from `Lk - Lq`.
        from_end: See `mask`.
        data: The part that depends on data.
    """

    program: MaskProgram | None
    mask: Mask
    from_end: bool = False
    data: DataNodes = field(default_factory=DataNodes)

    @property
    def sizes(self) -> tuple[Node, ...]:
        """The symbolic sizes that the rule hangs on."""
        return self.program.sizes if self.program else ()

    def holds(self, sizes: Sequence[int]) -> bool:
        """Does the mask at these sizes equal the rule, element by element?"""
        if self.program is None:
            return True
        found = masks.evaluate(self.program, sizes)
        length_q, length_k = found.shape[-2:]
        end = length_k - length_q if self.from_end else 0
        wanted = Mask(self.mask.causal, self.mask.offset + end, self.mask.window)
        return masks.equal(wanted, found)


@dataclass(frozen=True, slots=True)
class Plan:
    """Sites to rewrite, refusals by site name, and rules that hang on symbolic sizes."""

    sites: list[Site]
    refused: dict[str, str]
    rules: list[MaskRule]


def plan(
    gm: GraphModule,
    example_inputs: Sequence[object],
    min_length: int,
    compensation: str = "none",
) -> Plan:
    """Plan the rewriting of a Dynamo graph; never raises for a call it cannot take.

    Args:
        gm: The graph; not changed.
        example_inputs: Its real inputs, `SymInt` for symbolic sizes.
        min_length: Calls with fewer queries stay dense.
        compensation: What will stand for blocks that are left out.
    """
    regions = guard.contexts(gm.graph)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    inputs = dict(zip(placeholders, example_inputs, strict=True))
    known = masks.dependent(gm), masks.unstable(gm)
    result = Plan([], {}, [])
    recognised: dict[Node, MaskRule] = {}
    for call in find(gm):
        reason = guard.refusal(call, regions.get(call.node), min_length, compensation)
        rule = None
        if not reason and isinstance(call.attn_mask, Node):
            if call.attn_mask not in recognised:
                recognised[call.attn_mask] = recognise(gm, call, inputs, *known)
            rule = recognised[call.attn_mask]
            reason = guard.data_refusal(call, compensation) if rule.data else None
        if reason:
            result.refused[call.name] = reason
        else:
            result.sites.append(site_of(call, rule))
    used = {s.call.attn_mask for s in result.sites}
    result.rules.extend(r for n, r in recognised.items() if n in used and r.sizes)
    return result


def recognise(
    gm: GraphModule,
    call: Call,
    inputs: dict[Node, object],
    depends: Callable[[Node], bool],
    unstable: Container[Node],
) -> MaskRule:
    """Split a mask, run the part that hangs on sizes at the real ones, and classify the result."""
    assert isinstance(call.attn_mask, Node)
    split = data_masks.split(call.attn_mask, depends, unstable)
    as_it_is = DataNodes(elements=call.attn_mask)
    if not (split.static or split.ordered):
        proven = agrees(gm, call, split, Mask(), inputs)
        return MaskRule(None, Mask(), data=split.data if proven else as_it_is)
    program = masks.conjunction(gm, split.static, split.ordered)
    sizes = [hint(inputs[n]) for n in program.sizes]
    if None in sizes:  # known only at run time
        return MaskRule(None, Mask(), data=as_it_is)
    found = masks.evaluate(program, sizes)
    mask = masks.classify(found)
    flat = mask is not None and mask.causal and 1 in found.shape[-2:]  # broadcast: no shape at all
    if mask is None or flat or not agrees(gm, call, split, mask, inputs):
        return MaskRule(None, Mask(), data=as_it_is)
    length_q, length_k = lengths(call)
    end = found.shape[-1] - found.shape[-2]
    symbolic = isinstance(length_q, SymInt) or isinstance(length_k, SymInt)
    from_end = symbolic and mask.causal and mask.offset == end != 0
    own = Mask(mask.causal, 0, mask.window) if from_end else mask
    return MaskRule(program, own, from_end, split.data)


def agrees(
    gm: GraphModule, call: Call, split: Split, mask: Mask, inputs: dict[Node, object]
) -> bool:
    """Is the split mask the graph's own on the real inputs, element by element?

    Broadcasting proves it for all inputs; this is a check of the proof. True without data.
    """
    assert isinstance(call.attn_mask, Node)
    if not split.data or split.data.elements is not None:
        return True
    if len(masks.ancestors(call.attn_mask)) > MOST_NODES:  # do not run half a model for it
        return False

    def run(node: Node) -> Tensor:
        program = masks.conjunction(gm, [node])
        given = (inputs[n] for n in program.sizes)
        return masks.evaluate(program, [hint(x) if isinstance(x, SymInt) else x for x in given])

    wanted = run(call.attn_mask)
    lengths = wanted.shape[-2], wanted.shape[-1]
    data = gathered([None if part is None else run(part) for part in split.data], lengths)
    assert data is not None
    found = data.tokens(0, lengths[0]) & masks.as_tensor(mask, wanted)
    return torch.equal(found.expand_as(wanted), wanted)


def site_of(call: Call, rule: MaskRule | None) -> Site:
    """A call that passed every check, as a site."""
    q, heads = value(call.query), value(call.query).shape[1]
    mask = rule.mask if rule else Mask(causal=bool(call.is_causal))
    key, val = gqa.undo(call.key, heads), gqa.undo(call.value, heads)
    if value(key).shape[1] != value(val).shape[1]:  # one was repeated, the other was not
        key, val = call.key, call.value
    scale = q.shape[3] ** -0.5 if call.scale is None else call.scale
    return Site(
        call=call,
        key=key,
        value=val,
        mask=mask,
        from_end=bool(rule and rule.from_end),
        scale=None if isinstance(scale, Node) else float(scale),
        heads=heads,
        kv_heads=value(key).shape[1],
        head_dim=q.shape[3],
        data=rule.data if rule else DataNodes(),
    )


def hint(size: object) -> int | None:
    """The value of a size at compile time; None if it depends on data."""
    if isinstance(size, SymInt):
        found = size.node.hint
        return None if found is None else int(found)
    return size if isinstance(size, int) else None
