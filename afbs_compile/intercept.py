"""Sparse attention in any module, without `torch.compile`: `with afbs_compile.sparse(model): …`.

While the module runs, its calls of `torch.nn.functional.scaled_dot_product_attention` go through
its engine; other models of the process are not touched. Costs about a microsecond for every torch
function that the module calls, so calls too small to hold a long sequence are not intercepted.
"""

import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from afbs_compile import logs
from afbs_compile.engine import ENGINES, Engine, most_numbers
from afbs_compile.kernels.geometry import Mask
from afbs_compile.options import parse

SDPA = torch.nn.functional.scaled_dot_product_attention


class Running(threading.local):
    """One thread's pass through the module: the modules that are at work, and the modes."""

    def __init__(self) -> None:
        """Nothing runs."""
        self.paths: list[str] = []
        self.modes: list[Intercept | None] = []


class Nothing:
    """What is left of our hooks in a pickled module: they do nothing."""

    def __call__(self, *_: Any) -> None:
        """Do nothing."""

    enter = leave = __call__


class Step:
    """A hook at the begin (`path` is the module's) or the end (None) of a module's call."""

    def __init__(self, running: Running, path: str | None) -> None:
        """Keep `running.paths` right."""
        self.running, self.path = running, path

    def __deepcopy__(self, memo: dict[int, Any]) -> "Step":
        """In a copied module nobody asks which part runs."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickled module comes back without interception."""
        return Nothing, ()

    def __call__(self, *_: Any) -> None:
        """A module's call begins or ends."""
        if torch.compiler.is_compiling():
            return
        if self.path is not None:
            self.running.paths.append(self.path)
        elif self.running.paths:
            self.running.paths.pop()


class Intercept(TorchFunctionMode):
    """Takes SDPA's calls; everything else passes."""

    def __init__(self, engine: Engine, running: Running) -> None:
        """Ask `engine` for every call."""
        super().__init__()
        self.engine, self.running = engine, running

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """One torch function is called."""
        kwargs = kwargs or {}
        if func is SDPA and not torch.compiler.is_compiling():
            out = self.attend(*args, **kwargs)
            if out is not None:
                return out
        return func(*args, **kwargs)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        """SDPA's arguments; None if the call must be SDPA."""
        path = self.running.paths[-1] if self.running.paths else "function"
        mask: Mask | str = Mask(bool(is_causal))
        if attn_mask is not None and (is_causal or attn_mask.dtype != torch.bool):
            mask = "both attn_mask and is_causal" if is_causal else "additive float mask"
        return self.engine.attend(
            path, query, key, value, mask=mask, scale=scale, dropout_p=dropout_p,
            enable_gqa=enable_gqa, elements=attn_mask,
        )  # fmt: skip


class Sparse:
    """What `sparse` returns: takes the engine away at `remove()`, or at the end of a `with`."""

    def __init__(self, root: nn.Module, engine: Engine) -> None:
        """Intercept the calls of `root`."""
        self.engine, self.running = engine, Running()
        self.handles: list[Any] = [
            root.register_forward_pre_hook(self.enter, with_kwargs=True),
            root.register_forward_hook(self.leave, with_kwargs=True, always_call=True),
        ]
        for name, module in root.named_modules():
            self.handles += [
                module.register_forward_pre_hook(Step(self.running, name or "model")),
                module.register_forward_hook(Step(self.running, None), always_call=True),
            ]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Sparse":
        """A copied module keeps its hooks, which do nothing for a root that is not theirs."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickled module comes back without interception."""
        return Nothing, ()

    def enter(self, root: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """A pass begins."""
        if torch.compiler.is_compiling() or root is not self.engine.root():
            return
        mode = None
        if most_numbers(args, kwargs) >= self.engine.options.min_length:
            mode = Intercept(self.engine, self.running)
            mode.__enter__()  # type: ignore[no-untyped-call]
        self.running.modes.append(mode)

    def leave(
        self, root: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """A pass ends, by an exception or not."""
        if torch.compiler.is_compiling() or root is not self.engine.root():
            return
        if not self.running.modes:
            return  # another hook failed before ours began
        mode = self.running.modes.pop()
        if mode is not None:
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Intercept no more."""
        for handle in self.handles:
            handle.remove()
        self.engine.remove()

    def __enter__(self) -> Self:
        """Sparse from here on."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Dense again."""
        self.remove()


def sparse(model: nn.Module, **options: Any) -> Sparse:
    """Run a module's attention sparse, without `torch.compile`.

    The first long call of a length tunes, as `torch.compile(backend="afbs")` does and with the
    same policies. Calls through `nn.MultiheadAttention`, and with masks, stay SDPA.

    Args:
        model: Any module that calls `torch.nn.functional.scaled_dot_product_attention`.
        **options: As in `torch.compile(options=…)`.

    Returns:
        A context manager; without `with` it holds until its `remove()`.

    Raises:
        ValueError: A wrong option.
    """
    logs.configure()
    wishes = parse(options)
    if (before := ENGINES.get(model)) is not None:
        before.remove()
    return Sparse(model, Engine(model, wishes))
