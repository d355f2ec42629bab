"""How much work is a call, at most? For `torch.utils.flop_counter`."""

import math


def flops(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], *, causal: bool, density: float = 1.0
) -> int:
    """Multiply-adds ×2 of QKᵀ and PV over the visible pairs, times `density`."""
    batch, heads, length_q, dim = q_shape
    pairs = length_q * k_shape[2]
    share = 0.5 if causal and length_q == k_shape[2] else 1.0
    return math.ceil(4 * batch * heads * dim * pairs * share * density)
