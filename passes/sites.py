"""Where does a Dynamo graph call scaled-dot-product attention, and with what?

Every spelling (positional, keyword, `F`, `torch._C._nn`, `aten`) ends as one `Call`.
"""

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from afbs_compile.kernels.blind import ZERO

Argument = Node | float | bool | None

SDPA = frozenset(
    {
        torch.nn.functional.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention.default,
    }
)
BLIND = "afbs_blind"  # in a node's meta: see `Call.blind`
UNKNOWN = "unknown"  # of `Call.blind`: no kernel can say it
POSITIONAL = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
DEFAULTS = {
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}


@dataclass(frozen=True, slots=True)
class Call:
    """One SDPA node, its arguments by SDPA's own names, and the path of its module.

    Attributes:
        name: The path.
        blind: What a row is that sees nothing, see `kernels.blind`: the call may have been softmax
            once, which differs from SDPA there.
    """

    node: Node
    name: str
    query: Node
    key: Node
    value: Node
    attn_mask: Argument = None
    dropout_p: Argument = 0.0
    is_causal: Argument = False
    scale: Argument = None
    enable_gqa: Argument = False
    blind: str = ZERO

    @property
    def every_row(self) -> bool:
        """Must every row see a key, for SDPA to be what the call stands for?"""
        return self.blind != ZERO


def find(gm: GraphModule, others: Container[Node] = ()) -> list[Call]:
    """All SDPA calls of the graph in order, each under its name among `others`."""
    named = names(gm, others).items()
    return [normalise(node, name) for node, name in named if is_sdpa(node)]


def is_sdpa(node: Node) -> bool:
    """Does the node call SDPA, in any spelling?"""
    return node.op == "call_function" and node.target in SDPA


def names(gm: GraphModule, others: Container[Node] = ()) -> dict[Node, str]:
    """Names of the SDPA calls that somebody reads, and of some other nodes.

    A name is the module's path, with a number from the module's second node on.
    """
    found: dict[Node, str] = {}
    seen: dict[str, int] = {}
    for node in gm.graph.nodes:
        if (is_sdpa(node) and node.users) or node in others:
            path = module_path(node)
            ordinal = seen[path] = seen.get(path, -1) + 1
            found[node] = f"{path}#{ordinal}" if ordinal else path
    return found


def normalise(node: Node, name: str) -> Call:
    """The call's arguments, whichever way they were written."""
    arguments: dict[str, Any] = (
        DEFAULTS | dict(zip(POSITIONAL, node.args, strict=False)) | dict(node.kwargs)
    )
    return Call(node=node, name=name, blind=node.meta.get(BLIND, ZERO), **arguments)


def module_path(node: Node) -> str:
    """Dotted path of the innermost module that made the call; `function` for none."""
    stack = node.meta.get("nn_module_stack")
    return dotted(next(reversed(stack.values()))[0]) if stack else "function"


def dotted(source: str) -> str:
    """A Dynamo source as a module path.

    Dynamo writes `L['self'].model.layers.0.attn`, `L['self']._modules['model']...` and
    `L['self'].__dict__['_modules']['model']...` for the same module; all become
    `model.layers.0.attn`. The root itself is `model`.
    """
    path = re.sub(r"^[LG]\['\w+'\]", "", source).replace(".__dict__", "")
    path = re.sub(r"\.?_(modules|parameters|buffers)\[", "[", path)
    path = re.sub(r"\['_(modules|parameters|buffers)'\]", "", path)
    path = re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", path)
    return path.strip(".") or "model"


def same(one: Sequence[int | SymInt], other: Sequence[int | SymInt]) -> bool:
    """Are these sizes equal, whatever the symbols are? Asks without adding a guard."""
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(statically_known_true(x == y) for x, y in pairs)


def recorded(node: Node) -> Any:
    """What Dynamo (or export) recorded as the value of a node, or None."""
    return node.meta.get("example_value", node.meta.get("val"))


def value(node: Node) -> torch.Tensor:
    """The fake tensor that Dynamo recorded for a node.

    Raises:
        TypeError: The node carries no tensor.
    """
    found = recorded(node)
    if not isinstance(found, torch.Tensor):
        raise TypeError(f"node {node.name} carries {type(found).__name__}, not a tensor")
    return found
