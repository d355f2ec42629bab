"""`nn.MultiheadAttention` and `nn.TransformerEncoderLayer`, with their SDPA laid open.

Dynamo sees the first as one call of `multi_head_attention_forward`, and the second, in inference,
as one fused operator. The first is run on fake tensors to write down what it does, the second is
written out here from its documentation (Transformer layer, Vaswani et al. 2017).
"""

import operator
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from afbs_compile.kernels.blind import NAN, ZERO
from afbs_compile.passes.emit import Emitter
from afbs_compile.passes.forms import Form, swap
from afbs_compile.passes.sites import BLIND, SDPA
from afbs_compile.passes.spellings import argument
from afbs_compile.passes.tape import inlined

MHA = F.multi_head_attention_forward
LAYER = torch._transformer_encoder_layer_fwd
FAST_PATH = torch._native_multi_head_attention
NEEDS_WEIGHTS, IS_CAUSAL = 15, 24  # places among the arguments of MHA
WEIGHTS_READ = "attention weights are read: pass need_weights=False"


def is_module(node: Node) -> bool:
    """Is this a whole attention module in one node?"""
    return node.op == "call_function" and node.target in (MHA, LAYER, FAST_PATH)


def lower(gm: GraphModule) -> Iterator[Form | tuple[Node, str]]:
    """Lay every module open; a node and a reason for each one that cannot be."""
    for node in [n for n in gm.graph.nodes if is_module(n)]:
        if node.target is FAST_PATH:
            yield node, "fast path of nn.MultiheadAttention (one opaque operator)"
            continue
        emit = Emitter(node)
        try:
            yield encoder(node, emit) if node.target is LAYER else multi_head(node, emit)
        except Exception as reason:  # whatever torch's own code raises on fake tensors
            for made in reversed(emit.made):
                made.graph.erase_node(made)
            yield node, f"{node.name} cannot be laid open: {reason}"


def multi_head(node: Node, emit: Emitter) -> Form | tuple[Node, str]:
    """`multi_head_attention_forward` without its weights, if nobody reads them."""
    parts = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    weights = parts.get(1)
    needed = argument(node, NEEDS_WEIGHTS, "need_weights", True)
    if len(parts) < len(node.users) or (weights is not None and weights.users and needed):
        return node, WEIGHTS_READ
    args, kwargs = node.args[:NEEDS_WEIGHTS], dict(node.kwargs)
    if len(node.args) > NEEDS_WEIGHTS:
        return node, "nn.MultiheadAttention called with positional need_weights"
    kwargs["need_weights"] = False
    if needed:  # then the hint is no more than a hint
        kwargs["is_causal"] = False
    out, _ = inlined(emit, MHA, args, kwargs)
    old, blind = parts[0], NAN if needed else ZERO  # with weights it is written as softmax
    return form(emit, "nn.MultiheadAttention", old, out, [node, *parts.values()], blind)


def encoder(node: Node, emit: Emitter) -> Form:
    """`_transformer_encoder_layer_fwd`, written out; the site has the name it has in training."""
    out = inlined(emit, encoder_layer, node.args, dict(node.kwargs))
    result = form(emit, "nn.TransformerEncoderLayer", node, out, [node], NAN)
    if stack := node.meta.get("nn_module_stack"):
        layer, _ = next(reversed(stack.values()))
        inner = {"self_attn": (f"{layer}.self_attn", torch.nn.MultiheadAttention)}
        result.sdpa.meta["nn_module_stack"] = dict(stack) | inner
    return result


def form(emit: Emitter, kind: str, old: Node, out: Node, inner: list[Node], blind: str) -> Form:
    """The one SDPA call among new nodes, and what it stands for."""
    (sdpa,) = [n for n in emit.made if n.op == "call_function" and n.target in SDPA]
    sdpa.meta[BLIND] = blind
    made = list(emit.made)
    return Form(sdpa, kind, [swap(old, out, made)], made, inner)


def encoder_layer(
    src: Tensor, embed_dim: int, heads: int,
    in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, out_bias: Tensor,
    use_gelu: bool, norm_first: bool, eps: float,
    norm1_weight: Tensor, norm1_bias: Tensor, norm2_weight: Tensor, norm2_bias: Tensor,
    up_weight: Tensor, up_bias: Tensor, down_weight: Tensor, down_bias: Tensor,
    mask: Tensor | None = None, mask_type: int | None = None,
) -> Tensor:  # fmt: skip
    """A Transformer encoder layer in inference, `[B, L, E]`; a mask is non-zero where it hides."""

    def attend(x: Tensor) -> Tensor:
        parts = F.linear(x, in_weight, in_bias).chunk(3, -1)
        shape = (*x.shape[:2], heads, embed_dim // heads)
        q, k, v = (part.reshape(shape).transpose(1, 2) for part in parts)
        seen = None if mask is None else (mask == 0)
        if seen is not None and mask_type == 1:  # one row for every batch entry
            seen = seen[:, None, None]
        o = F.scaled_dot_product_attention(q, k, v, seen)
        return F.linear(o.transpose(1, 2).flatten(2), out_weight, out_bias)

    def think(x: Tensor) -> Tensor:
        wide: Callable[[Tensor], Tensor] = F.gelu if use_gelu else F.relu
        return F.linear(wide(F.linear(x, up_weight, up_bias)), down_weight, down_bias)

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    if norm_first:
        x = src + attend(norm(src, norm1_weight, norm1_bias))
        return x + think(norm(x, norm2_weight, norm2_bias))
    x = norm(src + attend(src), norm1_weight, norm1_bias)
    return norm(x + think(x), norm2_weight, norm2_bias)
