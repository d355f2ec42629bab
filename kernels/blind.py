"""What does a row give in which a mask leaves no key? Answers by how the model was written.

| blind | written as | such a row is |
|---|---|---|
| `zero` | SDPA, with a boolean mask or with −inf added | 0 |
| `nan` | softmax of scores that are all −inf | NaN, and so are gradients that it has a part in |
| `mean` | softmax of scores that were all replaced by the lowest number | the mean of v |
| `even` | softmax of scores to which the lowest number was added | the mean of v |
The kernels make zeros; the others are put in their place afterwards. A mean is one over all keys.
Its gradient goes to v; under `even` also to q and k, by way of weights that are all equal: of a
sum, whatever it was rounded to, the addends have the gradient.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from afbs_compile.kernels.data_mask import CHUNK_ELEMENTS, DataMask
from afbs_compile.kernels.geometry import Mask, site_tokens

ZERO, NAN, MEAN, EVEN = BLIND = ("zero", "nan", "mean", "even")
Gradients = tuple[Tensor, Tensor, Tensor]


def blind_rows(data: DataMask, mask: Mask, length_q: int, length_k: int) -> Tensor:
    """Bool `[B', H', Lq]`: rows that see nothing under both masks. Reads every pair once."""
    device = data.tokens(0, 1).device
    j = torch.arange(length_k, device=device)

    def seen() -> Iterator[Tensor]:
        one = data.tokens(0, 1)
        rows = max(1, CHUNK_ELEMENTS // max(1, one.shape[0] * one.shape[1] * length_k))
        for first in range(0, length_q, rows):
            last = min(first + rows, length_q)
            i = torch.arange(first, last, device=device)
            yield (data.tokens(first, last) & site_tokens(mask, i, j)).any(3)

    return ~torch.cat(list(seen()), 2)


def blinded(o: Tensor, v: Tensor, data: DataMask | None, mask: Mask) -> Tensor:
    """A result in which blind rows are what they should be.

    Args:
        o: `[B, Hq, Lq, D]`; blind rows may hold anything.
        v: `[B, Hkv, Lk, D]`.
        data: The part of the mask that comes with the call; `data.blind` is the answer.
        mask: The site's mask.

    Raises:
        ValueError: For an unknown answer.
    """
    if data is None or data.blind == ZERO:
        return o
    if data.blind not in BLIND:
        raise ValueError(f"blind rows cannot be {data.blind!r}: use one of {', '.join(BLIND)}")
    rows = blind_rows(data, mask, o.shape[2], v.shape[2])[..., None]
    if data.blind == NAN:
        return o.masked_fill(rows, math.nan)
    mean = v.float().mean(2, keepdim=True).repeat_interleave(o.shape[1] // v.shape[1], 1)
    return torch.where(rows, mean.to(o.dtype), o)


def blind_gradients(
    found: Gradients,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    data: DataMask | None,
    mask: Mask,
    scale: float,
) -> Gradients:
    """Gradients with what blind rows give beside them.

    Under `even` p = 1 / Lk, so ds_ij = p do_i·(v_j − mean(v)): sums over pairs become products of
    matrices of D × D.

    Args:
        found: `dq`, `dk`, `dv` of the other rows; `dq` is 0 in blind ones.
        do: Gradient of `blinded`'s result, `[B, Hq, Lq, D]`.
        q: `[B, Hq, Lq, D]`.
        k: `[B, Hkv, Lk, D]`.
        v: `[B, Hkv, Lk, D]`.
        data: As in `blinded`.
        mask: The site's mask.
        scale: Multiplier on q·k.
    """
    if data is None or data.blind == ZERO:
        return found
    dq, dk, dv = found
    kv_heads, length_k = v.shape[1:3]
    rows = blind_rows(data, mask, q.shape[2], length_k)[..., None].expand(*q.shape[:3], 1)
    # heads without a blind row must not meet the NaN that a hidden key may hold
    some = together(rows.any(2, keepdim=True), kv_heads).any(2, keepdim=True)
    if data.blind == NAN:
        dk, dv = (x.masked_fill(some, math.nan) for x in (dk, dv))
        return dq.masked_fill(rows, math.nan), dk, dv
    do = together(torch.where(rows, do.float(), 0), kv_heads)
    dv = torch.where(some, dv + do.sum(2, keepdim=True) / length_k, dv)
    if data.blind == EVEN:
        weight, apart = scale / length_k, v.float() - v.float().mean(2, keepdim=True)
        more = do @ (apart.transpose(2, 3) @ k.float()) * weight
        dq = torch.where(rows, more.reshape(q.shape), dq)
        inner = together(torch.where(rows, q.float(), 0), kv_heads)
        dk = torch.where(some, dk + apart @ (do.transpose(2, 3) @ inner) * weight, dk)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def together(x: Tensor, kv_heads: int) -> Tensor:
    """`[B, Hq, L, D]` as `[B, Hkv, G · L, D]`: the queries of a key/value head in one row."""
    return torch.unflatten(x, 1, (kv_heads, -1)).flatten(2, 3)
