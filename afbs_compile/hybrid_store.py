"""How do new tokens get to their places in a hybrid cache? Writing, and what lies where.

Tokens are counted without padding: the first real token of a sequence is its token 0. Notation: B
sequences, n new tokens a sequence of which the last `fresh[b]` are real.
"""

from typing import Any

import torch
from torch import Tensor

from afbs_compile.hybrid_layout import Span
from afbs_compile.kernels import decode

NOTHING = -(1 << 30)  # the token in a row that holds none


def allocate(layer: Any, key_states: Tensor, value_states: Tensor) -> None:
    """Make the tensors of a layer, like `key_states` and `value_states` in all but length."""
    device = key_states.device
    layer.dtype, layer.device = key_states.dtype, device
    shape = (layer.max_batch, layer.layout.rows)
    layer.keys = key_states.new_zeros(*shape, key_states.shape[-1])
    layer.values = value_states.new_zeros(*shape, value_states.shape[-1])
    layer.lengths = torch.zeros(layer.max_batch, dtype=torch.int32, device=device)
    layer.cumulative_length = layer.cumulative_length.to(device)
    columns = torch.tensor(layer.layout.columns(), dtype=torch.int32, device=device)
    layer.bases, layer.slots, layer.windows, layer.sinks = (x.clone() for x in columns)
    layer.members = [torch.tensor(span.heads, device=device) for span in layer.layout.spans]
    if layer.rules is not None:
        layer.rules = layer.rules.to(device)
    multiprocessors = 1
    if device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    longest = layer.layout.spans[0]  # no head of another span is longer
    programs = layer.max_batch * len(longest.heads)
    layer.splits = decode.splits_for(programs, longest.slots, multiprocessors)
    work = decode.shares(layer.layout.columns()[1], layer.splits)
    layer.work = torch.tensor(work, dtype=torch.int32, device=device)
    if not torch.compiler.is_compiling():  # CUDA graphs copy what may move
        tensors = [x for x in vars(layer).values() if isinstance(x, Tensor)]
        for x in (*tensors, *layer.members):
            torch._dynamo.mark_static_address(x)


def put_one(layer: Any, k: Tensor, v: Tensor) -> None:
    """Store one token of each sequence: k `[B, Hkv, 1, D]`, v `[B, Hkv, 1, Dv]`.

    Where the token is padding, it lies where the next one will.
    """
    batch = k.shape[0]
    token = layer.lengths[:batch, None].long()
    ring = layer.sinks + (token - layer.sinks) % layer.windows
    place = layer.bases + torch.where(token < layer.sinks, token, ring)  # [B, Hkv]
    # beyond the end is no place at all: better an index error than a neighbour's row
    place = torch.where(token < layer.layout.longest, place, layer.layout.rows)
    sequence = torch.arange(batch, device=k.device)[:, None]
    for store, new in ((layer.keys, k), (layer.values, v)):
        # on the store itself: through a view Inductor would copy all of it for one token
        store.index_put_((sequence, place), new[:, :, 0])


def put_many(layer: Any, k: Tensor, v: Tensor, fresh: Tensor | None) -> None:
    """Store n tokens of each sequence: k `[B, Hkv, n, D]`, v `[B, Hkv, n, Dv]`."""
    batch, _, count, _ = k.shape
    past = layer.lengths[:batch].long()
    pads = past * 0 if fresh is None else count - fresh.long()
    for span, members in zip(layer.layout.spans, layer.members, strict=True):
        for store, new in ((layer.keys, k), (layer.values, v)):
            held = view(store, span, batch)
            new = new if len(span.heads) == layer.layout.kv_heads else new[:, members]
            if span.slots < layer.layout.longest:
                put_ring(held, new, span, past, pads)
            elif fresh is None and not layer.filled:
                held[:, :, :count] = new
            else:
                # padding goes behind the real tokens, where the next ones will lie
                at = past[:, None] + (torch.arange(count, device=k.device) - pads[:, None]) % count
                held.scatter_(2, at[:, None, :, None].expand_as(new), new)


def put_ring(held: Tensor, new: Tensor, span: Span, past: Tensor, pads: Tensor) -> None:
    """Store tokens in rings `held` `[B, H, slots, D]`; each row takes the last that belongs there.

    Args:
        held: The rings.
        new: `[B, H, n, D]`.
        span: Their span.
        past: int64 `[B]`, tokens before.
        pads: int64 `[B]`, how many of the new ones, at the start, are padding.
    """
    token = tokens_held(span, past + new.shape[2] - pads)  # [B, slots]
    source = (token - past[:, None] + pads[:, None]).clamp(0, new.shape[2] - 1)
    taken = new.gather(2, source[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3]))
    held.copy_(torch.where((token >= past[:, None])[:, None, :, None], taken, held))


def tokens_held(span: Span, lengths: Tensor) -> Tensor:
    """int64 `[B, slots]`: which token each row of a head holds, `NOTHING` where none.

    `lengths` int64 `[B]` are the tokens of the sequences.
    """
    row = torch.arange(span.slots, device=lengths.device)
    last = lengths[:, None] - 1 - span.sink  # of the ring's own count
    turned = span.sink + last - (last - (row - span.sink)) % span.window
    token = torch.where(row < span.sink, row, turned)
    live = (token < lengths[:, None]) & (token >= torch.where(row < span.sink, 0, span.sink))
    return torch.where(live, token, NOTHING)


def view(store: Tensor, span: Span, batch: int) -> Tensor:
    """The rows of a span: `[B, H, slots, D]`."""
    part = store[:batch, span.base : span.base + span.rows]
    return torch.unflatten(part, 1, (len(span.heads), span.slots))
