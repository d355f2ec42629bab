"""How does a prompt attend when some heads have windows? Several queries over a hybrid cache.

The first tokens need no mask for padding: every sequence is turned so that it begins with its
first real token, and what comes behind its last one is causally invisible. From `min_length`
tokens on they run in one launch of `afbs::attention`, where windowed, sparse and dense heads stand
side by side; short prompts with windows, and later chunks, run as SDPA with a mask.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from afbs_compile import policy_tensor
from afbs_compile.hybrid_layout import Span
from afbs_compile.hybrid_store import tokens_held, view
from afbs_compile.kernels import op  # noqa: F401  registers afbs::attention
from afbs_compile.kernels.refusals import unsupported
from afbs_compile.policy import Site, Tuning


@dataclass(frozen=True, slots=True)
class Rules:
    """How the heads of a layer attend to a long prompt.

    Attributes:
        tuned: float32 `[Hq, COLUMNS]`, as the policy says.
        windows: The same with sparse heads dense, for lengths that were not tuned.
        length: Tokens that the policy was tuned at.
        selector: How blocks are scored.
        compensation: What stands for a block that is left out.
        min_length: Shorter prompts are dense inside their windows.
    """

    tuned: Tensor
    windows: Tensor
    length: int
    selector: str
    compensation: str
    min_length: int

    def at(self, count: int) -> Tensor:
        """The policy for a prompt of `count` tokens; thresholds err less below their length."""
        return self.tuned if count <= self.length < 2 * count else self.windows

    def to(self, device: torch.device) -> "Rules":
        """The same on another device."""
        return replace(self, tuned=self.tuned.to(device), windows=self.windows.to(device))


def rules(site: Site | None, tuning: Tuning, min_length: int) -> Rules | None:
    """The rules of a layer, or None if all of its heads are dense."""
    if site is None or site.decision == "dense" or all(h.mode == "dense" for h in site.heads):
        return None
    heads = [replace(h, mode="dense") if h.mode == "sparse" else h for h in site.heads]
    selector, compensation = (
        str(tuning.options.get(name, default))
        for name, default in (("selector", "sub8"), ("compensation", "none"))
    )
    return Rules(
        policy_tensor.to_tensor(site), policy_tensor.rows(heads), tuning.length, selector,
        compensation, min_length,
    )  # fmt: skip


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
    if not layer.filled:
        if one_launch(layer, q):
            return turned(selected, layer, q, k, v, fresh, scale)
        if not any(span.cuts(q.shape[2]) for span in layer.layout.spans):
            return turned(causal, layer, q, k, v, fresh, scale)
    return masked(layer, q, k, v, fresh, scale)


def one_launch(layer: Any, q: Tensor) -> bool:
    """Whether the first tokens run through `afbs::attention`."""
    count = q.shape[2]
    if layer.rules is None or count < layer.rules.min_length:
        return False
    untuned = layer.rules.at(count) is layer.rules.windows
    if untuned and not any(span.cuts(count) for span in layer.layout.spans):
        return False  # dense heads alone: SDPA is faster
    return unsupported(q.device.type, q.dtype, q.shape[3]) is None


def selected(layer: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention as the layer's rules say."""
    rules = layer.rules
    # min_length 0: what is dense without a window is not what was asked for
    out: Tensor = torch.ops.afbs.attention(
        q, k, v, rules.at(q.shape[2]), True, 0, 0, scale, rules.selector, 0, rules.compensation
    )
    return out


def causal(layer: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention over everything."""
    return sdpa(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def turned(
    attend: Callable[..., Tensor],
    layer: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fresh: Tensor | None,
    scale: float,
) -> Tensor:
    """Causal attention `attend` of every sequence without the padding in front of it."""
    if fresh is None:
        return attend(layer, q, k, v, scale)
    count = q.shape[2]
    place, pads = torch.arange(count, device=q.device), count - fresh.long()[:, None]
    there = (place + pads) % count
    out = attend(layer, along(q, there), along(k, there), along(v, there), scale)
    return along(out, (place - pads) % count)


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
        mine = mine if alone else mine[:, members]
        # a mask and grouped heads together would make a GPU write all scores down
        parts = [sdpa(part, keys, values, seen, scale=scale) for part in mine.unbind(2)]
        results.append(torch.stack(parts, 2))
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
