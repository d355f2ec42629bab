"""Which attention sites does a module have, on these inputs? Traced once, nothing is compiled.

Dynamo traces the module while it runs dense on copies of a call's own inputs. So sites, names,
masks and weights are those that `torch.compile(backend="afbs")` sees, and a policy serves both.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from afbs_compile.ahead import Recorder, problems
from afbs_compile.options import Options
from afbs_compile.problem import Problem


class Untraceable(ValueError):
    """The module cannot be traced on these inputs; the message says why."""


class Tracer:
    """Traces of one root module; sizes that vary become symbolic, as in a compiled model.

    Dynamo finds the graphs of earlier traces again, by the recorder, so that no number of lengths
    meets its recompile limit. The module is not held.
    """

    def __init__(self, options: Options) -> None:
        """Find sites by `options`."""
        self.recorder = Recorder(options)

    def __call__(
        self, root: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> list[tuple[Problem, str]]:
        """Run `root` once, dense: what can be tuned, with the keys of the weights of its graphs.

        Raises:
            Untraceable: The inputs cannot be copied, or the module does not run under Dynamo.
        """
        try:
            with torch.no_grad(), without_hooks(root):
                given = copied((tuple(args), dict(kwargs)))
                torch.compile(root, backend=self.recorder)(*given[0], **given[1])
            return problems(self.recorder)
        except Exception as error:  # whatever it is: the call itself, dense, will show it or not
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise Untraceable(f"the model cannot be traced: {reason}") from error
        finally:
            for graph in self.recorder.graphs:
                graph.calls, graph.spent_s = [], []  # a problem has its own list of them


def copied(inputs: Any) -> Any:
    """Inputs that a run may write to: tensors and caches of their own."""
    plain = tree_map_only(Tensor, lambda x: x.detach(), inputs)
    return copy.deepcopy(plain)


@contextmanager
def without_hooks(root: nn.Module) -> Iterator[None]:
    """The module without our hooks, so that its trace is that of a user's `torch.compile`."""
    tables = [t for m in root.modules() for t in (m._forward_pre_hooks, m._forward_hooks)]
    before = [dict(table) for table in tables]
    for table in tables:
        for n, hook in list(table.items()):
            if getattr(hook, "__module__", "").startswith("afbs_compile."):
                del table[n]
    try:
        yield
    finally:
        for table, kept in zip(tables, before, strict=True):
            table.clear()
            table.update(kept)
