"""How many blocks does a query block keep under a budget? A number known before the call.

A head with a budget b keeps max(⌊b·V + ½⌋, forced, 1) of the V blocks that its query block sees:
what is forced, then the best by score, of equals the first. Neither tau nor the gate theta counts.
b is taken in whole 2^-14 and the product is made of integers, so that every device rounds alike.
"""

import torch
from torch import Tensor

from afbs_compile.kernels import policy_columns as col

UNIT = 1 << 14  # the product with a number of blocks stays inside int32


def budgeted(policy: Tensor) -> Tensor:
    """Bool `[H]`: which heads choose their blocks by a budget?"""
    return (policy[:, col.MODE] == col.SPARSE) & (policy[:, col.BUDGET] > 0)


def blocks(policy: Tensor, visible: Tensor, forced: Tensor) -> Tensor:
    """Blocks that heads with a budget keep, int64 `[H, NQ]`; both masks are bool `[H, NQ, NK]`."""
    units = (policy[:, col.BUDGET] * UNIT + 0.5).long().clamp(max=UNIT)
    seen = visible.sum(-1)
    wanted = (units[:, None] * seen + UNIT // 2) // UNIT
    return torch.minimum(wanted.clamp(min=1), seen).maximum((visible & forced).sum(-1))


def best(order: Tensor, visible: Tensor, forced: Tensor, policy: Tensor) -> Tensor:
    """Bool `[B, H, NQ, NK]` along `order` (by falling score): which blocks fill the budget up?"""
    room = blocks(policy, visible, forced) - (visible & forced).sum(-1)
    free = (visible & ~forced).expand(order.shape).gather(-1, order)
    return free & (free.cumsum(-1) <= room[..., None])
