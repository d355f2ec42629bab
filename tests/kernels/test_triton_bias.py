"""Do the Triton kernels add a bias as the oracles do? On a GPU, or in the interpreter."""

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
EXAMPLES = settings(max_examples=40 if DEVICE == "cuda" else 6, phases=[Phase.generate])


def drawn(problems, biases, data, **wishes):
    """A problem and its bias, on the device."""
    problem = data.draw(problems(longest=100, **wishes))
    bias = data.draw(biases(problem)).to(DEVICE)
    tensors = (x.to(DEVICE) for x in (problem.q, problem.k, problem.v, problem.policy))
    lengths = problem.q.shape[2], problem.k.shape[2]
    return problem, *tensors, gathered([None] * 4 + [bias], lengths)


@EXAMPLES
@given(st.data())
def test_states_and_levels_of_blocks(problems, biases, data):
    problem, q, k, _, _, mask = drawn(problems, biases, data)
    lengths = q.shape[2], k.shape[2]
    want = blocked(mask, problem.mask, *lengths, **problem.blocks)
    got = triton_mask.shown(mask, problem.mask, q, *lengths, **problem.blocks)
    needed = got.states >= triton_mask.NEEDED
    assert torch.equal(got.states > 0, want.some)
    assert torch.equal(got.states - triton_mask.NEEDED * needed == 2, want.every)
    assert torch.equal(needed, want.needed)
    assert torch.equal(got.start * problem.block_n, want.start)
    torch.testing.assert_close(got.levels[want.some], want.level[want.some], atol=1e-4, rtol=1e-4)


@EXAMPLES
@given(st.data(), st.sampled_from(SELECTORS), st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_lists_are_the_oracles(problems, biases, data, selector, tau):
    problem, q, k, _, policy, mask = drawn(problems, biases, data, tau=tau)
    policy[-1, col.MODE] = data.draw(st.sampled_from([col.SPARSE, col.WINDOWED, col.DENSE]))
    policy[0, col.BUDGET] = data.draw(st.sampled_from([0.0, 0.0, 0.3]))
    site = {"selector": selector} | problem.site
    masked = blocked(mask, problem.mask, q.shape[2], k.shape[2], **problem.blocks)
    want = lists.to_keep(*selection.select(q, k, policy, masked=masked, **site))
    got = lists.to_keep(*triton_selection.select(q, k, policy, data=mask, **site))
    assert not (got & ~masked.some).any()
    assert torch.equal(got.any(3), want.any(3))
    sparse = (policy[:, col.MODE] == col.SPARSE)[None, :, None, None]
    assert (got | ~(masked.needed & sparse)).all()
    assert (got != want).sum() <= 0.01 * want.numel()  # a score next to the threshold may differ


@EXAMPLES
@given(st.data(), st.sampled_from([0.5, 1.0]))
def test_attention_is_the_oracles(problems, biases, data, tau):
    problem, q, k, v, policy, mask = drawn(problems, biases, data, tau=tau)
    policy[-1, col.MODE] = data.draw(st.sampled_from([col.SPARSE, col.WINDOWED]))
    found = triton_selection.select(q, k, policy, selector="sub8", data=mask, **problem.site)
    got = triton_forward.forward(q, k, v, *found, policy, data=mask, **problem.site)
    want = reference.forward(q, k, v, *found, policy, data=mask, **problem.site)
    torch.testing.assert_close(got[0], want[0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(got[1].sum(0), want[1], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_whole_op_equals_the_formula(causal, policy_tensor, monkeypatch):
    """What a GPU runs, in the interpreter too."""
    monkeypatch.setattr(dispatch, "by_pairs", lambda device_type: False)
    q, k, v = (torch.randn(2, heads, 150, 32, device=DEVICE) for heads in (2, 1, 1))
    bias = torch.randn(1, 2, 150, 150, device=DEVICE)
    bias[:, :, 9] = bias[:, :, :, 120:] = torch.finfo(torch.float32).min
    mask = gathered([None] * 4 + [bias], (150, 150))
    policy = policy_tensor(2, tau=1.0).to(DEVICE)
    call = {"mask": Mask(causal), "scale": 0.3, "data": mask}
    out = dispatch.select_and_attend(q, k, v, policy, selector="sub8", **call)[0]
    scores = q @ k.transpose(-1, -2) * 0.3 + bias
    if causal:
        hidden = ~torch.ones(150, 150, device=DEVICE).bool().tril()
        scores = scores.masked_fill(hidden, -torch.inf)
    torch.testing.assert_close(out, scores.softmax(-1) @ v, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dispatch.dense(q, k, v, **call), out, atol=1e-5, rtol=1e-5)
