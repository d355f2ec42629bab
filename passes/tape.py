"""What does a Python function of torch do inside? Its calls as nodes of a graph.

Dynamo keeps some functions of `torch.nn.functional` as one node. Here such a function runs once
more, on the fake values of its arguments, and every torch call that it makes becomes a node.
"""

import operator
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import SymFloat, SymInt, Tensor
from torch.fx import Node, Proxy
from torch.fx.node import map_arg
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from afbs_compile.passes.emit import Emitter, fake_mode
from afbs_compile.passes.sites import recorded


def inlined(
    emit: Emitter, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The nodes of what a function returns, its calls put in by `emit`.

    Raises:
        Unseen: It uses a value whose origin is not known.
    """
    tape = Tape(emit)
    for node in [n for n in tree_leaves((args, kwargs)) if isinstance(n, Node)]:
        tape.know(recorded(node), node)
    values, named = map_arg((args, kwargs), recorded)
    with fake_mode((values, named)), tape:
        result = body(function)(*values, **named)
    return tree_map(tape.node, result)


def body(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function without its first step, which hands the whole call to whoever overrides it."""
    if not isinstance(function, FunctionType):
        return function
    changed = dict.fromkeys(("has_torch_function", "has_torch_function_variadic"), no_override)
    return FunctionType(
        function.__code__, function.__globals__ | changed, function.__name__,
        function.__defaults__, function.__closure__,
    )  # fmt: skip


def no_override(*_: Any) -> bool:
    """Nobody overrides this call."""
    return False


class Tape(TorchFunctionMode):
    """Puts every torch call that runs under it into a graph."""

    def __init__(self, emit: Emitter) -> None:
        """Write through `emit`."""
        super().__init__()
        self.emit = emit
        self.nodes: dict[int, tuple[Any, Node]] = {}  # by id of the value, which is kept alive

    def know(self, value: Any, node: Node) -> None:
        """A node's value."""
        self.nodes[id(value)] = value, node

    def node(self, value: Any) -> Any:
        """The node of a value; plain values stand for themselves."""
        if isinstance(value, Tensor | SymFloat) and id(value) in self.nodes:
            return self.nodes[id(value)][1]
        if isinstance(value, Tensor):
            raise Unseen("a tensor comes from nowhere")
        if isinstance(value, SymFloat):
            if not value.node.expr.is_number:
                raise Unseen("a symbolic number comes from nowhere")
            return float(value.node.expr)
        return self.size(value) if isinstance(value, SymInt) else value

    def size(self, value: SymInt) -> Any:
        """A symbolic size, computed from the graph's inputs."""
        expression = value.node.expr
        if expression.is_number:
            return int(expression)
        graph, known = self.emit.at.graph, {}
        for node in graph.nodes:
            found = recorded(node) if node.op == "placeholder" else None
            if isinstance(found, SymInt):
                known[found.node.expr] = Proxy(node)
        if expression.free_symbols - known.keys():
            raise Unseen("a size is no input of the graph")
        before = set(graph.nodes)
        with graph.inserting_before(self.emit.at):
            found = sympy_interp(PythonReferenceAnalysis, known, expression)
        self.emit.made.extend(node for node in graph.nodes if node not in before)
        return found.node if isinstance(found, Proxy) else found

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a call and note it if it makes tensors."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if any(isinstance(x, Tensor) for x in tree_leaves(result)):
            self.note(func, tree_map(self.node, args), tree_map(self.node, kwargs), result)
        return result

    def note(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        """Put a call into the graph."""
        name = getattr(func, "__name__", "")
        if name == "__get__":
            node = self.emit.add(
                "call_function", getattr, (args[0], func.__self__.__name__), {}, result
            )
        elif getattr(torch.Tensor, name, None) == func:
            node = self.emit.add("call_method", name, tuple(args), kwargs, result)
        else:
            node = self.emit.add("call_function", func, tuple(args), kwargs, result)
        if isinstance(result, Tensor):
            self.know(result, node)
            return
        for n, part in enumerate(result):
            self.know(part, self.emit.add("call_function", operator.getitem, (node, n), {}, part))


class Unseen(RuntimeError):
    """A function did something that cannot be written down."""
