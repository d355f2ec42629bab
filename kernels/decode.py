"""The op `afbs::decode`: one query a head over a cache whose heads keep different lengths.

A cache is a matrix `[T, D]` a sequence; KV head h owns the rows `bases[h] … bases[h] + slots[h]`.
A head that keeps everything has `slots` for the longest sequence; one with a window has a ring.
Rows fill from the first on, so the live ones are the first `min(length, slots[h])`: what a query
sees is exactly those, in whatever order a ring holds them. Lengths are data: a cache that grows
neither recompiles nor synchronises.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from afbs_compile.kernels import op as attention_op
from afbs_compile.kernels.refusals import unsupported

WAVES = 4  # programs for each multiprocessor that the longest heads are split into
MOST_SPLITS = 128
SHORTEST = 256  # rows of a share; as `triton_decode.LEAST`, which a CPU need not import

LIBRARY: Any = attention_op.LIBRARY
LIBRARY.define(
    "decode(Tensor q, Tensor keys, Tensor values, Tensor bases, Tensor slots, Tensor lengths, "
    "Tensor work, float scale, int splits) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def splits_for(programs: int, capacity: int, multiprocessors: int) -> int:
    """In how many shares to read a KV head, so that the longest heads fill a GPU.

    Args:
        programs: Sequences times KV heads of the longest kind.
        capacity: Rows that such a head can hold.
        multiprocessors: Of the device.
    """
    wanted = -(-WAVES * multiprocessors // max(programs, 1))
    return max(1, min(wanted, -(-capacity // SHORTEST), MOST_SPLITS))


def shares(slots: Sequence[int], splits: int) -> list[int]:
    """The shares that KV heads of `slots` rows can have, as `head · splits + share`.

    Long heads come first: what starts last should be short.
    """
    order = sorted(range(len(slots)), key=lambda h: -slots[h])
    counts = {h: min(splits, -(-slots[h] // SHORTEST)) for h in order}
    return [h * splits + share for h in order for share in range(counts[h])]


def decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    bases: Tensor,
    slots: Tensor,
    lengths: Tensor,
    work: Tensor,
    scale: float,
    splits: int,
) -> Tensor:
    """Attention of one query a head over the live rows of its KV head.

    Args:
        q: `[B, Hq, 1, D]`, any strides.
        keys: `[B, T, D]` contiguous, in q's dtype.
        values: `[B, T, D]` contiguous.
        bases: int32 `[Hkv]`, first row of a KV head; Hkv divides Hq.
        slots: int32 `[Hkv]`, rows of a KV head.
        lengths: int32 `[B]`, tokens of a sequence, the query's own included.
        work: int32 `[W]`, `shares` of slots and splits; a CPU does not read it.
        scale: Multiplier on q·k.
        splits: Shares of a KV head that run at the same time, at most (`splits_for`).

    Returns:
        `o` `[B, Hq, 1, D]` in q's dtype; 0 for an empty sequence.

    Raises:
        ValueError: The tensors do not fit together, or no kernel can run them.
    """
    require(q, keys, values, bases, slots, lengths, work, splits)
    if q.device.type == "cuda":
        from afbs_compile.kernels import triton_decode as gpu

        return gpu.decode(q, keys, values, bases, slots, lengths, work, scale=scale, splits=splits)
    return on_cpu(q, keys, values, bases, slots, lengths, scale)


def require(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    bases: Tensor,
    slots: Tensor,
    lengths: Tensor,
    work: Tensor,
    splits: int,
) -> None:
    """Raise a ValueError unless `decode` can run."""
    batch, heads, queries, dim = q.shape
    if queries != 1:
        raise ValueError(f"afbs::decode takes one query a head, not {queries}")
    for name, x in (("keys", keys), ("values", values)):
        fits = x.dim() == 3 and x.shape[0] == batch and x.shape[2] == dim and x.dtype == q.dtype
        if not (fits and x.is_contiguous()):
            wanted = f"contiguous {q.dtype} [{batch}, rows, {dim}]"
            raise ValueError(f"{name} are {x.dtype} {list(x.shape)}; afbs::decode needs {wanted}")
    for name, x in (("bases", bases), ("slots", slots), ("lengths", lengths), ("work", work)):
        if x.dtype != torch.int32 or x.dim() != 1:
            raise ValueError(f"{name} is {x.dtype} {list(x.shape)}; afbs::decode needs int32 [n]")
    if len(lengths) != batch:
        raise ValueError(f"{len(lengths)} lengths are not those of {batch} sequences")
    if len(bases) != len(slots) or heads % len(slots):
        raise ValueError(f"{len(slots)} KV heads do not divide {heads} query heads")
    if splits < 1:
        raise ValueError(f"splits is {splits}; it is at least 1")
    reason = unsupported(q.device.type, q.dtype, max(dim, 32))
    if reason is not None:
        raise ValueError(f"afbs::decode: {reason}")


def on_cpu(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    bases: Tensor,
    slots: Tensor,
    lengths: Tensor,
    scale: float,
) -> Tensor:
    """`decode` in plain torch: SDPA of every KV head over its live rows."""
    group, results = q.shape[1] // len(slots), []
    for h, (base, size) in enumerate(zip(bases.tolist(), slots.tolist(), strict=True)):
        live = lengths.clamp(max=size)
        most = max(int(live.max()), 1)
        seen = torch.arange(most, device=q.device) < live[:, None]
        k, v = (x[:, None, base : base + most] for x in (keys, values))
        # a row that is not live may hold anything: 0 · NaN is NaN
        mask = None if bool(seen.all()) else seen[:, None, None]
        v = v if mask is None else v.masked_fill(~seen[:, None, :, None], 0)
        k = k if mask is None else k.masked_fill(~seen[:, None, :, None], 0)
        heads = q[:, h * group : (h + 1) * group]
        o = torch.nn.functional.scaled_dot_product_attention(
            heads, k, v, mask, scale=scale, enable_gqa=group > 1
        )
        results.append(o.masked_fill((live == 0)[:, None, None, None], 0))
    return torch.cat(results, 1)


def decode_fake(q: Tensor, *rest: Any) -> Tensor:
    """Shape, dtype and strides of the result."""
    return q.new_empty(q.shape)


LIBRARY.impl("decode", decode, "CompositeExplicitAutograd")
torch.library.register_fake("afbs::decode", decode_fake, lib=LIBRARY)
