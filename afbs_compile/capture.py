"""What do the attention sites really see? q, k and v of one layer at a time, from real inputs.

Runs Dynamo's graph with `fx.Interpreter`, dense, and stops at every site. Only the current layer's
tensors are alive. Asking for an earlier site starts a new pass, so a search that walks the layers
in order costs one forward pass a phase.
"""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from afbs_compile.kernels.data_mask import DataMask, gathered
from afbs_compile.kernels.geometry import Mask
from afbs_compile.passes.rewrite import Site

OF_A_KEYWORD = (operator.and_, operator.or_, operator.not_, operator.is_)  # these write nothing
WRITING = ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "iand", "ior")


@dataclass(frozen=True, slots=True)
class Layer:
    """The inputs of one site in one forward pass.

    Attributes:
        q: `[B, Hq, Lq, D]`.
        k: `[B, Hkv, Lk, D]`, heads not repeated.
        v: `[B, Hkv, Lk, D]`.
        mask: The site's mask with its offset counted from 0.
        scale: Multiplier on q·k.
        data: The part of the mask that comes with the call.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    scale: float
    data: DataMask | None = None


class Casts:
    """The autocast regions that a pass is in; it leaves them while others work."""

    def __init__(self) -> None:
        """In none."""
        self.open: list[Any] = []
        self.inside = True

    def note(self, node: Node, env: dict[Node, Any]) -> None:
        """A node has run; it may have begun or ended a region."""
        name = getattr(node.target, "__name__", "")
        if name == "_enter_autocast":
            self.open.append(env[node])
        elif name == "_exit_autocast":
            self.open.remove(env[node.args[0]])  # type: ignore[index]

    def leave(self) -> None:
        """Put the thread's own autocast state back."""
        if self.inside:
            for mode in reversed(self.open):
                mode.__exit__(None, None, None)
        self.inside = False

    def enter(self) -> None:
        """Go on inside."""
        for mode in self.open:
            mode.__enter__()
        self.inside = True


class Stream:
    """Layers of a graph on one set of inputs.

    Inputs that the graph may change in place are copied for every pass, and random states are put
    back, so that the caller's own run sees the world as it was. Unless the pass is that very run:
    then there is one, it changes what the graph changes, and it has an output.
    """

    def __init__(
        self,
        gm: GraphModule,
        inputs: Sequence[Any],
        sites: Sequence[Site],
        *,
        own_run: bool = False,
    ) -> None:
        """Prepare passes of `gm` over `inputs` (real tensors and ints, one a placeholder)."""
        self.gm, self.inputs, self.sites = gm, inputs, list(sites)
        self.own_run, self.output = own_run, None
        self.order = {site.name: n for n, site in enumerate(sites)}
        self.position = len(self.sites)
        self.layers: Iterator[Layer] = iter(())
        self.current: Layer | None = None

    def layer(self, name: str) -> Layer:
        """The layer of a site, from the running pass or a new one."""
        wanted = self.order[name]
        if self.current is None or wanted < self.position:
            self.layers, self.position = self.run(), -1
        while self.position < wanted:
            self.current = next(self.layers)
            self.position += 1
        assert self.current is not None
        return self.current

    def finish(self) -> Any:
        """The output of the graph, at the end of its own run."""
        if self.current is None:
            self.layers = self.run()
        for _ in self.layers:
            pass  # sites that nobody asked for
        return self.output

    def run(self) -> Iterator[Layer]:
        """One pass; yields each site's layer before the site runs."""
        by_node = {site.call.node: site for site in self.sites}
        interpreter, casts = Interpreter(self.gm), Casts()
        given = self.inputs if self.own_run else private(self.gm, self.inputs)
        interpreter.args_iter = iter(given)
        uses = remaining_uses(self.gm, self.sites)
        left = len(self.sites)
        try:
            for node in self.gm.graph.nodes:
                if site := by_node.get(node):
                    layer = layer_of(interpreter, site)
                    casts.leave()
                    yield layer
                    left -= 1
                    if not left and not self.own_run:
                        return
                    casts.enter()
                with torch.no_grad():
                    self.output = interpreter.env[node] = step(interpreter, node)
                casts.note(node, interpreter.env)
                for used in uses.get(node, ()):
                    interpreter.env.pop(used, None)
        finally:
            casts.leave()


def step(interpreter: Interpreter, node: Node) -> Any:
    """Run one node, but not the choice of SDPA's kernels, which is the whole thread's."""
    if getattr(node.target, "__name__", "") == "_sdpa_kernel":
        return None
    return interpreter.run_node(node)


def layer_of(interpreter: Interpreter, site: Site) -> Layer:
    """The site's inputs out of the interpreter's environment, as autocast makes them."""
    q, k, v = (interpreter.env[n] for n in (site.call.query, site.key, site.value))
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) for x in (q, k, v))
    scale = site.scale
    if scale is None:
        assert isinstance(site.call.scale, Node)
        scale = float(interpreter.env[site.call.scale])
    parts = [None if node is None else interpreter.env[node] for node in site.data]
    lengths = q.shape[2], k.shape[2]
    return Layer(q, k, v, mask_at(site, *lengths), scale, gathered(parts, lengths))


def mask_at(site: Site, length_q: int, length_k: int) -> Mask:
    """The site's mask for given lengths."""
    if not site.from_end:
        return site.mask
    return Mask(True, site.mask.offset + length_k - length_q, site.mask.window)


def remaining_uses(gm: GraphModule, sites: Sequence[Site] = ()) -> dict[Node, list[Node]]:
    """For every node, the values that neither the graph nor a site needs after it."""
    read = {site.call.node: (site.key, site.value, *filter(None, site.data)) for site in sites}
    last: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        for used in (*node.all_input_nodes, *read.get(node, ())):
            last[used] = node
    dead: dict[Node, list[Node]] = {}
    for used, user in last.items():
        dead.setdefault(user, []).append(used)
    return dead


def private(gm: GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """The inputs, with those copied that the graph might write to."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    return [
        copied(x) if isinstance(x, Tensor) and (not is_weight(x) or written(n)) else x
        for n, x in zip(placeholders, inputs, strict=True)
    ]


def copied(x: Tensor) -> Tensor:
    """A copy that shares no memory."""
    return x.detach().clone()


def is_weight(x: Tensor) -> bool:
    """Parameters are large and hardly ever written to."""
    return isinstance(x, torch.nn.Parameter)


def written(node: Node) -> bool:
    """Does a user of the node change it in place (`x.add_()`, `x[...] = y`, `x += y`)?"""
    for user in node.users:
        if user.target in OF_A_KEYWORD:
            continue
        name = (
            user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
        )
        in_place = name.endswith("_") and not name.endswith("__")
        if (in_place or name in WRITING) and user.args[:1] == (node,):
            return True
    return False
