"""Which part of a run need not be repeated? Runs of one graph under many policies, resumed.

What a graph computes before a site hangs on the policies of the sites before it alone. So the
values that are alive there are kept under those policies, and a run with an equal beginning goes
on from there. The least recently used go when memory is full. Nothing waits for a device.
"""

import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from afbs_compile.capture import private
from afbs_compile.pieces import Pieces

PATHS = 2  # runs that memory should hold; else fewer places of a run are kept
Values = dict[Node, Any]


class Resumable:
    """A graph on one set of inputs.

    Attributes:
        ran: Sites that were run, over all runs; what resuming saves shows in it.
        size_bytes: Memory of what is kept, without the graph's inputs; what two runs share counts
            for each.
        every: Values are kept before each so many sites.
    """

    def __init__(self, pieces: Pieces, args: Sequence[Any], memory_bytes: int) -> None:
        """Ready to run; `args` are the graph's inputs without the policy.

        A graph that changes a value in place, or the thread's state, is run from the beginning
        every time.
        """
        self.pieces, self.args, self.memory_bytes = pieces, list(args), memory_bytes
        self.places = {place(x) for x in self.args if isinstance(x, Tensor)}
        self.kept: OrderedDict[tuple[Hashable, ...], tuple[Values, int]] = OrderedDict()
        self.size_bytes = 0
        self.ran = 0
        self.every = 1

    @torch.no_grad()
    def run(self, keys: Sequence[Hashable], policy: Tensor) -> Any:
        """The graph's output.

        Args:
            keys: One a site, in the graph's order: equal keys mean equal policies.
            policy: `[sites, Hmax, COLUMNS]` on the inputs' device.
        """
        begin, values = self.resumed(tuple(keys))
        values[self.pieces.inputs[-1]] = policy
        self.ran += len(keys) + 1 - max(begin, 1)
        result = None
        for n, piece in enumerate(self.pieces.pieces[begin:], begin):
            if n:
                self.keep(tuple(keys[: n - 1]), values)
            result = piece.run(*(values[node] for node in piece.given))
            if n + 1 < len(self.pieces.pieces):
                values.update(zip(piece.made, result, strict=True))
            for node in piece.dead:
                values.pop(node, None)
        return result

    def resumed(self, keys: tuple[Hashable, ...]) -> tuple[int, Values]:
        """The piece to begin with, and the values that are alive there."""
        inputs = self.pieces.inputs[:-1]
        for length in reversed(range(len(keys))):
            if keys[:length] in self.kept:
                for shorter in range(length + 1):
                    if keys[:shorter] in self.kept:
                        self.kept.move_to_end(keys[:shorter])
                given = dict(zip(inputs, self.args, strict=True))
                return length + 1, given | self.kept[keys[:length]][0]
        return 0, dict(zip(inputs, private(self.pieces.gm, self.args), strict=True))

    def keep(self, beginning: tuple[Hashable, ...], values: Values) -> None:
        """Keep what is alive before a site, as far as memory goes."""
        if not self.pieces.pure or beginning in self.kept or len(beginning) % self.every:
            return
        own = {node: x for node, x in values.items() if node.op != "placeholder"}
        size = sum(
            x.untyped_storage().nbytes()
            for x in own.values()
            if isinstance(x, Tensor) and place(x) not in self.places
        )
        if beginning:  # there is more before the first site, and only once
            self.every = max(self.every, self.spacing(size))
        self.kept[beginning] = own, size
        self.size_bytes += size
        while self.kept and self.size_bytes > self.memory_bytes:
            self.size_bytes -= self.kept.popitem(last=False)[1][1]

    def spacing(self, size: int) -> int:
        """How many sites apart values of so many bytes can be kept for some runs."""
        sites = len(self.pieces.pieces) - 1
        return max(1, math.ceil(PATHS * sites * size / max(self.memory_bytes, 1)))


def place(x: Tensor) -> int:
    """Where a tensor's memory is."""
    return x.untyped_storage().data_ptr()
