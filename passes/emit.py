"""How does a pass put new nodes into a Dynamo graph, with the values that Dynamo would record?

Dynamo keeps a fake tensor in every node's meta; checks and later passes read shapes and dtypes off
it. A new node's value is its target's result on the fake values of its arguments.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from afbs_compile.passes.sites import recorded

KEPT = ("nn_module_stack", "stack_trace", "source_fn_stack", "recompute", "ac_graph_id")


@dataclass(slots=True)
class Emitter:
    """Inserts nodes before `at`, in its module's name.

    Attributes:
        at: The node that the new ones come before.
        made: All that were inserted, in order.
    """

    at: Node
    made: list[Node] = field(default_factory=list)

    def method(self, name: str, *args: Any, **kwargs: Any) -> Node:
        """A method call; its first argument is the object."""
        values, named = map_arg((args, kwargs), recorded)
        with fake_mode((values, named)):
            found = getattr(values[0], name)(*values[1:], **named)
        return self.add("call_method", name, args, kwargs, found)

    def function(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """A function call."""
        values, named = map_arg((args, kwargs), recorded)
        with fake_mode((values, named)):
            found = target(*values, **named)
        return self.add("call_function", target, args, kwargs, found)

    def add(
        self,
        op: str,
        target: Callable[..., Any] | str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        found: Any,
    ) -> Node:
        """A node whose value is known."""
        with self.at.graph.inserting_before(self.at):
            node = self.at.graph.create_node(op, target, args, kwargs)
        for key in KEPT:
            if key in self.at.meta:
                node.meta[key] = self.at.meta[key]
        node.meta["example_value"] = found
        self.made.append(node)
        return node


@contextmanager
def fake_mode(values: Any) -> Iterator[None]:
    """The mode that the fake tensors among some values belong to, with all that Dynamo has around.

    Without Python's dispatcher composite operators of torch 2.11 ask for sizes as plain numbers,
    which would fix symbolic ones.
    """
    fakes = (x.fake_mode for x in tree_leaves(values) if isinstance(x, FakeTensor))
    with next(fakes, nullcontext()), enable_python_dispatcher():
        yield
