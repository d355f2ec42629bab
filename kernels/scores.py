"""How much attention mass does a block hold? Block scores from pooled queries and keys.

Selectors `sub8` and `sub4` pool q and k in sub-blocks of 8 or 4 tokens, take a softmax over the
key sub-blocks for every query sub-row, and aggregate a block's mass over its sub-rows by the root
mean square: a block matters if *some* rows need it much, which a mean over 64 rows washes out.
The sink is always kept, so it is left out of the softmax, where it would eat the mass of others.
Selector `mean` is SpargeAttn's (arXiv 2502.18137): one mean a block, plus the self-similarity gate
theta. Pooling is in fp32; scores are `[B, Hq, NQ, NK]` and sum to 1 over the visible key blocks.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from afbs_compile.kernels import policy_columns as col
from afbs_compile.kernels.data_mask import MaskedBlocks
from afbs_compile.kernels.geometry import Blocks, Mask, site_visible

SUB_BLOCK = {"sub8": 8, "sub4": 4}
SELECTORS = (*SUB_BLOCK, "mean")
NOWHERE = 1 << 31  # a position outside every span, those of `Mask.spans` without a limit too
CHUNK_ELEMENTS = 1 << 24  # sub-block scores held at once; bounds memory at long lengths


def block_scores(
    q: Tensor,
    k: Tensor,
    policy: Tensor,
    *,
    mask: Mask,
    scale: float,
    selector: str,
    block_m: int,
    block_n: int,
    core: Callable[..., Tensor] | None = None,
    masked: MaskedBlocks | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores of all key blocks for all query blocks.

    Args:
        q: `[B, Hq, Lq, D]`.
        k: `[B, Hkv, Lk, D]`.
        policy: float32 `[Hq, COLUMNS]`; `SINK` and `THETA` are read.
        mask: The site's mask.
        scale: Multiplier on q·k.
        selector: One of `SELECTORS`.
        block_m: Query block, tokens.
        block_n: Key block, tokens.
        core: Runs instead of `sub_scores`, such as a compiled one.
        masked: The part of the mask that comes with the call. Keys that nobody sees count for
            nothing, invisible blocks have score 0.

    Returns:
        `scores` float32 `[B, Hq, NQ, NK]` and `gated` bool of the same shape: blocks that the
        theta gate forces (all False for `sub8` and `sub4`).

    Raises:
        ValueError: For an unknown selector.
    """
    if selector == "mean":
        return mean_scores(
            q, k, policy, mask=mask, scale=scale, block_m=block_m, block_n=block_n, masked=masked
        )
    if selector not in SUB_BLOCK:
        raise ValueError(f"unknown selector {selector!r}: use one of {', '.join(SELECTORS)}")
    size = SUB_BLOCK[selector]
    one_row = q.shape[0] * q.shape[1] * (block_m // size) * -(-k.shape[2] // size)
    rows = max(1, CHUNK_ELEMENTS // one_row)  # query blocks at once
    keys = pooled_keys(k, policy, size, block_n, seen_keys(masked))
    starts = range(0, q.shape[2], rows * block_m)
    parts = []
    for start in starts:
        queries = pooled_queries(
            q[:, :, start : start + rows * block_m], start, mask, size, block_m
        )
        groups = (k.shape[1], q.shape[1] // k.shape[1])
        first = start // block_m
        shown = () if masked is None else shown_to(masked, groups, slice(first, first + rows))
        mass = (core or sub_scores)(
            *queries, *keys, scale, groups, block_m // size, block_n // size, *shown
        )
        parts.append(mass.flatten(1, 2))
    scores = torch.cat(parts, 2) if len(parts) > 1 else parts[0]
    return scores, torch.zeros((), dtype=torch.bool, device=q.device).expand(scores.shape)


def pooled_queries(
    q: Tensor, start: int, mask: Mask, size: int, block_m: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sub-block means of the rows from `start` on, and the keys that each may see.

    Returns:
        `[B, Hq, NS, D]`, and first and last visible key position `[NS]`; NS is filled up to whole
        blocks with sub-rows that see nothing.
    """
    sub = Blocks.of(q.shape[2], size, q.device)
    low, high = mask.spans(sub.first + start, sub.last + start)
    short = -len(sub) % (block_m // size)
    pooled = torch.nn.functional.pad(pool(q, size), (0, 0, 0, short))
    low, high = (torch.nn.functional.pad(t, (0, short), value=-NOWHERE) for t in (low, high))
    return pooled, low, high


def seen_keys(masked: MaskedBlocks | None) -> Tensor | None:
    """Bool `[B', Lk]`: keys that some query may see; None if that is every key."""
    return None if masked is None else masked.data.seen_keys()


def shown_to(
    masked: MaskedBlocks, groups: tuple[int, int], rows: slice
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Visible blocks `[B', Hkv', G', NQ, NK]` of some query blocks, where sinks begin, levels."""
    heads = groups if masked.some.shape[1] > 1 else (1, 1)
    some, start = masked.some[:, :, rows], masked.start[:, :, rows, None]
    level = None if masked.level is None else torch.unflatten(masked.level[:, :, rows], 1, heads)
    return torch.unflatten(some, 1, heads), torch.unflatten(start, 1, heads), level


def pooled_keys(
    k: Tensor, policy: Tensor, size: int, block_n: int, valid: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sub-block means of the keys, and what masks and weights them.

    Returns:
        `[B, Hkv, NS, D]`; first and last token `[NS]`; log weight `[NS]` (a short sub-block counts
        for the tokens that it has); sink of every head in tokens `[Hq]`. NS is filled up to whole
        blocks with sub-blocks that nobody sees. With `valid` `[B', Lk]` the log weights are
        `[B', 1, 1, 1, NS]` and count valid keys.
    """
    sub = Blocks.of(k.shape[2], size, k.device)
    short = -len(sub) % (block_n // size)
    share = (sub.last - sub.first + 1).float() / size
    if valid is not None:
        share = share * pool(valid[:, None, :, None], size)[:, :, None, None, :, 0]
    weight = torch.log(share)
    pad = torch.nn.functional.pad
    return (
        pad(pool(k, size, valid), (0, 0, 0, short)),
        pad(sub.first, (0, short), value=NOWHERE),
        pad(sub.last, (0, short), value=-NOWHERE),
        pad(weight, (0, short)),
        sink_tokens(policy, block_n),
    )


def sub_scores(
    qp: Tensor,
    low: Tensor,
    high: Tensor,
    kp: Tensor,
    first: Tensor,
    last: Tensor,
    weight: Tensor,
    sink: Tensor,
    scale: float,
    groups: tuple[int, int],
    sub_m: int,
    sub_n: int,
    some: Tensor | None = None,
    start: Tensor | None = None,
    level: Tensor | None = None,
) -> Tensor:
    """Scores `[B, Hkv, G, NQ, NK]` from what `pooled_queries` and `pooled_keys` return.

    `groups` is `(Hkv, G)`; `sub_m` and `sub_n` are sub-blocks in a query and in a key block;
    `some`, `start` and `level` are from `shown_to`.
    """
    x = torch.unflatten(qp, 1, groups) @ kp.transpose(-1, -2)[:, :, None] * scale + weight
    seen = (first <= high[:, None]) & (last >= low[:, None])
    if level is not None:
        x = x + repeated(level, sub_m, sub_n)
    edge = sink.view(*groups, 1, 1)
    if some is not None and start is not None:
        seen = seen & repeated(some, sub_m, sub_n)
        edge = edge + repeated(start, sub_m, 1)
    seen = seen & (first >= edge)
    mass = in_blocks(masked_softmax(x, seen), -1, sub_n).sum(-1)
    square = in_blocks(mass.square(), -2, sub_m).sum(-2)
    return normalise(square.sqrt())


def repeated(x: Tensor, m: int, n: int) -> Tensor:
    """Every entry of `[..., M, N]` as m by n entries."""
    wide = x[..., :, None, :, None].expand(*x.shape[:-1], m, x.shape[-1], n)
    return wide.flatten(-2).flatten(-3, -2)


def in_blocks(x: Tensor, dim: int, size: int) -> Tensor:
    """`x` with its axis `dim` (from the end) split into blocks of `size`.

    Compiled with symbolic sizes, code that is made for a single block keeps that one for all
    lengths; the branch makes Dynamo tell the two apart.
    """
    if x.shape[dim] == size:
        return x.unsqueeze(dim - 1)
    return torch.unflatten(x, dim, (-1, size))


def mean_scores(
    q: Tensor,
    k: Tensor,
    policy: Tensor,
    *,
    mask: Mask,
    scale: float,
    block_m: int,
    block_n: int,
    masked: MaskedBlocks | None = None,
) -> tuple[Tensor, Tensor]:
    """Selector `mean`: scores and gated blocks, both `[B, Hq, NQ, NK]`."""
    batch, heads, length_q, dim = q.shape
    qs, ks = Blocks.of(length_q, block_m, q.device), Blocks.of(k.shape[2], block_n, q.device)
    # a budget has no gate: what it keeps must be known before
    theta = policy[:, col.THETA].masked_fill(policy[:, col.BUDGET] > 0, -1.0)
    theta = theta.view(k.shape[1], -1, 1)
    gated_q = similarity(q, block_m).view(batch, k.shape[1], -1, len(qs)) < theta
    valid = seen_keys(masked)
    gated_k = similarity(k, block_n, valid)[:, :, None] < theta
    qp = pool(q, block_m).view(batch, k.shape[1], -1, len(qs), dim)
    x = qp @ pool(k, block_n, valid).transpose(-1, -2)[:, :, None] * scale
    edge = sink_tokens(policy, block_n).view(k.shape[1], -1, 1, 1)
    seen = site_visible(mask, qs, ks) & ~gated_k[..., None, :]
    if masked is not None:
        some, start, level = shown_to(masked, (k.shape[1], heads // k.shape[1]), slice(None))
        x = x if level is None else x + level
        seen, edge = seen & some, edge + start
    seen = seen & (ks.first >= edge)
    shape = (batch, heads, len(qs), len(ks))
    gated = (gated_q[..., None] | gated_k[..., None, :]).expand(x.shape)
    return normalise(masked_softmax(x, seen).reshape(shape)), gated.reshape(shape)


def pool(x: Tensor, size: int, valid: Tensor | None = None) -> Tensor:
    """Means over blocks of `size` tokens, fp32: `[B, H, L, D]` to `[B, H, ceil(L / size), D]`.

    With `valid` `[B', L]` over the valid ones among them; of a block without any, 0.
    """
    if valid is not None:
        valid = valid[:, None, :, None]
        share = pool(valid, size)
        return pool(torch.where(valid, x, 0), size) / torch.where(share > 0, share, 1)
    length = x.shape[2]
    whole = length // size * size
    batch, heads, _, dim = x.shape
    means = x[:, :, :whole].reshape(batch, heads, whole // size, size, dim).float().mean(3)
    if whole == length:
        return means
    return torch.cat([means, x[:, :, whole:].float().mean(2, keepdim=True)], 2)


def similarity(x: Tensor, size: int, valid: Tensor | None = None) -> Tensor:
    """Mean pairwise cosine inside each block, `[B, H, N]`: |mean of unit vectors|²."""
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    return pool(unit, size, valid).square().sum(-1)


def sink_tokens(policy: Tensor, block_n: int) -> Tensor:
    """Sink of each head rounded up to whole key blocks, in tokens, int64 `[H]`."""
    blocks = torch.ceil(policy[:, col.SINK] / block_n)
    return blocks.long() * block_n


def masked_softmax(x: Tensor, seen: Tensor) -> Tensor:
    """Softmax over the last axis of the seen entries; a row that sees nothing is all zero."""
    x = x.masked_fill(~seen, -math.inf)
    top = x.amax(-1, keepdim=True).clamp(min=-1e30)
    e = torch.exp(x - top)
    return e / e.sum(-1, keepdim=True).clamp(min=1e-30)


def normalise(scores: Tensor) -> Tensor:
    """Scale so that the last axis sums to 1; an all-zero row stays zero."""
    return scores / scores.sum(-1, keepdim=True).clamp(min=1e-30)
