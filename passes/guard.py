"""May this call be rewritten? Reasons that can be read off the graph alone.

A refused call is never an error: it stays SDPA and its reason is counted.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import SymInt
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from afbs_compile.kernels.refusals import (
    NO_BIAS_GRADIENT,
    no_backward,
    no_compensated_backward,
    no_data_mask,
    unsupported,
)
from afbs_compile.passes.sites import Call, recorded, value

FUSED = frozenset({"CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "FLASH_ATTENTION", "OVERRIDEABLE"})
MATH_ONLY = "sdpa_kernel without a fused kernel"


@dataclass(frozen=True, slots=True)
class Context:
    """What surrounds a call.

    Attributes:
        region: A region in which the call must stay as it is, or None.
        autocast: By device type, the dtype that autocast gives q, k and v.
    """

    region: str | None = None
    autocast: Mapping[str, torch.dtype] = field(default_factory=dict)


def contexts(graph: Graph) -> dict[Node, Context]:
    """The context of every node.

    `sdpa_kernel` says which exact kernels may run. A choice that has a fused one in it is open to
    ours, which is fused too; a choice without (`MATH`: reference results, second derivatives) is
    kept to.
    """
    vmaps, allowed, open_casts = 0, True, dict[Node, tuple[str, torch.dtype | None]]()
    found: dict[Node, Context] = {}
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        if name in ("_vmap_increment_nesting", "_vmap_decrement_nesting"):
            vmaps += 1 if "increment" in name else -1
        elif name == "_sdpa_kernel":
            allowed = any(backend(x) in FUSED for x in node.args[0])
        elif name == "_enter_autocast":
            open_casts[node] = cast_of(node)
        elif name == "_exit_autocast":
            open_casts.pop(node.args[0], None)
        region = "vmap" if vmaps > 0 else None if allowed else MATH_ONLY
        casts = dict(open_casts.values())  # the innermost comes last
        found[node] = Context(region, {d: t for d, t in casts.items() if t is not None})
    return found


def backend(x: object) -> str:
    """The name of an SDPA backend, given as such or as a node that makes it from its name."""
    return str(x.args[0]) if isinstance(x, Node) else str(getattr(x, "name", x))


def cast_of(node: Node) -> tuple[str, torch.dtype | None]:
    """Device type and dtype of an autocast region; None where it is switched off."""
    device, dtype, enabled = cast(tuple[str, torch.dtype | None, bool], node.args[:3])
    if not enabled:
        return str(device), None
    return str(device), dtype or torch.get_autocast_dtype(str(device))


def refusal(
    call: Call, context: Context, min_length: int, compensation: str = "none"
) -> str | None:
    """Why this call must stay dense, or None if nothing in the graph speaks against it."""
    if context.region:
        return f"inside {context.region}"
    if not (isinstance(call.dropout_p, int | float) and call.dropout_p == 0):
        return "dropout"
    nodes = [n for n in (call.query, call.key, call.value, call.attn_mask) if isinstance(n, Node)]
    if len(nodes) < 3 or not all(isinstance(recorded(n), torch.Tensor) for n in nodes):
        return "shapes are not recorded in the graph"
    tensors = [value(n) for n in (call.query, call.key, call.value)]
    cast = context.autocast.get(tensors[0].device.type)
    return (
        shape_refusal(bool(call.enable_gqa), tensors)
        or dtype_refusal(tensors, cast)
        or gradient_refusal(tensors, compensation)
        or length_refusal(tensors[0].shape[2], min_length)
        or mask_refusal(call)
    )


def shape_refusal(enable_gqa: bool, tensors: list[torch.Tensor]) -> str | None:
    """Shapes that the kernels do not take."""
    q, k, v = tensors
    if {q.dim(), k.dim(), v.dim()} != {4}:
        return f"{q.dim()}-D tensors (3-D or 4-D needed)"
    heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[3]
    if any(isinstance(n, SymInt) for n in (heads, kv_heads, v.shape[1], dim, v.shape[3])):
        return "symbolic head count or head dim"
    if v.shape[3] != dim:
        return f"value head dim {v.shape[3]} differs from key head dim {dim}"
    if v.shape[1] != kv_heads or heads % kv_heads or not (enable_gqa or heads == kv_heads):
        return f"{heads} query heads on {kv_heads}/{v.shape[1]} key/value heads"
    sizes = [(q.shape[0], k.shape[0]), (k.shape[0], v.shape[0]), (k.shape[2], v.shape[2])]
    if not all(may_agree(one, other) for one, other in sizes):
        return "q, k and v differ in batch, or k and v in length"
    return None


def may_agree(one: int | SymInt, other: int | SymInt) -> bool:
    """Are two sizes the same, as far as can be told? The op checks those that are symbols.

    The lengths of cached keys and cached values are different symbols of equal value.
    """
    if statically_known_true(one == other):
        return True
    hints = [n.node.hint if isinstance(n, SymInt) else n for n in (one, other)]
    return None not in hints and bool(hints[0] == hints[1])


def dtype_refusal(tensors: Iterable[torch.Tensor], cast: torch.dtype | None = None) -> str | None:
    """Devices, dtypes (behind autocast's `cast`, which spares float64) and head dims."""
    kinds = {
        (t.device.type, t.dtype if cast is None or t.dtype == torch.float64 else cast)
        for t in tensors
    }
    if len(kinds) > 1:
        return "q, k and v differ in dtype or device"
    (device, dtype), dim = kinds.pop(), next(iter(tensors)).shape[3]
    return unsupported(device, dtype, dim)


def gradient_refusal(tensors: Iterable[torch.Tensor], compensation: str = "none") -> str | None:
    """Gradients where there is no backward; the tensors lie on one device."""
    tensors = list(tensors)
    reason = no_backward(tensors[0].device.type) or no_compensated_backward(compensation)
    if reason and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return f"needs gradients: {reason} (run under torch.no_grad or torch.inference_mode)"
    return None


def data_refusal(call: Call, compensation: str = "none") -> str | None:
    """Why a call cannot have a mask that depends on data."""
    added = value(call.attn_mask) if isinstance(call.attn_mask, Node) else None
    return bias_refusal(added) or no_data_mask(compensation)


def bias_refusal(attn_mask: torch.Tensor | None) -> str | None:
    """A mask that is itself to be trained, as T5's position bias is."""
    if torch.is_grad_enabled() and attn_mask is not None and attn_mask.requires_grad:
        return f"needs gradients: {NO_BIAS_GRADIENT} (freeze it, or run under torch.no_grad)"
    return None


def length_refusal(length: int | SymInt, min_length: int) -> str | None:
    """A fixed short length; a symbolic one is decided at run time by the op."""
    if not isinstance(length, SymInt) and length < min_length:
        return f"short: {length} queries, min_length is {min_length}"
    return None


def mask_refusal(call: Call) -> str | None:
    """Masks that no classification can save."""
    if call.attn_mask is None:
        return None if isinstance(call.is_causal, bool) else "is_causal known only at run time"
    if not isinstance(call.attn_mask, Node):
        return "mask is no tensor"
    return "both attn_mask and is_causal" if call.is_causal else None
