"""Which mask does a transformers model mean? Described in words instead of built, where that does.

transformers hands its mask factories a function of positions. Three of those functions are known
here by their code; any other one, padding and traced graphs get SDPA's tensor, unchanged.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import masking_utils
from transformers.masking_utils import sdpa_mask

from afbs_compile.kernels.geometry import Mask

SHORT = 256  # queries: such a mask costs nothing


class DescribedMask(torch.Tensor):
    """A boolean mask `[B, 1, Lq, Lk]` that is known but not built; any use of it builds it."""

    rule: Mask
    keys: Tensor | None
    build: Callable[[], Tensor]
    built: Tensor | None

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        device: torch.device,
        rule: Mask,
        keys: Tensor | None,
        build: Callable[[], Any],
    ) -> "DescribedMask":
        """A mask that is `rule` and bool `keys` `[B, Lk]`, and that `build` gives as a tensor."""
        mask: DescribedMask = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=torch.bool, device=device
        )
        mask.rule, mask.keys, mask.build, mask.built = rule, keys, build, None
        return mask

    def tensor(self) -> Tensor:
        """The mask as a plain tensor; kept, for the layers share it."""
        if self.built is None:
            self.built = self.build()
        return self.built

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Whatever is done with the mask is done with the tensor."""
        plain = tree_map_only(DescribedMask, DescribedMask.tensor, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


def afbs_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor | None:
    """A mask factory for `AttentionMaskInterface`; arguments as `masking_utils.sdpa_mask`."""
    build: Callable[..., Tensor | None] = partial(
        sdpa_mask, batch_size=batch_size, q_length=q_length, kv_length=kv_length,
        q_offset=q_offset, kv_offset=kv_offset, mask_function=mask_function,
        attention_mask=attention_mask, device=device, **others,
    )  # fmt: skip
    built = partial(build, allow_is_causal_skip=allow_is_causal_skip)
    if torch.compiler.is_compiling() or q_length < SHORT or others.get("use_vmap"):
        return built()
    rule = described(mask_function)
    if rule is None:
        return built()
    offset = int(q_offset) - kv_offset
    hidden = padded(attention_mask, int(q_offset) + q_length if rule.causal else kv_length)
    keys = None
    if hidden:
        found = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        if found is None or found.shape[-1] < kv_offset + kv_length:
            return built()
        keys = found[:, kv_offset : kv_offset + kv_length].to(device=device, dtype=torch.bool)
    last = q_length - 1 + offset  # the last query's place among the keys
    window = rule.window if rule.window <= last else 0
    same = offset == 0 or kv_length == q_length == last + 1
    if keys is None and (not rule.causal or (allow_is_causal_skip and not window and same)):
        return built()  # SDPA says it without a mask
    shape = (batch_size, 1, q_length, kv_length)
    own = Mask(True, offset, window) if rule.causal else Mask()
    tensor = partial(build, allow_is_causal_skip=False)
    return DescribedMask.of(shape, torch.device(device), own, keys, tensor)


def described(mask_function: Callable[..., Any]) -> Mask | None:
    """The mask that a function of positions means, counted from position 0, if it is a known one.

    Known by its code object: transformers' own causal, bidirectional and sliding-window functions.
    """
    if mask_function is masking_utils.causal_mask_function:
        return Mask(True)
    if mask_function is masking_utils.bidirectional_mask_function:
        return Mask()
    known = masking_utils.sliding_window_causal_mask_function(1)
    parts = cell(mask_function, known, "mask_functions")
    if parts is None or len(parts) != 2 or parts[1] is not masking_utils.causal_mask_function:
        return None
    window = cell(parts[0], masking_utils.sliding_window_overlay(1), "sliding_window")
    return Mask(True, window=window) if isinstance(window, int) and window > 0 else None


def cell(function: Callable[..., Any], like: Callable[..., Any], name: str) -> Any:
    """What a closure holds under a name, if its code is that of `like`; else None."""
    code = getattr(function, "__code__", None)
    if code is None or code is not like.__code__ or name not in code.co_freevars:
        return None
    cells = function.__closure__ or ()
    return cells[code.co_freevars.index(name)].cell_contents


def padded(attention_mask: Tensor | None, end: int) -> bool:
    """Does a 2-D mask hide any token before `end`? Reads it, as SDPA's own factory does."""
    if attention_mask is None:
        return False
    return attention_mask.shape[-1] < end or not bool(attention_mask[:, :end].all())
