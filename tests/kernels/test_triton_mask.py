"""Do the Triton kernels see a data mask as the oracles do? On a GPU, or in the interpreter."""

import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from afbs_compile.kernels import (
    dispatch,
    lists,
    reference,
    selection,
    triton_forward,
    triton_mask,
    triton_selection,
)
from afbs_compile.kernels import policy_columns as col
from afbs_compile.kernels.data_mask import blocked, gathered
from afbs_compile.kernels.geometry import Mask
from afbs_compile.kernels.scores import SELECTORS

# Triton 3.6's interpreter makes scalars in a way that NumPy deprecates
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim:DeprecationWarning"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ("right", "left", "holes", "segments", "packed", "elements", "shared elements")
EXAMPLES = settings(max_examples=40 if DEVICE == "cuda" else 5, phases=[Phase.generate])


def drawn(problems, data_masks, data, kinds=KINDS, **wishes):
    """A problem and its data mask, on the device."""
    problem = data.draw(problems(longest=100, **wishes))
    parts = data.draw(data_masks(problem, kinds))
    parts = [None if x is None else x.to(DEVICE) for x in parts]
    tensors = (x.to(DEVICE) for x in (problem.q, problem.k, problem.v, problem.policy))
    return problem, *tensors, gathered(parts, (problem.q.shape[2], problem.k.shape[2]))


@EXAMPLES
@given(st.data())
def test_states_of_blocks(problems, data_masks, data):
    problem, q, k, _, _, mask = drawn(problems, data_masks, data)
    lengths = q.shape[2], k.shape[2]
    want = blocked(mask, problem.mask, *lengths, **problem.blocks)
    got = triton_mask.shown(mask, problem.mask, q, *lengths, **problem.blocks)
    assert torch.equal(got.states > 0, want.some)
    assert torch.equal(got.states == 2, want.every)
    assert torch.equal(got.start * problem.block_n, want.start)


@EXAMPLES
@given(st.data(), st.sampled_from(SELECTORS), st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_lists_are_the_oracles(problems, data_masks, data, selector, tau):
    problem, q, k, _, policy, mask = drawn(problems, data_masks, data, tau=tau)
    policy[-1, col.MODE] = data.draw(st.sampled_from([col.SPARSE, col.WINDOWED, col.DENSE]))
    site = {"selector": selector} | problem.site
    masked = blocked(mask, problem.mask, q.shape[2], k.shape[2], **problem.blocks)
    want = lists.to_keep(*selection.select(q, k, policy, masked=masked, **site))
    got = lists.to_keep(*triton_selection.select(q, k, policy, data=mask, **site))
    assert not (got & ~masked.some).any()
    assert torch.equal(got.any(3), want.any(3))
    assert (got != want).sum() <= 0.01 * want.numel()  # a score next to the threshold may differ


@EXAMPLES
@given(st.data(), st.sampled_from(SELECTORS))
def test_hidden_keys_have_no_mass(problems, data_masks, data, selector):
    problem, q, k, _, policy, mask = drawn(problems, data_masks, data, KINDS[:3])
    other = k.clone()
    other[~mask.keys[:, None, :, None].expand(k.shape)] = math.nan
    before, after = (
        lists.to_keep(*triton_selection.select(q, x, policy, selector=selector, data=mask,
                                               **problem.site))
        for x in (k, other)
    )  # fmt: skip
    assert torch.equal(before, after)


@EXAMPLES
@given(st.data(), st.sampled_from([0.5, 1.0]))
def test_attention_is_the_oracles(problems, data_masks, data, tau):
    problem, q, k, v, policy, mask = drawn(problems, data_masks, data, tau=tau)
    policy[-1, col.MODE] = data.draw(st.sampled_from([col.SPARSE, col.WINDOWED]))
    found = triton_selection.select(q, k, policy, selector="sub8", data=mask, **problem.site)
    got = triton_forward.forward(q, k, v, *found, policy, data=mask, **problem.site)
    want = reference.forward(q, k, v, *found, policy, data=mask, **problem.site)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["keys", "elements"])
def test_whole_op_equals_sdpa(kind, policy_tensor, monkeypatch):
    """What a GPU runs, in the interpreter too; keys that are hidden may hold NaN."""
    monkeypatch.setattr(dispatch, "by_pairs", lambda device_type: False)
    q, k, v = (torch.randn(2, heads, 150, 32, device=DEVICE) for heads in (2, 1, 1))
    keys = torch.arange(150, device=DEVICE) < torch.tensor([[150], [77]], device=DEVICE)
    parts = [keys, None, None, None]
    if kind == "elements":
        parts = [None, None, None, torch.rand(1, 2, 150, 150, device=DEVICE) < 0.5]
    mask = gathered(parts, (150, 150))
    call = {"mask": Mask(True), "scale": 0.3}
    want = dispatch.dense(q, k, v, data=mask, **call)
    if kind == "keys":
        k = k.masked_fill(~keys[:, None, :, None], math.nan)
    policy = policy_tensor(2, tau=1.0).to(DEVICE)
    out = dispatch.select_and_attend(q, k, v, policy, selector="sub8", data=mask, **call)[0]
    blind = ~(mask.tokens(0, 150) & torch.ones(150, 150, device=DEVICE).bool().tril()).any(3)
    torch.testing.assert_close(out, want.masked_fill(blind[..., None], 0), atol=1e-5, rtol=1e-5)
