"""What does a query block lose, however many blocks it keeps? The tables of one block, in torch.

What all n kept blocks add up to is one matrix product of "is block j among the n first?" with the
block partials, less what they are of the dense output: Σ_j (exp(S_j - max) V_j - w_j o*) over
Σ_j w_j is o - o*, without the output itself. On a CPU the heads of one KV group go together, whose
partials fit into its cache; elsewhere those of all groups, since launches cost more.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from afbs_compile.kernels.compensation import contributions
from afbs_compile.kernels.data_mask import DataMask
from afbs_compile.kernels.geometry import Blocks, Mask, head_full, token_visible

LEAST = 1e-30  # a sum of weights that a division survives


class Rows(NamedTuple):
    """One query block, as all its heads see it.

    Attributes:
        i: int64 `[M]`, its queries.
        length_k: Keys there are.
        block_n: Key block, tokens.
        reach: Key blocks up to the last one that it sees.
        policy: float32 `[Hq, COLUMNS]`.
        mask: The site's mask.
        scale: Multiplier on q·k.
        tangent: Whether dropped blocks leave their tangents.
        data: The part of the mask that comes with the call.
    """

    i: Tensor
    length_k: int
    block_n: int
    reach: int
    policy: Tensor
    mask: Mask
    scale: float
    tangent: bool
    data: DataMask | None


def rows_of(
    i: Tensor, length_k: int, policy: Tensor, *, mask: Mask, scale: float, block_n: int,
    tangent: bool, data: DataMask | None,
) -> Rows:  # fmt: skip
    """A query block; key blocks past its diagonal rank last, so they are left out."""
    reach = -(-length_k // block_n)
    if mask.causal:
        reach = max(1, min(reach, (int(i[-1]) + mask.offset) // block_n + 1))
    return Rows(i, length_k, block_n, reach, policy, mask, scale, tangent, data)


def row_errors(
    q: Tensor, k: Tensor, v: Tensor, order: Tensor, rows: Rows, lambdas: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Tables of one query block by blocks kept.

    q is `[B, Hq, M, D]`, k and v `[B, Hkv, NK·block_n, D]` in fp32, order `[B, Hq, NK]`.

    Returns:
        Errors and computed blocks `[Z, B, H, NK + 1]`, and Σ|o*| `[B, H, 1]`.
    """
    batch, heads, blocks, reach = *order.shape, rows.reach
    rank = torch.argsort(order, dim=-1)[..., None, :reach]
    kept = rank <= torch.arange(reach, device=q.device)[:, None]  # row n: the n + 1 first ones
    keys = slice(reach * rows.block_n)
    added, hidden = bias_of(rows), list(hidden_keys(rows))
    groups = k.shape[1]
    per, step = heads // groups, groups_together(q.device.type, groups)
    found = []
    for b in range(batch):
        for g in range(0, groups, step):
            own = slice(g * per, (g + step) * per)
            grouped = torch.unflatten(q[b, own], 0, (step, per))
            keys_of, values_of = (x[b, g : g + step, keys] for x in (k, v))
            s = torch.flatten(grouped.float() * rows.scale, 1, 2) @ keys_of.mT
            s = torch.unflatten(s, 1, (per, -1))
            if added is not None:
                s += part_of(added, b, own, per)
            for columns, unseen in hidden:
                s[..., columns].masked_fill_(part_of(unseen, b, own, per), -math.inf)
            found.append(
                group_errors(s, grouped, keys_of, values_of,
                             torch.unflatten(kept[b, own], 0, (step, per)), rows,
                             rows.policy[own], lambdas)
            )  # fmt: skip
    errors, computed, norm = (
        torch.unflatten(torch.cat(parts), 0, (batch, heads)) for parts in zip(*found, strict=True)
    )
    errors, computed = (x.movedim(2, 0) for x in (errors, computed))
    return fill(errors, blocks), fill(computed, blocks), norm[..., None]


def groups_together(device_type: str, groups: int) -> int:
    """How many KV groups go together."""
    return 1 if device_type == "cpu" else groups


