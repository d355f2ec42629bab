"""What is the mask of a call? A site's mask, a part that depends on data, or a reason for neither.

A boolean mask is always something: at worst it is taken as it is, element by element. So is a
float mask: what it adds to the scores is an operand of the call.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import SymInt, Tensor
from torch.fx import GraphModule, Node

from afbs_compile.kernels.blind import ZERO
from afbs_compile.kernels.data_mask import gathered
from afbs_compile.kernels.geometry import Mask
from afbs_compile.passes import additive, data_masks, masks
from afbs_compile.passes.data_masks import DataNodes, Split
from afbs_compile.passes.masks import MaskProgram
from afbs_compile.passes.rewrite import lengths
from afbs_compile.passes.sites import UNKNOWN, Call, value

MOST_NODES = 400  # of a mask's program that is run to check what it was taken for
EMPTY_ROWS = "mask depends on data: what rows give that see nothing cannot be told"


@dataclass(frozen=True, slots=True)
class MaskRule:
    """A mask that was classified at one size and must be again at every other.

    Attributes:
        program: Computes, from sizes, the part that does not depend on data; None if it is empty.
        mask: What that part was classified as; with `from_end`, its offset counts from `Lk - Lq`.
        from_end: See `mask`.
        every_row: See `sites.Call`.
        data: The part that depends on data.
        blind: What a row is that sees nothing because of `data`.
    """

    program: MaskProgram | None
    mask: Mask
    from_end: bool = False
    every_row: bool = False
    data: DataNodes = field(default_factory=DataNodes)
    blind: str = ZERO

    @property
    def sizes(self) -> tuple[Node, ...]:
        """The symbolic sizes that the rule hangs on."""
        return self.program.inputs if self.program else ()

    def holds(self, sizes: Sequence[int]) -> bool:
        """Does the mask at these sizes equal the rule, element by element?"""
        if self.program is None:
            return True
        found = additive.boolean(masks.evaluate(self.program, sizes), every_row=self.every_row)
        if isinstance(found, str):
            return False
        length_q, length_k = found.shape[-2:]
        end = length_k - length_q if self.from_end else 0
        wanted = Mask(self.mask.causal, self.mask.offset + end, self.mask.window)
        return masks.equal(wanted, found)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What is known of a graph, for all of its masks.

    Attributes:
        gm: The graph.
        inputs: Values of its placeholders, `SymInt` for symbolic sizes.
        depends: Tells whether a node hangs on more than sizes.
        unstable: Nodes whose values may change after they were computed.
    """

    gm: GraphModule
    inputs: Mapping[Node, object]
    depends: Callable[[Node], bool]
    unstable: Container[Node]

    @staticmethod
    def of(gm: GraphModule, inputs: Mapping[Node, object]) -> "Surroundings":
        """Look at a graph once."""
        return Surroundings(gm, inputs, masks.dependent(gm), masks.unstable(gm))

    def given(self, program: MaskProgram) -> list[object] | None:
        """Real values of what a program reads; None if a size is known only at run time."""
        values = [self.inputs[n] for n in program.inputs]
        known = [hint(x) if isinstance(x, SymInt) else x for x in values]
        return None if None in (x for x in known if not isinstance(x, Tensor)) else known


def recognise(around: Surroundings, call: Call) -> MaskRule | str:
    """The rule of a call's mask tensor, or a reason against it."""
    assert isinstance(call.attn_mask, Node)
    if value(call.attn_mask).is_floating_point():
        return added(around, call)
    split = data_masks.split(call.attn_mask, around.depends, around.unstable)
    found: MaskRule | str | None = None
    if split.static or split.ordered:
        found = constant(around, call, split)
    elif agrees(around, call, split, Mask()):
        found = MaskRule(None, Mask(), every_row=call.every_row, data=split.data)
    if not isinstance(found, MaskRule):
        if found == additive.BLIND:
            return found
        found = MaskRule(None, Mask(), data=DataNodes(elements=call.attn_mask))
    if not found.data:
        return found
    return EMPTY_ROWS if call.blind == UNKNOWN else replace(found, blind=call.blind)


