"""How does a transformers model attend over a hybrid cache? `attn_implementation="afbs-hybrid"`.

The cache hands new tokens on instead of all keys (`Arriving`), and this function stores them and
reads what is kept: one new token through `afbs::decode`, a prompt through `hybrid_prefill`. Of the
model's mask it needs one number a sequence: how many of the new tokens, at the end, are real.
"""

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from afbs_compile import hybrid_prefill
from afbs_compile.kernels import decode  # noqa: F401  registers afbs::decode

NAME = "afbs-hybrid"
HOW = f'call model.set_attn_implementation("{NAME}") and pass past_key_values=HybridCache(...)'
FOREIGN = ("softcap", "sliding_window", "position_bias", "s_aux")  # would change the result


@dataclass(frozen=True, slots=True)
class Arriving:
    """Keys of new tokens on their way to a layer; what `HybridLayer.update` gives."""

    layer: Any
    keys: Tensor

    @property
    def shape(self) -> NoReturn:
        """Other attention functions ask for it first, and are told what to do."""
        raise ValueError(f"a HybridCache is not read by this attn_implementation: {HOW}")


def attention(
    module: Any,
    query: Tensor,
    key: Any,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers, over a `HybridCache`.

    Args:
        module: The model's attention module.
        query: `[B, Hq, n, D]`.
        key: What `HybridLayer.update` returned.
        value: `[B, Hkv, n, D]`.
        attention_mask: What `mask` returned.
        scaling: Multiplier on q·k; D ** -0.5 by default.
        dropout: Must be 0.
        others: What else the model passes on.

    Returns:
        `[B, n, Hq, D]`, and None for the weights.

    Raises:
        ValueError: Another cache or mask, gradients, or a kind of attention it cannot do.
    """
    layer, k = arriving(key)
    refuse(query, value, dropout, others, getattr(module, "is_causal", True))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    fresh = given(attention_mask)
    if query.shape[2] == 1:
        layer.append(k, value, fresh)
        out = one(layer, query, scale)
    else:
        out = hybrid_prefill.prefill(layer, query, k, value, fresh, scale)
        layer.append(k, value, fresh)
    return out.transpose(1, 2).contiguous(), None


def arriving(key: Any) -> tuple[Any, Tensor]:
    """The layer and the new keys."""
    if not isinstance(key, Arriving):
        raise ValueError(f'attn_implementation="{NAME}" reads a HybridCache only: {HOW}')
    return key.layer, key.keys


def refuse(
    query: Tensor, value: Tensor, dropout: float, others: dict[str, Any], causal: bool
) -> None:
    """Raise a ValueError for what would be computed wrongly."""
    if torch.is_grad_enabled() and (query.requires_grad or value.requires_grad):
        raise ValueError("a HybridCache is for generation: call the model under torch.no_grad()")
    if dropout or not causal or others.get("is_causal") is False:
        raise ValueError("a HybridCache needs causal attention without dropout")
    foreign = [name for name in FOREIGN if others.get(name) is not None]
    if foreign:
        raise ValueError(f"a HybridCache cannot do attention with {', '.join(foreign)}")
    if value.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"keys of size {query.shape[-1]} with values of size {value.shape[-1]} cannot be read "
            "from a HybridCache"
        )


def given(attention_mask: Tensor | None) -> Tensor | None:
    """int32 `[B]` from what `mask` returned; None if all new tokens are real."""
    if attention_mask is None:
        return None
    if attention_mask.dtype != torch.int32 or attention_mask.shape[1:] != (1, 1, 1):
        raise ValueError(
            f"a mask {list(attention_mask.shape)} of {attention_mask.dtype} cannot be used with a "
            "HybridCache: pass a 2-D attention_mask that is 0 on padding to the left"
        )
    return attention_mask.flatten()


def one(layer: Any, q: Tensor, scale: float) -> Tensor:
    """Attention of the last token over what a layer keeps: `[B, Hq, 1, D]`."""
    batch = q.shape[0]
    held = layer.keys, layer.values, layer.lengths
    if batch < layer.max_batch:
        held = tuple(x[:batch] for x in held)
    keys, values, lengths = held
    out: Tensor = torch.ops.afbs.decode(
        q, keys, values, layer.bases, layer.slots, lengths, layer.work, scale, layer.splits
    )
    return out


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **others: Any,
) -> Tensor | None:
    """A mask function of transformers: int32 `[B, 1, 1, 1]`, real tokens among the new ones.

    None stands for all of them. It has four dimensions because transformers takes a mask of four
    for one that is made already.

    Raises:
        ValueError: More than causal attention, or padding that is not on the left.
    """
    if mask_function is not causal_mask_function:
        raise ValueError("a HybridCache needs plain causal attention; the model asks for more")
    if attention_mask is None:
        return None
    column = torch.arange(q_length, device=attention_mask.device) + q_offset
    if torch.compiler.is_compiling() or not allow_is_causal_skip:
        return count(attention_mask, column)
    check(attention_mask, int(q_offset) + q_length, q_length)
    fresh = count(attention_mask, column)
    return None if bool((fresh == q_length).all()) else fresh


def count(attention_mask: Tensor, column: Tensor) -> Tensor:
    """Real tokens in some columns of a 2-D mask, as `mask` returns them."""
    new = attention_mask.index_select(1, column)
    return new.sum(1, dtype=torch.int32)[:, None, None, None]


def check(attention_mask: Tensor, end: int, count: int) -> None:
    """Raise a ValueError unless a 2-D mask reaches to `end` and is padding on the left only."""
    if attention_mask.shape[1] < end:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[1]} columns; with {end - count} tokens in "
            f"the cache and {count} new ones it needs {end}"
        )
    seen = attention_mask[:, :end].bool()
    if bool((seen[:, :-1] & ~seen[:, 1:]).any()):
        raise ValueError(
            "attention_mask has padding behind a real token; a HybridCache needs it on the left: "
            'set tokenizer.padding_side = "left"'
        )


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