def group_errors(
    s: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, rows: Rows, policy: Tensor,
    lambdas: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Tables of the query heads of C KV groups, G each.

    s is `[C, G, M, J·block_n]` and is overwritten, q `[C, G, M, D]`, k and v `[C, J·block_n, D]`,
    kept `[C, G, N, J]` and policy `[C·G, COLUMNS]`.

    Returns:
        Errors and computed blocks `[C·G, Z, N + 1]`, the first with nothing kept, and Σ|o*|
        `[C·G]`.
    """
    weight, pv, gain, top = partials(s, v, rows.block_n)
    exact = pv.sum(1).div_(weight.sum(2)[..., None].clamp(min=LEAST))
    each = exact.abs().sum(-1)  # [C, G, M]
    if rows.tangent:  # those of dropped blocks, as blocks of their own after the kept ones
        own = tangents_of(q, k, v, top, rows, policy)
        weight, pv = torch.cat([weight, own[0]], 2), torch.cat([pv, own[1]], 1)
    off = pv.addcmul_(weight.transpose(1, 2)[..., None], exact[:, None], value=-1).flatten(3)
    norm = each.sum(-1)
    errors, computed = [], []
    for level in lambdas:
        live = kept if level == -math.inf else kept & (gain >= level)[:, :, None]
        summed = (torch.cat([live, ~kept], -1) if rows.tangent else live).to(off.dtype)
        error = distances(summed, weight, off, each)
        errors.append(torch.cat([norm[..., None], error], -1))
        count = live.sum(-1, dtype=torch.int32)
        computed.append(torch.nn.functional.pad(count, (1, 0)))
    return (
        torch.stack(errors, 2).flatten(0, 1),
        torch.stack(computed, 2).flatten(0, 1),
        norm.flatten(),
    )


def partials(s: Tensor, v: Tensor, block_n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What every key block contributes to the rows of one query block, in plain fp32.

    s is `[C, G, M, J·block_n]` and is overwritten, v `[C, J·block_n, D]`.

    Returns:
        Weight `[C, G, J, M]` and weighted values `[C, J, G, M, D]`, relative to each row's largest
        score; by how much a block comes closest to it, log2 units ≤ 0 `[C, G, J]`; and that score
        `[C, G, M]`.
    """
    by_block = torch.unflatten(s, -1, (-1, block_n))
    largest = by_block.amax(-1)
    top = largest.amax(-1, keepdim=True).clamp(min=-1 / LEAST)
    gain = (largest - top).amax(2) * math.log2(math.e)
    s.sub_(top).exp_()
    weight = by_block.sum(-1).transpose(2, 3)
    values = torch.unflatten(v, 1, (-1, block_n))
    pv = by_block.flatten(1, 2).transpose(1, 2) @ values  # one group: no copy
    return weight, torch.unflatten(pv, 2, s.shape[1:3]), gain, top[..., 0]


def distances(kept: Tensor, weight: Tensor, off: Tensor, each: Tensor) -> Tensor:
    """Σ|o − o*| `[C, G, N]` with the blocks of every row of `kept` `[C, G, N, J]`.

    Args:
        kept: fp32 0 or 1.
        weight: `[C, G, J, M]`.
        off: What a block adds to (o − o*) times the sum of weights `[C, J, G, M·D]`.
        each: Σ|o*| of every row `[C, G, M]`: its error if it keeps nothing.
    """
    total = kept @ weight
    moved = torch.unflatten(kept @ off.transpose(1, 2), 3, (each.shape[2], -1))
    lost = moved.abs_().sum(-1) / total.clamp(min=LEAST)
    return torch.where(total >= LEAST, lost, each[:, :, None]).sum(-1)


def tangents_of(
    q: Tensor, k: Tensor, v: Tensor, top: Tensor, rows: Rows, policy: Tensor
) -> tuple[Tensor, Tensor]:
    """What the tangents of blocks add, as `partials` gives it."""
    kb = Blocks.of(rows.length_k, rows.block_n, q.device)
    whole = head_full(rows.mask, policy, Blocks(rows.i[:1], rows.i[-1:]), kb)[:, 0, : rows.reach]
    weight, pv = contributions(
        q.flatten(0, 1)[None], k[None], v[None], whole, top.flatten(0, 1)[None], rows.length_k,
        rows.scale, rows.block_n,
    )  # fmt: skip
    weight, pv = (torch.unflatten(x[0], 0, q.shape[:2]) for x in (weight, pv))
    return weight, pv.transpose(1, 2)


def hidden_keys(rows: Rows) -> Iterator[tuple[slice, Tensor]]:
    """Runs of keys of which some are hidden, and which ones: bool `[B', H', M, keys]`."""
    i, device = rows.i, rows.i.device
    kb = Blocks.of(rows.length_k, rows.block_n, device)
    whole = head_full(rows.mask, rows.policy, Blocks(i[:1], i[-1:]), kb)[:, 0, : rows.reach]
    partly = ~whole.all(0)
    if rows.length_k < rows.reach * rows.block_n:
        partly[-1] = True
    if rows.data is not None:
        partly[:] = True
    for first, last in runs(partly.tolist()):
        j = torch.arange(first * rows.block_n, last * rows.block_n, device=device)
        unseen = ~(token_visible(rows.mask, rows.policy, i, j) & (j < rows.length_k))[None]
        if rows.data is not None:
            tokens = rows.data.tokens(int(i[0]), int(i[-1]) + 1)[..., : len(j)]
            unseen = unseen | ~torch.nn.functional.pad(tokens, (0, len(j) - tokens.shape[-1]))
        yield slice(int(j[0]), int(j[-1]) + 1), unseen


def runs(marked: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """First and one past the last place of every run of marks."""
    first = None
    for n, mark in enumerate([*marked, False]):
        if mark and first is None:
            first = n
        elif not mark and first is not None:
            yield first, n
            first = None


def bias_of(rows: Rows) -> Tensor | None:
    """What is added to the scores `[B', H', M, J·block_n]`, if anything is."""
    if rows.data is None:
        return None
    bias = rows.data.rows_added(int(rows.i[0]), int(rows.i[-1]) + 1)
    if bias is None:
        return None
    keys = rows.reach * rows.block_n
    return torch.nn.functional.pad(bias[..., :keys], (0, max(0, keys - bias.shape[-1])))


def part_of(x: Tensor, b: int, heads: slice, per: int) -> Tensor:
    """A document's heads, by group, of a tensor `[B', H', …]` whose axes may be 1."""
    own = x[b if len(x) > 1 else 0]
    return torch.unflatten(own[heads], 0, (-1, per)) if len(own) > 1 else own[None]


def fill(table: Tensor, blocks: int) -> Tensor:
    """Zeros after the last block within reach."""
    return torch.nn.functional.pad(table, (0, blocks + 1 - table.shape[-1]))
