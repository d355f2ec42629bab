"""Which key blocks does each query block keep? The selection rule in plain torch.

The oracle of the Triton selection kernel, and what runs on a CPU. A sparse head keeps the smallest
set of top-scored blocks whose scores reach tau (SpargeAttn keeps one block fewer), plus what is
forced: the sink, the diagonal and the `neighbours` blocks before it. Mean pooling is blind to the
sink's mass and misses the block before the diagonal, which the first rows of a block need. A head
with a budget (`kernels.budget`) keeps a number of blocks that is known before.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from afbs_compile.kernels import budget
from afbs_compile.kernels import policy_columns as col
from afbs_compile.kernels.data_mask import MaskedBlocks
from afbs_compile.kernels.geometry import Blocks, Mask, head_visible
from afbs_compile.kernels.lists import from_keep
from afbs_compile.kernels.scores import block_scores, sink_tokens


def select(
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
    """Block lists of one attention call.

    Args:
        q: `[B, Hq, Lq, D]`.
        k: `[B, Hkv, Lk, D]`.
        policy: float32 `[Hq, COLUMNS]` on the device of q.
        mask: The site's mask.
        scale: Multiplier on q·k.
        selector: `sub8`, `sub4` or `mean`.
        block_m: Query block, tokens.
        block_n: Key block, tokens.
        core: Runs instead of `scores.sub_scores`, such as a compiled one.
        masked: The part of the mask that comes with the call, for these blocks.

    Returns:
        `counts` int32 `[B, Hq, NQ]` and `indices` int32 `[B, Hq, NQ, NK]` (see `kernels.lists`).
    """
    scores, gated = block_scores(
        q, k, policy, mask=mask, scale=scale, selector=selector,
        block_m=block_m, block_n=block_n, core=core, masked=masked,
    )  # fmt: skip
    qb, kb = Blocks.of(q.shape[2], block_m, q.device), Blocks.of(k.shape[2], block_n, q.device)
    visible = head_visible(mask, policy, qb, kb)
    if masked is not None:
        visible = visible & masked.some
    forced = forced_blocks(mask, policy, qb, kb, block_n, masked) | gated
    needed = None if masked is None else masked.needed
    return from_keep(keep_blocks(scores, forced, visible, policy, needed))


def forced_blocks(
    mask: Mask,
    policy: Tensor,
    q: Blocks,
    k: Blocks,
    block_n: int,
    masked: MaskedBlocks | None = None,
) -> Tensor:
    """Bool `[H, NQ, NK]`: sink, diagonal and neighbours (visibility is not applied here).

    With `masked` it is `[B', H, NQ, NK]`: the text of each row begins somewhere else.
    """
    sink = k.first < sink_tokens(policy, block_n)[:, None, None]
    if masked is not None:
        sink = k.first - masked.start[..., None] < sink_tokens(policy, block_n)[:, None, None]
    if not mask.causal:
        return sink.expand(*sink.shape[:-2], len(q), -1)
    reach = policy[:, col.NEIGHBOURS].long()[:, None, None] * block_n
    near = k.first + block_n > q.first[:, None] + mask.offset - reach
    return sink | near


def keep_blocks(
    scores: Tensor,
    forced: Tensor,
    visible: Tensor,
    policy: Tensor,
    needed: Tensor | None = None,
) -> Tensor:
    """The rule: bool `[B, H, NQ, NK]` from scores, forced and visible blocks.

    `needed` blocks come on top, beyond a budget too: without them a row might be left with no key.
    A query block whose scores are not finite keeps everything it sees: it stays dense.
    """
    mode = policy[:, col.MODE][:, None, None]
    tau = policy[:, col.TAU][:, None, None]
    limited, share = budget.budgeted(policy)[:, None, None], policy[:, col.BUDGET][:, None, None]
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    ranked = scores.gather(-1, order)
    before = ranked.cumsum(-1) - ranked
    taken = torch.where(limited, budget.best(order, visible, forced, policy), before < tau)
    top = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, taken)
    keep = (top | forced) & visible
    if needed is not None:
        keep |= needed & visible
    # a block row must not end empty while it sees something: its best block stands in
    best = torch.zeros_like(keep).scatter(-1, order[..., :1], True) & visible
    keep |= best & ~keep.any(-1, keepdim=True)
    whole = torch.where(limited, share, tau) >= 1
    everything = (mode != col.SPARSE) | whole | ~scores.isfinite().all(-1, keepdim=True)
    return torch.where(everything, visible, keep)


def blocks_kept(
    policy: Tensor, *, mask: Mask, length_q: int, length_k: int, block_m: int, block_n: int
) -> tuple[Tensor, Tensor]:
    """What a call with budgets will cost: kept and visible blocks of every head, int64 `[H]`.

    Exact but for query blocks whose scores are not finite, which stay dense. Heads without a
    budget count as dense, since what they keep hangs on the data.
    """
    qb, kb = (Blocks.of(n, size, policy.device)
              for n, size in ((length_q, block_m), (length_k, block_n)))  # fmt: skip
    visible = head_visible(mask, policy, qb, kb)
    forced = forced_blocks(mask, policy, qb, kb, block_n)
    seen = visible.sum(-1)
    kept = torch.where(budget.budgeted(policy)[:, None],
                       budget.blocks(policy, visible, forced), seen)  # fmt: skip
    return kept.sum(-1), seen.sum(-1)
