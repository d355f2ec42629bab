"""Which calls of a graph will be rewritten, as what, and which stay dense for which reason?"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from afbs_compile.kernels.blind import ZERO
from afbs_compile.kernels.geometry import Mask
from afbs_compile.passes import gqa, guard, rules
from afbs_compile.passes.data_masks import DataNodes
from afbs_compile.passes.lower import lower
from afbs_compile.passes.rewrite import Site
from afbs_compile.passes.rules import MaskRule, Surroundings
from afbs_compile.passes.sites import Call, find, names, value

LOGGER = logging.getLogger(__name__)


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


Recognised = dict[tuple[Node, str], MaskRule | str]  # by mask and `blind`


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
    contexts = guard.contexts(work.graph)
    standing = {form.sdpa: form.reason for form in lowered.forms}
    around = rules.Surroundings.of(work, inputs)
    recognised: Recognised = {}
    back = []
    for call in find(work, lowered.refused):
        reason = standing.get(call.node) or guard.refusal(
            call, contexts[call.node], min_length, compensation
        )
        rule = None if reason else rule_of(around, call, recognised)
        if isinstance(rule, MaskRule) and rule.data:
            reason = guard.data_refusal(call, compensation)
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
    used = {(s.call.attn_mask, s.call.blind) for s in sites}
    found = [r for key, r in recognised.items() if key in used and isinstance(r, MaskRule)]
    return [r for r in found if r.sizes]


def log(found: Plan) -> None:
    """Write a plan down."""
    for name, reason in found.refused.items():
        LOGGER.debug("%s stays dense: %s", name, reason)
    for site in found.sites:
        LOGGER.debug("%s: %s %s", site.name, site.mask, site.data.kind)
    every = len(found.sites) + len(found.refused)
    LOGGER.info("%d of %d attention calls can be sparse", len(found.sites), every)


def rule_of(around: Surroundings, call: Call, recognised: Recognised) -> MaskRule | str | None:
    """The rule of a call's mask tensor, a reason against it, or None if it has no tensor."""
    if not isinstance(call.attn_mask, Node):
        return None
    key = call.attn_mask, call.blind
    if key not in recognised:
        recognised[key] = rules.recognise(around, call)
    return recognised[key]


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
        blind=rule.blind if rule else ZERO,
    )