def added(around: Surroundings, call: Call) -> MaskRule | str:
    """The rule of a float mask: a site's mask if it is one for every size, else a bias.

    A bias is read when the call is made, as SDPA would: it may hang on what it likes.
    """
    assert isinstance(call.attn_mask, Node)
    if not around.depends(call.attn_mask) and call.attn_mask not in around.unstable:
        found = constant(around, call, Split(DataNodes(), [call.attn_mask]))
        if isinstance(found, MaskRule):
            return found
    if call.blind == UNKNOWN:
        return EMPTY_ROWS
    return MaskRule(None, Mask(), data=DataNodes(bias=call.attn_mask), blind=call.blind)


def constant(around: Surroundings, call: Call, split: Split) -> MaskRule | str:
    """Run the part of a mask that hangs on sizes at the real ones, and classify the result."""
    length_q, length_k = lengths(call)
    program = masks.conjunction(around.gm, split.static, split.ordered)
    sizes = around.given(program)
    if sizes is None:
        return "mask depends on a size that is known only at run time"
    every_row = call.every_row and not split.data
    seen = additive.boolean(masks.evaluate(program, sizes), every_row=every_row)
    if isinstance(seen, str):
        return seen
    wide = at_lengths(seen, length_q, length_k)
    if wide is None and not bool(seen.all()):
        return "mask is broadcast over queries or keys"
    mask = Mask() if wide is None else masks.classify(wide)
    if mask is None or not agrees(around, call, split, mask):
        return "mask is neither causal nor a sliding window"
    end = 0 if wide is None else wide.shape[-1] - wide.shape[-2]
    symbolic = isinstance(length_q, SymInt) or isinstance(length_k, SymInt)
    from_end = symbolic and mask.causal and mask.offset == end != 0
    own = Mask(mask.causal, 0, mask.window) if from_end else mask
    return MaskRule(program, own, from_end, every_row, split.data)


def agrees(around: Surroundings, call: Call, split: Split, mask: Mask) -> bool:
    """Is the split mask the graph's own on the real inputs, element by element?

    Broadcasting proves it for all inputs; this is a check of the proof. True without data.
    """
    assert isinstance(call.attn_mask, Node)
    if not split.data or split.data.elements is not None:
        return True
    if len(masks.ancestors(call.attn_mask)) > MOST_NODES:  # do not run half a model for it
        return False
    whole, *parts = (
        run(around, node) if node else None for node in (call.attn_mask, *split.data)
    )  # fmt: skip
    if whole is None:
        return False
    data = gathered(parts, (whole.shape[-2], whole.shape[-1]))
    assert data is not None
    found = data.tokens(0, whole.shape[-2]) & masks.as_tensor(mask, whole)
    return torch.equal(found.expand_as(whole), whole)


def run(around: Surroundings, node: Node) -> Tensor | None:
    """The value of a node on the real inputs; None if a size is known only at run time."""
    program = masks.conjunction(around.gm, [node])
    given = around.given(program)
    return None if given is None else masks.evaluate(program, given)


def at_lengths(mask: Tensor, length_q: int | SymInt, length_k: int | SymInt) -> Tensor | None:
    """A mask as `[..., Lq, Lk]`; None if it is broadcast along a symbolic length."""
    wanted: list[int] = []
    for length, size in zip((length_q, length_k), mask.shape[-2:], strict=True):
        if isinstance(length, SymInt) and size == 1:
            return None
        wanted.append(size if isinstance(length, SymInt) else length)
    return mask.expand(*mask.shape[:-2], *wanted)


def hint(size: object) -> int | None:
    """The value of a size at compile time; None if it depends on data."""
    if isinstance(size, SymInt):
        found = size.node.hint
        return None if found is None else int(found)
    return size if isinstance(size, int) else None
