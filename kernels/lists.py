"""Block lists: for every query block, the key blocks that attention visits.

`counts` int32 `[B, H, NQ]`, `indices` int32 `[B, H, NQ, NK]` ascending. Entries of a row from
`counts` on are undefined, but lie in `[0, NK)`. Dense, sparse and windowed heads all end here.
"""

import torch
from torch import Tensor


def from_keep(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Lists of a bool tensor `[..., NQ, NK]`: `(counts [..., NQ], indices [..., NQ, NK])`."""
    counts = keep.sum(-1, dtype=torch.int32)
    # stable argsort of the negation: kept columns first, each group in ascending order
    indices = torch.argsort((~keep).to(torch.uint8), dim=-1, stable=True).to(torch.int32)
    return counts, indices


def to_keep(counts: Tensor, indices: Tensor) -> Tensor:
    """The inverse of `from_keep`: bool `[..., NQ, NK]`."""
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    keep = torch.zeros_like(indices, dtype=torch.bool)
    return keep.scatter(-1, indices.long(), listed)


def transposed(counts: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """For every key block, the query blocks that list it: `([..., NK], [..., NK, NQ])`."""
    return from_keep(to_keep(counts, indices).transpose(-1, -2))
