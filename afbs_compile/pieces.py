"""Where may a run of a rewritten graph be taken up again? The graph, cut once before each site.

A cut lies where the fewest values are alive between one site and the next: in a transformer after
a whole layer, where only the stream of hidden states is. Each piece is a function of its own: to
interpret a node costs the processor as much again as to launch it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from afbs_compile.capture import written
from afbs_compile.passes.rewrite import Site, rewrite


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A part of a graph, as a function.

    Attributes:
        run: Takes the values of `given` and gives those of `made`, in order.
        given: Nodes whose values it needs.
        made: Nodes whose values later pieces need.
        dead: Nodes of which nobody needs the values after it.
    """

    run: GraphModule
    given: tuple[Node, ...]
    made: tuple[Node, ...]
    dead: tuple[Node, ...]


class Pieces:
    """A graph with its sites rewritten, in pieces.

    Attributes:
        gm: The graph as it was.
        inputs: The placeholders; the last one is the policy.
        pieces: The first ends before the first site, each of the others holds one site.
        pure: Whether runs may be resumed: the graph changes no value in place and no thread's
            state.
    """

    def __init__(self, gm: GraphModule, sites: Sequence[Site], policy: Tensor) -> None:
        """Rewrite and cut `gm`; `policy` is one for its sites."""
        self.gm = gm
        whole = rewrite(gm, list(sites), policy, selector="sub8", min_length=0)
        nodes = list(whole.graph.nodes)
        self.inputs = [node for node in nodes if node.op == "placeholder"]
        self.pure = not any(written(node) or is_context(node) for node in nodes)
        body = [node for node in nodes if node.op != "placeholder"]
        bounds = [0, *cuts(body, self.inputs[-1]), len(body)]
        self.pieces = [piece(whole, body, start, end) for start, end in pairwise(bounds)]


def cuts(body: Sequence[Node], policy: Node) -> list[int]:
    """For each site, a place before it and after the one before where the least is alive.

    The first is right before its site: what precedes all layers, as masks, is computed once.
    """
    alive = [len(values) for values in living(body)]
    found: list[int] = []
    after = 0
    for n, node in enumerate(body):
        if node.all_input_nodes[:1] == [policy]:  # takes its row of the policy
            places = range(after, n + 1) if found else range(n, n + 1)
            found.append(min(reversed(places), key=alive.__getitem__))
            after = n + 1 + max(body[n + 1 :].index(user) for user in node.users) + 1
    return found


def living(body: Sequence[Node]) -> list[set[Node]]:
    """Which nodes were computed before each place and are needed at it or later."""
    own = set(body)
    alive: list[set[Node]] = []
    now: set[Node] = set()
    for node in reversed(body):
        now = (now - {node}) | (own & set(node.all_input_nodes))
        alive.append(now)
    return alive[::-1]


def piece(whole: GraphModule, body: Sequence[Node], start: int, end: int) -> Piece:
    """The nodes of a part as a function."""
    part = body[start:end]
    own, later = set(part), {x for node in body[end:] for x in node.all_input_nodes}
    given = list(dict.fromkeys(x for n in part for x in n.all_input_nodes if x not in own))
    made = [node for node in part if node in later]
    graph = Graph()
    copies = {node: graph.placeholder(f"given_{n}") for n, node in enumerate(given)}
    for node in part:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    if not part or part[-1].op != "output":
        graph.output(tuple(copies[node] for node in made))
    dead = [x for x in (*given, *made) if x not in later and x.op != "placeholder"]
    return Piece(GraphModule(whole, graph), tuple(given), tuple(made), tuple(dead))


def is_context(node: Node) -> bool:
    """Does the node begin or end a region (autocast, a choice of SDPA's kernels)?"""
    name = getattr(node.target, "__name__", "")
    return name.startswith(("_enter_", "_exit_")) or name == "_sdpa_kernel"
