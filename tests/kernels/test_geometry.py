"""Block geometry against the token mask that it summarises."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from afbs_compile.kernels import policy_columns as col
from afbs_compile.kernels.geometry import (
    Blocks,
    Mask,
    head_full,
    head_visible,
    site_full,
    site_visible,
    token_visible,
)


def reduced(tokens, block_m, block_n, how):
    """Any or all over the blocks of a token mask `[H, Lq, Lk]`."""
    rows = [how(t, dim=1) for t in tokens.split(block_m, 1)]
    blocks = [torch.stack([how(t, dim=1) for t in row.split(block_n, 1)], 1) for row in rows]
    return torch.stack(blocks, 1)


@st.composite
def masks(draw):
    if draw(st.booleans()):
        return Mask()
    return Mask(True, draw(st.integers(-30, 60)), draw(st.sampled_from([0, 1, 7, 40])))


sizes = st.integers(1, 70)


@given(masks(), sizes, sizes, st.sampled_from([8, 16]), st.sampled_from([8, 16]),
       st.integers(1, 40), st.integers(0, 20))  # fmt: skip
def test_blocks_summarise_tokens(mask, length_q, length_k, block_m, block_n, window, sink):
    policy = torch.zeros(2, col.COLUMNS)
    policy[1, col.MODE] = col.WINDOWED
    policy[:, col.WINDOW], policy[:, col.SINK] = window, sink
    cpu = torch.device("cpu")
    q, k = Blocks.of(length_q, block_m, cpu), Blocks.of(length_k, block_n, cpu)
    i, j = torch.arange(length_q), torch.arange(length_k)
    tokens = token_visible(mask, policy, i, j)
    anything = reduced(tokens, block_m, block_n, torch.any)
    everything = reduced(tokens, block_m, block_n, torch.all)
    visible, full = head_visible(mask, policy, q, k), head_full(mask, policy, q, k)
    assert torch.equal(visible[0], anything[0])
    assert torch.equal(visible[0], site_visible(mask, q, k))
    assert torch.equal(full[0], everything[0])
    assert torch.equal(full[0], site_full(mask, q, k))
    # a window's two conditions are joined token by token, so blocks may only be bounded
    assert bool((visible[1] >= anything[1]).all())
    assert bool((full[1] <= everything[1]).all())


def test_window_without_causal_is_refused():
    with pytest.raises(ValueError, match="causal"):
        Mask(window=8)
