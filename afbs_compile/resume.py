"""Which part of a run need not be repeated? Runs of one graph under many policies, resumed.

What a graph computes before a site hangs on the policies of the sites before it alone. So the
values that are alive at a site are kept under those policies, and a run with an equal beginning
goes on from there. The least recently used go when memory is full. Nothing waits for a device.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from afbs_compile.capture import private, remaining_uses, written
from afbs_compile.passes.rewrite import Site, rewrite

OP = torch.ops.afbs.attention.default
Values = dict[Node, Any]


class Resumable:
    """A graph on one set of inputs, with its sites rewritten.

    Attributes:
        ran: Sites that were run, over all runs; what resuming saves shows in it.
        size_bytes: Memory of what is kept, without the graph's inputs; what two runs share counts
            for each.
    """

    def __init__(
        self,
        gm: GraphModule,
        args: Sequence[Any],
        sites: Sequence[Site],
        policy: Tensor,
        memory_bytes: int,
    ) -> None:
        """Rewrite `gm`; `args` are its inputs, `policy` is one for its sites.

        A graph that changes a value in place, or the thread's state, is run from the beginning
        every time.
        """
        self.gm, self.args, self.memory_bytes = gm, list(args), memory_bytes
        self.rewritten = rewrite(gm, list(sites), policy, selector="sub8", min_length=0)
        self.nodes = list(self.rewritten.graph.nodes)
        self.inputs = [node for node in self.nodes if node.op == "placeholder"]
        self.policy = self.inputs[-1]
        self.starts = starts(self.nodes, self.policy)
        self.dead = remaining_uses(self.rewritten)
        self.pure = not any(written(node) or is_context(node) for node in self.nodes)
        self.interpreter = Interpreter(self.rewritten)
        self.places = {place(x) for x in self.args if isinstance(x, Tensor)}
        self.kept: OrderedDict[tuple[Hashable, ...], tuple[Values, int]] = OrderedDict()
        self.size_bytes = 0
        self.ran = 0

    @torch.no_grad()
    def run(self, keys: Sequence[Hashable], policy: Tensor) -> Any:
        """The graph's output.

        Args:
            keys: One a site, in the graph's order: equal keys mean equal policies.
            policy: `[sites, Hmax, COLUMNS]` on the inputs' device.
        """
        begin, values = self.resumed(tuple(keys))
        values[self.policy] = policy
        site = self.starts.index(begin) if begin in self.starts else 0
        self.ran += len(self.starts) - site
        self.interpreter.env = values
        for n in range(begin, len(self.nodes)):
            if site < len(self.starts) and n == self.starts[site]:
                self.keep(tuple(keys[:site]), values)
                site += 1
            node = self.nodes[n]
            if node.op == "output":
                return self.interpreter.run_node(node)
            if node not in values:  # inputs are there already
                values[node] = self.interpreter.run_node(node)
            for used in (node, *self.dead.get(node, ())):
                if used is not node or not node.users:
                    values.pop(used, None)
        raise AssertionError("a graph ends in its output")

    def resumed(self, keys: tuple[Hashable, ...]) -> tuple[int, Values]:
        """Where to begin, and the values that are alive there."""
        for length in reversed(range(len(self.starts))):
            if keys[:length] in self.kept:
                for shorter in range(length + 1):
                    if keys[:shorter] in self.kept:
                        self.kept.move_to_end(keys[:shorter])
                given = dict(zip(self.inputs[:-1], self.args, strict=True))
                return self.starts[length], given | self.kept[keys[:length]][0]
        given = dict(zip(self.inputs[:-1], private(self.gm, self.args), strict=True))
        return 0, given

    def keep(self, beginning: tuple[Hashable, ...], values: Values) -> None:
        """Keep what is alive at a site, as far as memory goes."""
        if not self.pure or beginning in self.kept:
            return
        own = {node: x for node, x in values.items() if node.op != "placeholder"}
        size = sum(
            x.untyped_storage().nbytes()
            for x in own.values()
            if isinstance(x, Tensor) and place(x) not in self.places
        )
        self.kept[beginning] = own, size
        self.size_bytes += size
        while self.kept and self.size_bytes > self.memory_bytes:
            self.size_bytes -= self.kept.popitem(last=False)[1][1]


def place(x: Tensor) -> int:
    """Where a tensor's memory is."""
    return x.untyped_storage().data_ptr()


def is_context(node: Node) -> bool:
    """Does the node begin or end a region (autocast, a choice of SDPA's kernels)?"""
    name = getattr(node.target, "__name__", "")
    return name.startswith(("_enter_", "_exit_")) or name == "_sdpa_kernel"


def starts(nodes: Sequence[Node], policy: Node) -> list[int]:
    """Where each site begins: at the node that takes its row of the policy."""
    return [n for n, node in enumerate(nodes) if node.all_input_nodes[:1] == [policy]]
