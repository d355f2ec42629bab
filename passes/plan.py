"""Which calls of a graph will be rewritten, as what, and which stay dense for which reason?"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import SymInt
from torch.fx import GraphModule, Node

from afbs_compile.kernels.geometry import Mask
from afbs_compile.passes import gqa, guard, masks
from afbs_compile.passes.masks import MaskProgram
from afbs_compile.passes.rewrite import Site, lengths
from afbs_compile.passes.sites import Call, find, value

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MaskRule:
    """A mask that was classified at one size and must be again at every other.

    Attributes:
        program: Computes the mask from sizes.
        mask: What it was classified as; with `from_end`, its offset is counted from `Lk - Lq`.
        from_end: See `mask`.
    """

    program: MaskProgram
    mask: Mask
    from_end: bool

    def holds(self, sizes: Sequence[int]) -> bool:
        """Does the mask at these sizes equal the rule, element by element?"""
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
    result = Plan([], {}, [])
    recognised: dict[Node, MaskRule | str] = {}
    for call in find(gm):
        reason = guard.refusal(call, regions.get(call.node), min_length, compensation)
        rule = None if reason else rule_of(gm, call, inputs, recognised)
        if reason or isinstance(rule, str):
            result.refused[call.name] = reason or str(rule)
            LOGGER.debug("%s stays SDPA: %s", call.name, reason or rule)
        else:
            result.sites.append(site_of(call, rule))
            LOGGER.debug("%s: %s", call.name, result.sites[-1].mask)
    LOGGER.info("%d of %d attention calls can be sparse", len(result.sites),
                len(result.sites) + len(result.refused))  # fmt: skip
    used = {s.call.attn_mask for s in result.sites}
    rules = [r for n, r in recognised.items() if n in used and isinstance(r, MaskRule)]
    result.rules.extend(r for r in rules if r.program.sizes)
    return result


def rule_of(
    gm: GraphModule,
    call: Call,
    inputs: dict[Node, object],
    recognised: dict[Node, MaskRule | str],
) -> MaskRule | str | None:
    """The rule of a call's mask tensor, a reason against it, or None if it has no tensor."""
    if not isinstance(call.attn_mask, Node):
        return None
    if call.attn_mask not in recognised:
        recognised[call.attn_mask] = recognise(gm, call, inputs)
    return recognised[call.attn_mask]


def recognise(gm: GraphModule, call: Call, inputs: dict[Node, object]) -> MaskRule | str:
    """Run a mask's program at the real sizes and classify the result."""
    assert isinstance(call.attn_mask, Node)
    length_q, length_k = lengths(call)
    shape = value(call.attn_mask).shape
    if len(shape) < 2 or shape[-2] != length_q or shape[-1] != length_k:
        return "mask is broadcast over queries or keys"
    program = masks.extract(gm, call.attn_mask)
    if isinstance(program, str):
        return program
    sizes = [hint(inputs[n]) for n in program.sizes]
    if None in sizes:
        return "mask depends on a size that is known only at run time"
    found = masks.evaluate(program, [int(n or 0) for n in sizes])
    mask = masks.classify(found)
    if mask is None:
        return "mask is neither causal nor a sliding window"
    end = found.shape[-1] - found.shape[-2]
    symbolic = isinstance(length_q, SymInt) or isinstance(length_k, SymInt)
    from_end = symbolic and mask.causal and mask.offset == end != 0
    return MaskRule(program, Mask(mask.causal, 0, mask.window) if from_end else mask, from_end)


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
    )


def hint(size: object) -> int | None:
    """The value of a size at compile time; None if it depends on data."""
    if isinstance(size, SymInt):
        found = size.node.hint
        return None if found is None else int(found)
    return size if isinstance(size, int) else None
