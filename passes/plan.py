"""Which calls of a graph will be rewritten, as what, and which stay dense for which reason?"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import SymInt, Tensor
from torch.fx import GraphModule, Node

from afbs_compile.kernels.geometry import Mask
from afbs_compile.passes import additive, gqa, guard, masks
from afbs_compile.passes.lower import lower
from afbs_compile.passes.masks import MaskProgram
from afbs_compile.passes.rewrite import Site, lengths
from afbs_compile.passes.sites import Call, find, names, value

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MaskRule:
    """A mask that was classified at one size and must be again at every other.

    Attributes:
        program: Computes the mask from sizes.
        mask: What it was classified as; with `from_end`, its offset is counted from `Lk - Lq`.
        from_end: See `mask`.
        every_row: See `sites.Call`.
    """

    program: MaskProgram
    mask: Mask
    from_end: bool
    every_row: bool = False

    def holds(self, sizes: Sequence[int]) -> bool:
        """Does the mask at these sizes equal the rule, element by element?"""
        found = additive.boolean(masks.evaluate(self.program, sizes), every_row=self.every_row)
        if isinstance(found, str):
            return False
        length_q, length_k = found.shape[-2:]
        end = length_k - length_q if self.from_end else 0
        wanted = Mask(self.mask.causal, self.mask.offset + end, self.mask.window)
        return masks.equal(wanted, found)


@dataclass(frozen=True, slots=True)
class Plan:
    """What will become of a graph.

    Attributes:
        gm: The graph, its attention written as SDPA where it is to be rewritten.
        sites: Calls of `gm` to rewrite.
        refused: Reasons by site name.
        rules: Mask rules that hang on symbolic sizes.
    """

    gm: GraphModule
    sites: list[Site]
    refused: dict[str, str]
    rules: list[MaskRule]


Recognised = dict[tuple[Node, bool], MaskRule | str]  # by mask and `every_row`


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
    lowered = lower(gm)
    work, named = lowered.gm, names(lowered.gm, lowered.refused)
    placeholders = [n for n in work.graph.nodes if n.op == "placeholder"]
    inputs = dict(zip(placeholders, example_inputs, strict=True))
    result = Plan(work, [], {named[n]: reason for n, reason in lowered.refused.items()}, [])
    around = guard.contexts(work.graph)
    standing = {form.sdpa: form.reason for form in lowered.forms}
    recognised: Recognised = {}
    back = []
    for call in find(work, lowered.refused):
        reason = standing.get(call.node) or guard.refusal(
            call, around[call.node], min_length, compensation
        )
        rule = None if reason else rule_of(work, call, inputs, recognised)
        if reason or isinstance(rule, str):
            result.refused[call.name] = reason or str(rule)
            back.append(call.node)
        else:
            result.sites.append(site_of(call, rule))
    lowered.settle(back)
    result.rules.extend(rules_in_use(result.sites, recognised))
    log(result)
    return result


def rules_in_use(sites: Sequence[Site], recognised: Recognised) -> list[MaskRule]:
    """The rules of some sites that hang on symbolic sizes."""
    used = {(s.call.attn_mask, s.call.every_row) for s in sites}
    rules = [r for key, r in recognised.items() if key in used and isinstance(r, MaskRule)]
    return [r for r in rules if r.program.sizes]


def log(found: Plan) -> None:
    """Write a plan down."""
    for name, reason in found.refused.items():
        LOGGER.debug("%s stays dense: %s", name, reason)
    for site in found.sites:
        LOGGER.debug("%s: %s", site.name, site.mask)
    every = len(found.sites) + len(found.refused)
    LOGGER.info("%d of %d attention calls can be sparse", len(found.sites), every)


def rule_of(
    gm: GraphModule,
    call: Call,
    inputs: dict[Node, object],
    recognised: Recognised,
) -> MaskRule | str | None:
    """The rule of a call's mask tensor, a reason against it, or None if it has no tensor."""
    if not isinstance(call.attn_mask, Node):
        return None
    key = call.attn_mask, call.every_row
    if key not in recognised:
        recognised[key] = recognise(gm, call, inputs)
    return recognised[key]


def recognise(gm: GraphModule, call: Call, inputs: dict[Node, object]) -> MaskRule | str:
    """Run a mask's program at the real sizes and classify the result."""
    assert isinstance(call.attn_mask, Node)
    length_q, length_k = lengths(call)
    program = masks.extract(gm, call.attn_mask)
    if isinstance(program, str):
        is_float = value(call.attn_mask).is_floating_point()
        return f"additive float mask: {program}" if is_float else program
    sizes = [hint(inputs[n]) for n in program.sizes]
    if None in sizes:
        return "mask depends on a size that is known only at run time"
    found = at_lengths(masks.evaluate(program, [int(n or 0) for n in sizes]), length_q, length_k)
    if found is None:
        return "mask is broadcast over queries or keys"
    seen = additive.boolean(found, every_row=call.every_row)
    if isinstance(seen, str):
        return seen
    mask = masks.classify(seen)
    if mask is None:
        return "mask is neither causal nor a sliding window"
    end = found.shape[-1] - found.shape[-2]
    symbolic = isinstance(length_q, SymInt) or isinstance(length_k, SymInt)
    from_end = symbolic and mask.causal and mask.offset == end != 0
    rule = Mask(mask.causal, 0, mask.window) if from_end else mask
    return MaskRule(program, rule, from_end, call.every_row)


def at_lengths(mask: Tensor, length_q: int | SymInt, length_k: int | SymInt) -> Tensor | None:
    """A mask as `[..., Lq, Lk]`; None if it is broadcast along a symbolic length."""
    rows = mask[(None,) * (2 - mask.dim())] if mask.dim() < 2 else mask
    wanted: list[int] = []
    for length, size in zip((length_q, length_k), rows.shape[-2:], strict=True):
        if isinstance(length, SymInt) and size == 1:
            return None
        wanted.append(size if isinstance(length, SymInt) else length)
    return rows.expand(*rows.shape[:-2], *wanted)


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
