"""Which tokens and which blocks a query may see.

Notation: query i of a `[Lq]` axis, key j of a `[Lk]` axis, blocks of `block_m` queries by
`block_n` keys. Everything here is exact: a block counts as visible if one pair in it is, and as
full only if every pair in it is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from afbs_compile.kernels import policy_columns as col


@dataclass(frozen=True, slots=True)
class Mask:
    """The site's own mask, before any sparsity.

    Key j is visible to query i iff `not causal or i + offset - window < j <= i + offset`.

    Attributes:
        causal: Whether later keys are hidden.
        offset: Position of query 0 on the key axis: 0 is SDPA's `is_causal` (top-left aligned),
            `Lk - Lq` is right-aligned.
        window: Keys a query sees, itself included; 0 means no limit. Needs `causal`.
    """

    causal: bool = False
    offset: int = 0
    window: int = 0

    def __post_init__(self) -> None:
        if self.window and not self.causal:
            raise ValueError("a window needs causal=True; a two-sided window is not supported")

    def spans(self, first_q: Tensor, last_q: Tensor) -> tuple[Tensor, Tensor]:
        """First and last visible key position of the query range `[first_q, last_q]`."""
        if not self.causal:
            return torch.full_like(first_q, -(1 << 30)), torch.full_like(last_q, 1 << 30)
        low = first_q + self.offset - self.window + 1 if self.window else first_q * 0 - (1 << 30)
        return low, last_q + self.offset


@dataclass(frozen=True, slots=True)
class Blocks:
    """First and last token of every block of an axis: two int64 tensors `[N]`."""

    first: Tensor
    last: Tensor

    @staticmethod
    def of(length: int, size: int, device: torch.device) -> "Blocks":
        """The blocks of `size` tokens that cover `length` tokens; the last one may be short."""
        first = torch.arange(0, length, size, device=device)
        return Blocks(first, (first + size - 1).clamp(max=length - 1))

    def __len__(self) -> int:
        return len(self.first)


def site_visible(mask: Mask, q: Blocks, k: Blocks) -> Tensor:
    """Bool `[NQ, NK]`: is any pair of the block visible under the site's mask?"""
    low, high = mask.spans(q.first, q.last)
    # every row of the block has a span; their union is contiguous because spans shift by one
    return (k.first[None] <= high[:, None]) & (k.last[None] >= low[:, None])


def site_full(mask: Mask, q: Blocks, k: Blocks) -> Tensor:
    """Bool `[NQ, NK]`: is every pair of the block visible under the site's mask?"""
    low, high = mask.spans(q.last, q.first)
    return (k.last[None] <= high[:, None]) & (k.first[None] >= low[:, None])


def head_visible(mask: Mask, policy: Tensor, q: Blocks, k: Blocks) -> Tensor:
    """Bool `[H, NQ, NK]`: visible under the site's mask and the head's own window and sink."""
    windowed, window, sink = window_columns(policy)
    low = q.first[None, :, None] + mask.offset - window + 1
    inside = (k.last[None, None] >= low) | (k.first[None, None] < sink)
    return site_visible(mask, q, k)[None] & (inside | ~windowed)


def head_full(mask: Mask, policy: Tensor, q: Blocks, k: Blocks) -> Tensor:
    """Bool `[H, NQ, NK]`: every pair visible under the site's mask and the head's window."""
    windowed, window, sink = window_columns(policy)
    low = q.last[None, :, None] + mask.offset - window + 1
    inside = (k.first[None, None] >= low) | (k.last[None, None] < sink)
    return site_full(mask, q, k)[None] & (inside | ~windowed)


def site_tokens(mask: Mask, i: Tensor, j: Tensor) -> Tensor:
    """Bool `[len(i), len(j)]`: may query i see key j under the site's mask?"""
    low, high = mask.spans(i, i)
    return (j[None] <= high[:, None]) & (j[None] >= low[:, None])


def token_visible(mask: Mask, policy: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Bool `[H, len(i), len(j)]`: may the head's query i see key j?"""
    windowed, window, sink = window_columns(policy)
    inside = (j > i[None, :, None] + mask.offset - window) | (j < sink)
    return site_tokens(mask, i, j)[None] & (inside | ~windowed)


def window_columns(policy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Policy columns `[H, 1, 1]`: is the head windowed, its window, its sink (tokens)."""
    windowed = policy[:, col.MODE] == col.WINDOWED
    window = policy[:, col.WINDOW].long()
    sink = policy[:, col.SINK].long()
    return windowed[:, None, None], window[:, None, None], sink[:, None, None]
