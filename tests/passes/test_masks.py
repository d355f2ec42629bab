"""A mask is what it equals on every element, or it is nothing."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from afbs_compile.kernels.geometry import Mask
from afbs_compile.passes import masks


def dense(mask, length_q, length_k):
    i, j = torch.arange(length_q)[:, None], torch.arange(length_k)[None]
    if not mask.causal:
        return torch.ones(length_q, length_k, dtype=torch.bool)
    seen = j <= i + mask.offset
    return seen & (j > i + mask.offset - mask.window) if mask.window else seen


lengths = st.integers(1, 40)
drawn = st.one_of(
    st.just(Mask()),
    st.builds(lambda o, w: Mask(True, o, w), st.integers(-5, 45), st.integers(0, 30)),
)


@given(drawn, lengths, lengths)
def test_classification_is_exact(mask, length_q, length_k):
    tensor = dense(mask, length_q, length_k)
    found = masks.classify(tensor[None, None].expand(2, 1, -1, -1))
    if not tensor.any(1).all() and mask.causal and found is None:
        return  # rows that see nothing may hide what the mask is; leaving it dense is right
    assert found is not None
    assert torch.equal(dense(found, length_q, length_k), tensor)


@given(drawn, st.integers(2, 40), st.data())
def test_one_flipped_element_is_another_mask(mask, length, data):
    tensor = dense(mask, length, length).clone()
    i, j = (data.draw(st.integers(0, length - 1)) for _ in range(2))
    tensor[i, j] ^= True
    found = masks.classify(tensor[None, None])
    assert found is None or torch.equal(dense(found, length, length), tensor)


def test_batch_entries_must_agree():
    causal = dense(Mask(True), 8, 8)
    mixed = torch.stack([causal, torch.ones_like(causal)])[:, None]
    assert masks.classify(mixed) is None
    assert masks.classify(torch.stack([causal, causal])[:, None]) == Mask(True)


def test_rows_that_see_nothing():
    assert masks.classify(torch.zeros(1, 1, 4, 4, dtype=torch.bool)) is None
