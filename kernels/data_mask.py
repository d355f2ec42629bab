"""What does a mask hide that comes with the call? Key padding, segments, elements, a bias.

Query i of batch entry b and head h sees key j iff the site's own mask shows it, `keys[b, j]`,
`q_segments[b, i] == k_segments[b, j]`, `elements[b, h, i, j]` and `bias[b, h, i, j]` > −inf, which
is added to the score; a part that is None hides nothing. B' and H' are B and H, or 1 where all
entries have the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from afbs_compile.kernels import bias
from afbs_compile.kernels.geometry import Mask, site_tokens

KINDS = ("key padding", "segments", "elements", "bias")  # the parts in words, in their order
ELEMENTS = KINDS[2]
CHUNK_ELEMENTS = 1 << 24  # pairs looked at together; bounds memory at long lengths


@dataclass(frozen=True, slots=True, eq=False)
class DataMask:
    """The parts of a mask that depend on data.

    Attributes:
        keys: bool `[B', Lk]`, keys that are there.
        q_segments: integer `[B', Lq]`; with `k_segments`, or both are None.
        k_segments: integer `[B', Lk]`.
        elements: bool `[B', H', Lq, Lk]`, any strides.
        blind: What a row is that sees nothing; see `kernels.blind`.
        bias: float `[B', H', Lq, Lk]`, any strides; see `kernels.bias`.
    """

    keys: Tensor | None = None
    q_segments: Tensor | None = None
    k_segments: Tensor | None = None
    elements: Tensor | None = None
    blind: str = "zero"
    bias: Tensor | None = None

    def tokens(self, first: int, last: int) -> Tensor:
        """Bool `[B', H', M, Lk]`, M = 1 if all queries see the same: what of `[first, last)`?"""
        parts = []
        if self.keys is not None:
            parts.append(self.keys[:, None, None])
        if self.q_segments is not None and self.k_segments is not None:
            rows = self.q_segments[:, None, first:last, None]
            parts.append(rows == self.k_segments[:, None, None])
        if self.elements is not None:
            parts.append(self.elements[:, :, first:last])
        if self.bias is not None:
            parts.append(self.bias[:, :, first:last] > -math.inf)
        return reduce(torch.logical_and, parts)

    def seen_keys(self) -> Tensor | None:
        """Bool `[B', Lk]`: keys that some query may see; None if that is every key."""
        seen = self.keys
        if self.elements is not None:
            some = self.elements.any(2).any(1)
            seen = some if seen is None else seen & some
        if self.bias is not None and self.bias.stride(2) == 0:  # padding that is added
            live = (self.bias[:, :, 0] > bias.HIDDEN).any(1)
            live |= ~live.any(1, keepdim=True)
            seen = live if seen is None else seen & live
        return seen

    def pairs(self, b: int, h: int, i: Tensor, j: Tensor) -> Tensor:
        """Bool: of one head, what queries i may see of keys j, which broadcast together."""
        found = torch.ones((), dtype=torch.bool, device=i.device)
        if self.keys is not None:
            found = found & entry(self.keys, b)[j]
        if self.q_segments is not None and self.k_segments is not None:
            found = found & (entry(self.q_segments, b)[i] == entry(self.k_segments, b)[j])
        if self.elements is not None:
            found = found & entry(entry(self.elements, b), h)[i, j]
        if self.bias is not None:
            found = found & (entry(entry(self.bias, b), h)[i, j] > -math.inf)
        return found

    def pairs_added(self, b: int, h: int, i: Tensor, j: Tensor) -> Tensor | None:
        """What is added to the scores of pairs as in `pairs`, fp32; None for nothing."""
        if self.bias is None:
            return None
        return entry(entry(self.bias, b), h)[i, j].float()

    def rows_added(self, first: int, last: int) -> Tensor | None:
        """What is added to the scores of queries `[first, last)`, fp32; None for nothing."""
        return None if self.bias is None else self.bias[:, :, first:last].float()

    def part(self, queries: slice, keys: slice) -> "DataMask":
        """The mask of some queries and keys."""
        return DataMask(
            keys=None if self.keys is None else self.keys[:, keys],
            q_segments=None if self.q_segments is None else self.q_segments[:, queries],
            k_segments=None if self.k_segments is None else self.k_segments[:, keys],
            elements=None if self.elements is None else self.elements[:, :, queries, keys],
            blind=self.blind,
            bias=None if self.bias is None else self.bias[:, :, queries, keys],
        )

    @property
    def kind(self) -> str:
        """Which parts there are, in words."""
        parts = self.keys, self.k_segments, self.elements, self.bias
        found = zip(KINDS, parts, strict=True)
        return " + ".join(name for name, part in found if part is not None)


@dataclass(frozen=True, slots=True, eq=False)
class MaskedBlocks:
    """A data mask, and what it and the site's mask make of every block.

    Attributes:
        data: The mask.
        some: bool `[B', H', NQ, NK]`, blocks with a visible pair.
        every: bool `[B', H', NQ, NK]`, blocks whose pairs are all visible.
        start: int64 `[B', H', NQ]`, the token from which sinks are counted: the first one of the
            first visible block, since a padded or packed text does not begin at key 0. Under a
            window, which leaves the sink behind, 0.
        level: fp32 like `some`, what a bias adds to the scores of blocks; None without one.
        needed: bool like `some`, blocks that a bias forbids to drop; None without one.
    """

    data: DataMask
    some: Tensor
    every: Tensor
    start: Tensor
    level: Tensor | None = None
    needed: Tensor | None = None

    def of_rows(self, rows: Tensor) -> "MaskedBlocks":
        """Of some query blocks alone."""
        level = None if self.level is None else self.level[:, :, rows]
        needed = None if self.needed is None else self.needed[:, :, rows]
        some, every, start = (x[:, :, rows] for x in (self.some, self.every, self.start))
        return MaskedBlocks(self.data, some, every, start, level, needed)


def gathered(
    parts: Sequence[Tensor | None], lengths: tuple[int, int], blind: str = "zero"
) -> DataMask | None:
    """The mask whose parts have the shapes in which graphs hold them; None without any part.

    Args:
        parts: At most five, each of which may be None: keys, bool `[B', Lk]` or `[B', 1, 1, Lk]`;
            segments of queries `[B', Lq]` or `[B', 1, Lq, 1]`, and of keys; elements, bool,
            whatever broadcasts to `[B, H, Lq, Lk]`; a bias, float, of such a shape.
        lengths: Lq and Lk.
        blind: What a row is that sees nothing.
    """
    if all(part is None for part in parts):
        return None
    # the dispatcher leaves trailing arguments out that are None
    keys, q_segments, k_segments, elements, added = [*parts, *(None,) * 5][:5]
    if elements is not None:
        elements = wide(elements)
        if elements.shape[1] == elements.shape[2] == 1:  # every query of every head sees the same
            padding = elements[:, 0, 0].expand(-1, lengths[1])
            keys, elements = padding if keys is None else keys_of(keys) & padding, None
        else:
            elements = elements.expand(-1, -1, *lengths)
    return DataMask(
        None if keys is None else keys_of(keys),
        None if q_segments is None else keys_of(q_segments),
        None if k_segments is None else keys_of(k_segments),
        elements,
        blind,
        None if added is None else wide(added).expand(-1, -1, *lengths),
    )


def wide(x: Tensor) -> Tensor:
    """A tensor of at most four axes with four."""
    return x[(None,) * (4 - x.dim())]


def entry(x: Tensor, n: int) -> Tensor:
    """Entry n of the first axis, which may have one for all."""
    return x[min(n, x.shape[0] - 1)]


def keys_of(x: Tensor) -> Tensor:
    """`[B', L]` out of itself, `[B', 1, 1, L]` or `[B', 1, L, 1]`."""
    return x if x.dim() == 2 else x.flatten(1)


def blocked(
    data: DataMask | None,
    mask: Mask,
    length_q: int,
    length_k: int,
    *,
    block_m: int,
    block_n: int,
) -> MaskedBlocks | None:
    """Look at every pair: which blocks are visible, and which are wholly so? None for None."""
    if data is None:
        return None
    device = data.tokens(0, 1).device
    j = torch.arange(length_k, device=device)
    one = data.tokens(0, block_m)
    rows = max(1, CHUNK_ELEMENTS // (one.shape[0] * one.shape[1] * block_m * length_k)) * block_m
    found = []
    for first in range(0, length_q, rows):
        last = min(first + rows, length_q)
        i = torch.arange(first, last, device=device)
        seen = data.tokens(first, last) & site_tokens(mask, i, j)
        extra: tuple[Tensor, ...] = ()
        if data.bias is not None:
            rows_of = data.bias[:, :, first:last]
            seen = bias.counted(rows_of, seen)
            blocks_k = -(-length_k // block_n)
            extra = (
                bias.levels(rows_of, seen, block_m, block_n),
                bias.needed(bias.first_true(seen), blocks_k, block_m, block_n),
            )
        found.append((*states(seen, block_m, block_n), *extra))
    some, every, *more = (torch.cat(parts, 2) for parts in zip(*found, strict=True))
    start = some.to(torch.uint8).argmax(3) * (0 if mask.window else block_n)
    return MaskedBlocks(data, some, every, start, *more)


def states(seen: Tensor, block_m: int, block_n: int) -> tuple[Tensor, Tensor]:
    """Any and all over the blocks of a bool `[B', H', M, Lk]`; both `[B', H', M', NK]`."""
    short = (0, -seen.shape[3] % block_n, 0, -seen.shape[2] % block_m)

    def folded(x: Tensor) -> Tensor:
        over_keys = torch.unflatten(x, 3, (-1, block_n)).any(4)
        return torch.unflatten(over_keys, 2, (-1, block_m)).any(3)

    some, hidden = (torch.nn.functional.pad(x, short, value=False) for x in (seen, ~seen))
    return folded(some), ~folded(hidden)
