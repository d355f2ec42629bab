"""What does a row give in which a mask leaves no key? Three answers, by how the model was written.

| blind | written as | such a row is |
|---|---|---|
| `zero` | SDPA, with a boolean mask or with −inf added | 0 |
| `nan` | softmax of scores that are all −inf | NaN |
| `mean` | softmax of scores that are all the lowest number | the mean of v over all keys |
The kernels make zeros; the others are put in their place afterwards.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from afbs_compile.kernels.data_mask import CHUNK_ELEMENTS, DataMask
from afbs_compile.kernels.geometry import Mask, site_tokens

ZERO, NAN, MEAN = BLIND = ("zero", "nan", "mean")


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
