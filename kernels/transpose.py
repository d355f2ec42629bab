"""Which query blocks list a key block? Block lists turned around, on a GPU, without a sort.

A byte map of all block pairs is marked, then every key block walks its column of the map: its
query blocks come out in ascending order. The oracle is `kernels.lists.transposed`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from afbs_compile.kernels.boxes import launch
from afbs_compile.kernels.launch import aligned
from afbs_compile.kernels.triton_common import LENGTHS

MARK = 256  # list entries that one step of a mark program holds
ROWS, COLUMNS = 64, 64  # query and key blocks of one step of a collect program


@triton.jit(do_not_specialize=LENGTHS)
def mark_kernel(COUNTS, INDICES, LISTED, blocks_k, MARK: tl.constexpr):
    """Mark the listed blocks of one row; `LISTED` is zero before."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(COUNTS + row)
    for c in range(0, count, MARK):
        e = c + tl.arange(0, MARK)
        n = tl.load(INDICES + row * blocks_k + e, mask=e < count, other=0)
        tl.store(LISTED + row * blocks_k + n, n * 0 + 1, mask=e < count)


@triton.jit(do_not_specialize=LENGTHS)
def collect_kernel(
    LISTED, COUNTS_T, INDICES_T, blocks_q, blocks_k, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The lists of `COLUMNS` key blocks of one head."""
    chunks = tl.cdiv(blocks_k, COLUMNS)
    head = (tl.program_id(0) // chunks).to(tl.int64)
    n = tl.program_id(0) % chunks * COLUMNS + tl.arange(0, COLUMNS)
    inside = n < blocks_k
    lists = INDICES_T + (head * blocks_k + n) * blocks_q
    found = tl.zeros([COLUMNS], tl.int32)
    for first in range(0, blocks_q, ROWS):
        m = first + tl.arange(0, ROWS)
        both = (m < blocks_q)[:, None] & inside[None, :]
        rows = LISTED + (head * blocks_q + m)[:, None] * blocks_k
        listed = tl.load(rows + n[None, :], mask=both, other=0).to(tl.int32)
        before = found[None, :] + tl.cumsum(listed, 0) - listed
        # listed blocks fill the list from the front, the others from the back: all in [0, NQ)
        slot = tl.where(listed > 0, before, blocks_q - 1 - (m[:, None] - before))
        entry = tl.broadcast_to(m[:, None], (ROWS, COLUMNS))
        tl.store(lists[None, :] + slot, entry, mask=both)
        found += tl.sum(listed, 0)
    tl.store(COUNTS_T + head * blocks_k + n, found, mask=inside)


def transposed(counts: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """For every key block, the query blocks that list it; no host synchronisation.

    Takes `B * H * NQ * NK` bytes of memory beside the result.

    Args:
        counts: int32 `[B, H, NQ]` (see `kernels.lists`).
        indices: int32 `[B, H, NQ, NK]`.

    Returns:
        `counts` int32 `[B, H, NK]` and `indices` int32 `[B, H, NK, NQ]`, ascending; entries from
        `counts` on are undefined, but lie in `[0, NQ)`.
    """
    batch, heads, blocks_q, blocks_k = indices.shape
    counts, indices = counts.contiguous(), indices.contiguous()
    listed = torch.zeros(indices.shape, dtype=torch.uint8, device=indices.device)
    counts_t = torch.empty(batch, heads, blocks_k, dtype=torch.int32, device=indices.device)
    indices_t = torch.empty(
        batch, heads, blocks_k, blocks_q, dtype=torch.int32, device=indices.device
    )
    key = indices.shape, aligned(counts, indices)
    launch(
        mark_kernel, key, indices, batch * heads * blocks_q,
        (counts, indices, listed, blocks_k), MARK=MARK, num_warps=4,
    )  # fmt: skip
    launch(
        collect_kernel, key, indices, batch * heads * triton.cdiv(blocks_k, COLUMNS),
        (listed, counts_t, indices_t, blocks_q, blocks_k), ROWS=ROWS, COLUMNS=COLUMNS,
        num_warps=4,
    )  # fmt: skip
    return counts_t, indices_t
