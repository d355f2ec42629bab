"""Block-sparse attention that tunes itself: `torch.compile(model, backend="afbs")`.

`tune` makes a policy ahead of time, `hybridize` one with sliding-window heads, `use_policy` puts
another one into running models, `set_budget` changes how much their sites keep, `explain` tells
what became of every attention call. `attention` is the same engine with SDPA's signature, `sparse`
the same for a model that is not compiled. Importing this package loads neither torch nor triton.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from afbs_compile.ahead import tune
    from afbs_compile.budgets import set_budget
    from afbs_compile.functional import attention
    from afbs_compile.hybrid_cache import HybridCache
    from afbs_compile.hybridizing import hybridize
    from afbs_compile.intercept import sparse
    from afbs_compile.policy import Policy
    from afbs_compile.report import explain
    from afbs_compile.runner import use_policy

__version__ = "0.1.0"
__all__ = [
    "HybridCache",
    "Policy",
    "attention",
    "explain",
    "hybridize",
    "set_budget",
    "sparse",
    "tune",
    "use_policy",
]

HOMES = {
    "HybridCache": "afbs_compile.hybrid_cache",
    "Policy": "afbs_compile.policy",
    "attention": "afbs_compile.functional",
    "explain": "afbs_compile.report",
    "hybridize": "afbs_compile.hybridizing",
    "set_budget": "afbs_compile.budgets",
    "sparse": "afbs_compile.intercept",
    "tune": "afbs_compile.ahead",
    "use_policy": "afbs_compile.runner",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)
