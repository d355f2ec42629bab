"""How does a prompt attend when some heads have windows? Several queries over a hybrid cache.

A first chunk of `min_length` tokens or more runs in one launch of `afbs::attention`, where
windowed, sparse and dense heads stand side by side. Padding needs no mask there: every sequence is
turned so that it begins with its first real token, and what comes behind its last one is causally
invisible. Short prompts and later chunks run as SDPA with a mask, head group by head group.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from afbs_compile.hybrid_layout import Span
from afbs_compile.hybrid_store import tokens_held, view
from afbs_compile.kernels import op  # noqa: F401  registers afbs::attention
from afbs_compile.kernels.dispatch import unsupported


def prefill(
    layer: Any, q: Tensor, k: Tensor, v: Tensor, fresh: Tensor | None, scale: float
) -> Tensor:
    """Attention of new tokens over a layer and themselves; the layer does not hold them yet.

    Args:
        layer: A `HybridLayer`.
        q: `[B, Hq, n, D]`.
        k: `[B, Hkv, n, D]`.
        v: `[B, Hkv, n, D]`.
        fresh: int32 `[B]`, how many tokens, at the end, are no padding; None for all.
        scale: Multiplier on q·k.

    Returns:
        `[B, Hq, n, D]`; what it holds for padding is finite and means nothing.
    """
    count = q.shape[2]
    if layer.filled:
        return masked(layer, q, k, v, fresh, scale)
    if one_launch(layer, q):
        return turned(layer, q, k, v, fresh, scale)
    if fresh is None and not any(span.cuts(count) for span in layer.layout.spans):
        return sdpa(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return masked(layer, q, k, v, fresh, scale)


def one_launch(layer: Any, q: Tensor) -> bool:
    """Whether a first chunk runs through `afbs::attention`."""
    if layer.policy is None or q.shape[2] < layer.min_length:
        return False
    return unsupported(q.device.type, q.dtype, q.shape[3]) is None


def turned(
    layer: Any, q: Tensor, k: Tensor, v: Tensor, fresh: Tensor | None, scale: float
) -> Tensor:
    """A first chunk through `afbs::attention`, every sequence without its padding in front."""
    where = None
    if fresh is not None:
        count = q.shape[2]
        place = torch.arange(count, device=q.device)
        pads = count - fresh.long()[:, None]
        where = (place - pads) % count
        there = (place + pads) % count
        q, k, v = (along(x, there) for x in (q, k, v))
    # the site is causal and long enough: a window is the head's own, so is what is left out
    out: Tensor = torch.ops.afbs.attention(
        q, k, v, layer.policy, True, 0, 0, scale, layer.selector, 0
    )
    return out if where is None else along(out, where)


def along(x: Tensor, tokens: Tensor) -> Tensor:
    """`x[b, :, tokens[b]]` for x `[B, H, n, D]`, tokens int64 `[B, n]`."""
    return x.gather(2, tokens[:, None, :, None].expand_as(x))


def masked(
    layer: Any, q: Tensor, k: Tensor, v: Tensor, fresh: Tensor | None, scale: float
) -> Tensor:
    """SDPA over what is kept and what is new, under a mask of tokens."""
    batch, _, count, _ = q.shape
    new = torch.arange(count, device=q.device).expand(batch, -1)
    if fresh is not None:
        new = new - (count - fresh.long()[:, None])  # padding is below 0
    if layer.filled:
        new = new + layer.lengths[:batch, None]
    results = []
    for span, members in zip(layer.layout.spans, layer.members, strict=True):
        alone = len(span.heads) == layer.layout.kv_heads
        keys, values = (x if alone else x[:, members] for x in (k, v))
        tokens = new
        if layer.filled:
            keys, values, tokens = with_past(layer, span, keys, values, new)
        seen = visible(span, new, tokens)[:, None]
        group = q.shape[1] // layer.layout.kv_heads
        mine = torch.unflatten(q, 1, (-1, group))
        mine = (mine if alone else mine[:, members]).flatten(1, 2)
        out = sdpa(mine, keys, values, seen, scale=scale, enable_gqa=group > 1)
        results.append(torch.unflatten(out, 1, (-1, group)))
    if len(results) == 1:
        return results[0].flatten(1, 2)
    back = torch.argsort(torch.cat(layer.members))
    return torch.cat(results, 1)[:, back].flatten(1, 2)


def with_past(
    layer: Any, span: Span, k: Tensor, v: Tensor, new: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Kept and new keys and values of a span, and their tokens int64 `[B, n]`."""
    batch, lengths = len(new), layer.lengths[: len(new)]
    tokens, most = tokens_held(span, lengths.long()), span.slots
    if not torch.compiler.is_compiling():  # once a chunk and layer: read what is live, no more
        most = min(most, int(lengths.max()))
    keys, values = (
        torch.cat([view(x, span, batch)[:, :, :most], y], 2)
        for x, y in ((layer.keys, k), (layer.values, v))
    )
    return keys, values, torch.cat([tokens[:, :most], new], 1)


def visible(span: Span, query: Tensor, key: Tensor) -> Tensor:
    """Bool `[B, n, m]`: does token `query[b, i]` see token `key[b, j]`?

    Padding sees itself: a row without any key has no softmax.
    """
    i, j = query[:, :, None], key[:, None]
    near = (j > i - span.window) | (j < span.sink)
    return (near & (j >= 0) & (j <= i)) | ((i < 0) & (i == j))
