"""What do the inputs of a Dynamo graph mean? Some are sizes, some belong to the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import GraphModule, Node

from afbs_compile.passes.rewrite import Site
from afbs_compile.passes.sites import dotted, value

Sizes = tuple[int, ...]


def weight_names(gm: GraphModule, inputs: Sequence[Any]) -> dict[int, str]:
    """Places and module paths of the inputs that belong to the model rather than to the call."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    sources = [source_name(node) for node in placeholders]
    return {
        n: dotted(source)
        for n, (source, x) in enumerate(zip(sources, inputs, strict=True))
        if isinstance(x, torch.nn.Parameter) or (isinstance(x, Tensor) and "_buffers" in source)
    }


def source_name(node: Node) -> str:
    """Where Dynamo found an input, as text."""
    name = getattr(getattr(node, "_dynamo_source", None), "name", node.name)
    return str(name() if callable(name) else name)


@dataclass(frozen=True, slots=True)
class Shapes:
    """Symbolic sizes of a graph: where they come in, and what they make of a length.

    Attributes:
        positions: Places of the sizes among the graph's inputs.
        symbols: Their sympy symbols, in the same order.
        lengths: Key length of every site: an int or a sympy expression.
        queries: Query length of every site, likewise.
    """

    positions: tuple[int, ...]
    symbols: tuple[Any, ...]
    lengths: tuple[Any, ...]
    queries: tuple[Any, ...]

    @staticmethod
    def of(inputs: Sequence[Any], sites: Sequence[Site]) -> "Shapes":
        """Read them off the compile-time inputs and the sites' fake tensors."""
        places = tuple(n for n, x in enumerate(inputs) if isinstance(x, SymInt))
        symbols = tuple(inputs[n].node.expr for n in places)
        keys = {expression(value(site.key).shape[2]) for site in sites}
        queries = {expression(value(site.call.query).shape[2]) for site in sites}
        return Shapes(places, symbols, tuple(keys), tuple(queries))

    def sizes(self, args: Sequence[Any]) -> Sizes:
        """The call's symbolic sizes."""
        return tuple(args[n] for n in self.positions)

    def length(self, sizes: Sizes) -> int:
        """The longest key length of any site, in tokens."""
        return self.largest(self.lengths, sizes)

    def query_length(self, sizes: Sizes) -> int:
        """The longest query length of any site, in tokens; chunks of a prompt have fewer."""
        return self.largest(self.queries, sizes)

    def largest(self, expressions: tuple[Any, ...], sizes: Sizes) -> int:
        """The largest of some expressions at a call's sizes."""
        known = dict(zip(self.symbols, sizes, strict=True))
        return max(n if isinstance(n, int) else int(n.xreplace(known)) for n in expressions)


def expression(size: Any) -> Any:
    """A size as an int or a sympy expression."""
    return size.node.expr if isinstance(size, SymInt) else size
