"""How is a kernel written in torch compiled without ever meeting Dynamo's recompile limit?

Dynamo counts compilations per code object and gives up at the eighth. A function that serves every
model of a process meets that soon, so each kind of problem gets a code object of its own; what is
left to vary, the lengths, is symbolic.
"""

import types
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import torch


@cache
def fused(function: Callable[..., Any], kind: Hashable) -> Callable[..., Any]:
    """`function`, compiled with symbolic sizes, for one `kind` of problem.

    Args:
        function: A plain function of tensors and numbers.
        kind: Everything but the lengths that decides the generated code: head counts, head dim,
            dtype, and whether the batch is one (Dynamo treats sizes of one as constants).
    """
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=f"{function.__name__}_{abs(hash(kind)):x}")
    own = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
    return torch.compile(own, dynamic=True, fullgraph=True)
