"""How is another spelling of attention turned into SDPA, and back if it is refused?

A pass puts an SDPA call beside the nodes it stands for and lets the users read that. Whoever then
refuses the call undoes it, so that what stays dense runs as it was written.
"""

from dataclasses import dataclass, field

from torch.fx import Node


@dataclass(frozen=True, slots=True)
class Form:
    """An SDPA call that stands for other nodes.

    Attributes:
        sdpa: The call.
        kind: Which spelling it was.
        swaps: `(old, new)`: whoever read the old node reads the new one.
        made: New nodes, in order.
        inner: Old nodes that nobody needs if the call is accepted, in order.
        reason: Why it cannot be accepted, or None.
    """

    sdpa: Node
    kind: str
    swaps: list[tuple[Node, Node]]
    made: list[Node]
    inner: list[Node] = field(default_factory=list)
    reason: str | None = None

    def undo(self) -> None:
        """Put everything back."""
        for old, new in self.swaps:
            new.replace_all_uses_with(old)
        for node in reversed(self.made):
            node.graph.erase_node(node)

    def settle(self) -> None:
        """Remove what nobody reads any more: these nodes are pure."""
        for node in reversed(self.inner):
            if not node.users:
                node.graph.erase_node(node)


def swap(old: Node, new: Node, made: list[Node]) -> tuple[Node, Node]:
    """Let the users of `old` read `new`, except those that `new` is made of."""
    own = set(made)
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in own)
    return old, new
