"""`attn_implementation="afbs"` for Hugging Face transformers, without `torch.compile`.

`register()` makes the name known, `enable(model)` switches a model over. A model's first long call
of a length tunes it, with the tuner, cache and site names of the compile path; decode steps and
short calls are SDPA. Under `torch.compile` the calls are plain SDPA, which its backend takes.
"""

import sys
import weakref
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from afbs_compile import logs
from afbs_compile.engine import ENGINES, Engine
from afbs_compile.integrations.transformers_masks import DescribedMask, afbs_mask
from afbs_compile.kernels.geometry import Mask
from afbs_compile.options import Options, parse

NAME = "afbs"
OTHER_SCORES = ("position_bias", "softcap", "s_aux", "cache", "head_mask")

DEFAULTS: list[Options] = [Options()]
CALLERS: "weakref.WeakKeyDictionary[nn.Module, tuple[Engine, str] | None]" = (
    weakref.WeakKeyDictionary()
)


def register(**options: Any) -> None:
    """Make `attn_implementation="afbs"` known to transformers.

    Args:
        **options: As in `torch.compile(options=…)`, for models that are not given their own by
            `enable`.

    Raises:
        ValueError: A wrong option.
    """
    logs.configure()
    DEFAULTS[0] = parse(options)
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, afbs_mask)


def enable(model: PreTrainedModel, **options: Any) -> Engine:
    """Switch a model to `attn_implementation="afbs"`.

    Args:
        model: Any model whose attention goes through transformers' `AttentionInterface`.
        **options: As in `torch.compile(options=…)`.

    Returns:
        The engine that watches the model; `disable(model)` takes it away.

    Raises:
        ValueError: A wrong option, or a model that does not follow the interface.
    """
    wishes = parse(options)
    if NAME not in AttentionInterface._global_mapping:
        register()
    if model.config._attn_implementation != NAME:
        model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise ValueError(
            f"{type(model).__name__} does not go through transformers' AttentionInterface; use "
            "torch.compile(backend='afbs') or afbs_compile.sparse"
        )
    if (before := ENGINES.get(model)) is not None:
        before.remove()
    CALLERS.clear()
    return Engine(model, wishes, length_of, plain)


def disable(model: PreTrainedModel) -> None:
    """Give a model SDPA again."""
    if (engine := ENGINES.get(model)) is not None:
        engine.remove()
    CALLERS.clear()
    model.set_attn_implementation("sdpa")


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls; arguments as its `sdpa_attention_forward`."""
    if not torch.compiler.is_compiling():
        if query.shape[2] > 1:
            out = sparse(
                module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs
            )
            if out is not None:
                return out.transpose(1, 2).contiguous(), None
        if isinstance(attention_mask, DescribedMask):
            attention_mask = attention_mask.tensor()
    result: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
    )
    return result


def sparse(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    kwargs: Mapping[str, Any],
) -> Tensor | None:
    """The call through the module's engine; None if it must be SDPA."""
    caller = caller_of(module)
    if caller is None:
        return None
    engine, path = caller
    other = next((name for name in OTHER_SCORES if kwargs.get(name) is not None), None)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    mask: Mask | str = Mask(bool(causal))  # SDPA's own: it slices longer keys off
    keys: Tensor | None = None
    elements: Tensor | None = None
    if isinstance(attention_mask, DescribedMask):
        mask, keys = attention_mask.rule, attention_mask.keys
    elif attention_mask is not None:
        boolean = attention_mask.dtype == torch.bool
        mask, elements = Mask() if boolean else "additive float mask", attention_mask
    if other is not None:
        mask = f"attention scores with {other}"
    return engine.attend(
        path, query, key, value, mask=mask, scale=scaling, dropout_p=dropout, enable_gqa=True,
        keys=keys, elements=elements,
    )  # fmt: skip


def caller_of(module: nn.Module) -> tuple[Engine, str] | None:
    """The engine of the model that an attention module is part of, and the module's path in it."""
    if module not in CALLERS:
        root = watched_root(module) or running_root(module)
        if root is None:
            logs.warn_once(
                "attn_implementation='afbs' found no model around an attention module, so it "
                "runs dense; call the model itself, or afbs_compile.integrations.transformers."
                "enable(model)"
            )
            CALLERS[module] = None
            return None
        engine = ENGINES.get(root) or Engine(root, DEFAULTS[0], length_of, plain)
        CALLERS[module] = engine, path_in(root, module) or "model"
    return CALLERS[module]


def watched_root(module: nn.Module) -> nn.Module | None:
    """The module that has an engine and contains this one."""
    return next((root for root in list(ENGINES) if path_in(root, module) is not None), None)


def running_root(module: nn.Module) -> nn.Module | None:
    """The outermost model whose call is under way and that contains an attention module.

    transformers tells an attention function which module calls it, but not of which model; the
    call stack does. Asked once for every attention module.
    """
    frame: FrameType | None = sys._getframe(1)
    found: nn.Module | None = None
    while frame is not None:
        owner = frame.f_locals.get("self")
        if owner is not found and isinstance(owner, PreTrainedModel):
            found = owner if path_in(owner, module) is not None else found
        frame = frame.f_back
    return found


def path_in(root: nn.Module, module: nn.Module) -> str | None:
    """The dotted path of a module in a root, or None if it is not in it."""
    return next((name for name, part in root.named_modules() if part is module), None)


def length_of(root: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """Tokens of a call together with those in its cache."""
    given = kwargs.get("input_ids")
    if given is None:
        given = kwargs.get("inputs_embeds", args[0] if args else None)
    if not isinstance(given, Tensor) or given.dim() < 2:
        return None
    cache: Any = kwargs.get("past_key_values")
    seen = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
    return int(given.shape[1]) + int(seen)


def plain(kwargs: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A call's keywords for a trace: without an attention mask that hides nothing.

    None if the masks were built before the call, and hide something: a trace would not see how.
    """
    mask = kwargs.get("attention_mask")
    parts = mask.values() if isinstance(mask, Mapping) else [mask]
    if all(hides_nothing(part) for part in parts):
        return {name: value for name, value in kwargs.items() if name != "attention_mask"}
    return kwargs if isinstance(mask, Tensor) and mask.dim() == 2 else None


def hides_nothing(mask: Any) -> bool:
    """Is a mask what the model makes of none?"""
    if mask is None or (isinstance(mask, DescribedMask) and mask.keys is None):
        return True
    return isinstance(mask, Tensor) and mask.dim() == 2 and bool(mask.all())
