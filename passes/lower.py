"""Which attention of a graph is not written as SDPA? All of it becomes SDPA, as far as it can.

| form | pass |
|---|---|
| subgraphs of activation checkpointing and `nested_compile_region` | `regions` |
| `nn.MultiheadAttention`, `nn.TransformerEncoderLayer` | `modules` |
| matmul, softmax, matmul | `chains` |
| a fused kernel of SDPA by its own name | `fused` |
| SDPA on three axes | `views` |
| SDPA with a float mask that is a boolean one | `disguise` |
What SDPA stands for is kept until the call is accepted (`forms.Form`).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from torch.fx import GraphModule, Node

from afbs_compile.passes import chains, disguise, fused, modules, regions, views
from afbs_compile.passes.copying import copy
from afbs_compile.passes.forms import Form
from afbs_compile.passes.spellings import is_softmax

PASSES: tuple[Callable[[GraphModule], Iterable[Form | tuple[Node, str]]], ...] = (
    regions.lower,
    modules.lower,
    chains.lower,
    fused.lower,
    views.lower,
    disguise.lower,
)


@dataclass(slots=True)
class Lowered:
    """A graph whose attention is SDPA.

    Attributes:
        gm: A copy of the graph, or the graph itself if there was nothing to do.
        forms: What was turned into SDPA, in order.
        refused: Nodes that are attention, and why they could not be.
    """

    gm: GraphModule
    forms: list[Form] = field(default_factory=list)
    refused: dict[Node, str] = field(default_factory=dict)

    def settle(self, refused: Iterable[Node]) -> None:
        """Put refused calls back as they were, and drop what accepted ones stand for."""
        back = set(refused)
        kept = []
        for form in reversed(self.forms):
            if form.sdpa in back:
                form.undo()
                back.update(old for old, _ in form.swaps)  # it may stand for another form's call
            else:
                kept.append(form)
        for form in kept:
            form.settle()
        self.gm.graph.lint()
        self.gm.recompile()


def lower(gm: GraphModule) -> Lowered:
    """Turn a graph's attention into SDPA; the graph itself is not changed."""
    known = any(is_softmax(n) or modules.is_module(n) or fused.is_fused(n) for n in gm.graph.nodes)
    others = (views.candidates, regions.candidates, disguise.candidates)
    if not known and not any(find(gm) for find in others):
        return Lowered(gm)
    result = Lowered(copy(gm)[0])
    reasons: dict[Node, str | None] = {}
    for run in PASSES:
        for found in run(result.gm):
            if isinstance(found, Form):
                # what stands for another form's call is refused with it
                earlier = (reasons.get(old) for old, _ in found.swaps)
                reason = next(filter(None, (found.reason, *earlier)), None)
                reasons[found.sdpa] = reason
                result.forms.append(replace(found, reason=reason))
            else:
                result.refused[found[0]] = found[1]
    return result
