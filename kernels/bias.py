"""What is added to the scores? A mask as a run-time operand: T5's biases, ALiBi, padding.

A bias is `[B', H', Lq, Lk]` of any strides, B' and H' B and H or 1; what is broadcast has stride
0 and is never written out. −inf hides a pair. A number at or below `HIDDEN` leaves its probability
at exactly 0, unless all that the row sees is as low: such a row keeps every key that it sees.
Blocks in which nothing else stands are hidden; the others get the mean of exp(bias) over the pairs
that count, as an addend of their pooled scores.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

HIDDEN = -1e4  # scores lie far closer together: exp(HIDDEN + s − max) is 0 in fp32
FLOOR = -1e30  # a level below it would make infinities in base 2


def counted(bias: Tensor, seen: Tensor) -> Tensor:
    """The pairs of some rows that count, of those that are seen; bool, over all keys."""
    live = seen & (bias > HIDDEN)
    return torch.where(live.any(-1, keepdim=True), live, seen)


def levels(bias: Tensor, pairs: Tensor, block_m: int, block_n: int) -> Tensor:
    """Log of the mean of exp(bias) over the pairs of every block, fp32; `FLOOR` without any.

    Args:
        bias: `[B', H', M, Lk]`.
        pairs: Bool `[B'', H'', M, Lk]`, those that count.
        block_m: Query block, tokens.
        block_n: Key block, tokens.
    """
    x = torch.where(pairs, bias.float(), -math.inf)
    x = pad(x, (0, -x.shape[3] % block_n, 0, -x.shape[2] % block_m), value=-math.inf)
    x = torch.unflatten(torch.unflatten(x, 3, (-1, block_n)), 2, (-1, block_m))
    count = (x > -math.inf).sum((3, 5))
    top = x.amax((3, 5))
    top = top.masked_fill(top == -math.inf, 0)
    total = torch.exp(x - top[:, :, :, None, :, None]).sum((3, 5))
    return (top + torch.log(total) - torch.log(count.clamp(min=1).float())).clamp(min=FLOOR)


def needed(first: Tensor, blocks_k: int, block_m: int, block_n: int) -> Tensor:
    """Blocks without which a row might be left with no key: that of each row's first key.

    Args:
        first: int `[B', H', M]`, the first key that counts; negative for rows without one.
        blocks_k: Key blocks.
        block_m: Query block, tokens.
        block_n: Key block, tokens.

    Returns:
        Bool `[B', H', M / block_m, NK]`.
    """
    block = torch.where(first < 0, blocks_k, first // block_n).long()
    block = pad(block, (0, -block.shape[2] % block_m), value=blocks_k)
    block = torch.unflatten(block, 2, (-1, block_m))
    found = block.new_zeros((*block.shape[:3], blocks_k + 1), dtype=torch.bool)
    return found.scatter_(3, block, True)[..., :blocks_k]


def first_true(x: Tensor) -> Tensor:
    """Where each row of a bool `[…, N]` is True first; −1 for a row that never is."""
    return torch.where(x.any(-1), x.to(torch.uint8).argmax(-1), -1)


def added(attn_mask: Tensor | None, bias: Tensor, q: Tensor) -> Tensor:
    """A bias, and −inf where a boolean mask hides, in a dtype that SDPA takes beside q."""
    if bias.dtype not in (q.dtype, torch.float32):
        bias = bias.to(q.dtype)
    return bias if attn_mask is None else torch.where(attn_mask, bias, -math.inf)
