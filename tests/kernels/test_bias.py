"""An additive mask is added to the scores, whatever it holds, and no row loses its last key."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import afbs_compile.kernels.op  # noqa: F401  registers the op
from afbs_compile.bench import forced
from afbs_compile.kernels import dispatch, reference
from afbs_compile.kernels import policy_columns as col
from afbs_compile.kernels.blind import BLIND, ZERO
from afbs_compile.kernels.data_mask import blocked, gathered
from afbs_compile.kernels.geometry import Mask
from afbs_compile.kernels.lists import to_keep
from afbs_compile.kernels.profile import profile
from afbs_compile.kernels.scores import SELECTORS
from afbs_compile.kernels.selection import select

LOWEST = torch.finfo(torch.float32).min


def call(problem, bias, blind=ZERO, policy=None, min_length=0):
    """The op on a problem."""
    mask, policy = problem.mask, problem.policy if policy is None else policy
    return torch.ops.afbs.attention(
        problem.q, problem.k, problem.v, policy, mask.causal, mask.offset, mask.window,
        problem.scale, "sub8", min_length, "none", None, None, None, None, blind, bias,
    )  # fmt: skip


def formula(problem, bias):
    """Softmax of scores plus bias, from its definition; NaN where a row sees nothing."""
    group = problem.q.shape[1] // problem.k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (problem.k, problem.v))
    s = problem.q @ k.transpose(-1, -2) * problem.scale + bias
    return s.masked_fill(~problem.seen(), -math.inf).softmax(-1) @ v


def look(problem, bias):
    sizes = problem.q.shape[2], problem.k.shape[2]
    data = gathered([None] * 4 + [bias], sizes)
    return data, blocked(data, problem.mask, *sizes, **problem.blocks)


@settings(max_examples=40)
@given(st.data(), st.sampled_from(SELECTORS))
def test_with_all_blocks_it_is_the_formula(problems, biases, data, selector):
    problem = data.draw(problems(tau=1.0))
    bias = data.draw(biases(problem))
    masked_data, masked = look(problem, bias)
    lists = select(problem.q, problem.k, problem.policy, selector=selector, masked=masked,
                   **problem.site)  # fmt: skip
    out, lse = reference.forward(problem.q, problem.k, problem.v, *lists, problem.policy,
                                 data=masked_data, **problem.site)  # fmt: skip
    want = formula(problem, bias)
    torch.testing.assert_close(out, want.nan_to_num(0), atol=1e-5, rtol=1e-5)
    assert torch.equal(lse == -math.inf, want.isnan().any(3))


@settings(max_examples=40)
@given(st.data(), st.sampled_from(SELECTORS))
def test_no_row_loses_its_last_key(problems, biases, data, selector):
    problem = data.draw(problems(tau=data.draw(st.sampled_from([0.0, 0.3, 0.9]))))
    policy = problem.policy.clone()
    policy[:, col.SINK] = 0
    policy[-1, col.BUDGET] = data.draw(st.sampled_from([0.0, 0.1]))
    bias = data.draw(biases(problem))
    masked_data, masked = look(problem, bias)
    lists = select(problem.q, problem.k, policy, selector=selector, masked=masked, **problem.site)
    assert not (to_keep(*lists) & ~masked.some).any()
    out, lse = reference.forward(problem.q, problem.k, problem.v, *lists, policy,
                                 data=masked_data, **problem.site)  # fmt: skip
    assert out.isfinite().all()
    live = (problem.seen() & (bias > -1e4)).expand(*out.shape[:3], -1).any(3)
    assert (lse[live] > -1e4).all()
    assert torch.equal(lse == -math.inf, formula(problem, bias).isnan().any(3))


@settings(max_examples=12)
@given(st.data(), st.sampled_from(BLIND), st.sampled_from([0, 1000]))
def test_op_at_density_one_is_the_formula(problems, biases, data, blind, min_length):
    problem = data.draw(problems(tau=1.0, one_kind=True, longest=200))
    bias = data.draw(biases(problem))
    with forced.interpreted():  # below, kernels are compiled
        out = call(problem, bias, blind, min_length=min_length)
    want = formula(problem, bias)
    rows = want.isnan()
    mean = problem.v.mean(2, keepdim=True).repeat_interleave(
        problem.q.shape[1] // problem.k.shape[1], 1
    )
    rest = {"zero": torch.zeros_like(want), "nan": want, "mean": mean.expand(want.shape)}
    rest["even"] = rest["mean"]
    want = torch.where(rows, rest[blind], want)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5, equal_nan=True)


@settings(max_examples=3)
@given(st.data(), st.sampled_from([0.5, 0.9]))
def test_op_is_attention_over_the_blocks_that_it_keeps(problems, biases, data, tau):
    problem = data.draw(problems(tau=tau, one_kind=True, longest=256))
    bias = data.draw(biases(problem))
    block_m, block_n = dispatch.block_sizes("cpu")
    sizes = problem.q.shape[2], problem.k.shape[2]
    masked_data = gathered([None] * 4 + [bias], sizes)
    masked = blocked(masked_data, problem.mask, *sizes, block_m=block_m, block_n=block_n)
    site = {"mask": problem.mask, "scale": problem.scale, "block_m": block_m, "block_n": block_n}
    lists = select(problem.q, problem.k, problem.policy, selector="sub8", masked=masked, **site)
    wanted, _ = reference.forward(problem.q, problem.k, problem.v, *lists, problem.policy,
                                  data=masked_data, **site)  # fmt: skip
    torch.testing.assert_close(call(problem, bias), wanted, atol=1e-5, rtol=1e-5)


@settings(max_examples=25)
@given(st.data(), st.sampled_from(SELECTORS), st.sampled_from([0.3, 0.9]))
def test_profile_knows_the_error(problems, biases, data, selector, tau):
    problem = data.draw(problems(tau=tau))
    bias = data.draw(biases(problem, ("relative", "alibi", "hidden")))
    masked_data, masked = look(problem, bias)
    args = problem.q, problem.k, problem.v
    tables = profile(*args, problem.policy, selector=selector, data=masked_data, **problem.site)
    counts, indices = select(problem.q, problem.k, problem.policy, selector=selector,
                             masked=masked, **problem.site)  # fmt: skip
    out, _ = reference.forward(*args, counts, indices, problem.policy, data=masked_data,
                               **problem.site)  # fmt: skip
    exact = formula(problem, bias).nan_to_num(0)
    extra = (counts - tables.forced).long()
    assert (extra >= 0).all()
    found = tables.error[0].gather(-1, extra[..., None])[..., 0]
    parts = [x.sum((2, 3)) for x in (out - exact).abs().split(problem.block_m, 2)]
    wanted, norm = torch.stack(parts, 2), exact.abs().sum().clamp(min=1e-3)
    torch.testing.assert_close(found / norm, wanted / norm, atol=1e-5, rtol=1e-4)


def test_a_bias_decides_what_is_kept(policy_tensor):
    """ALiBi makes far blocks worthless; scores alone would keep them."""
    q, k = torch.zeros(1, 1, 512, 32), torch.zeros(1, 1, 512, 32)
    j = torch.arange(512)
    bias = -(j[:, None] - j).abs().float()[None, None]
    policy = policy_tensor(1, tau=0.9)
    policy[:, col.SINK] = 0
    site = {"mask": Mask(), "scale": 1.0, "block_m": 64, "block_n": 64}
    masked = blocked(gathered([None] * 4 + [bias], (512, 512)), Mask(), 512, 512, block_m=64,
                     block_n=64)  # fmt: skip
    counts, _ = select(q, k, policy, selector="sub8", masked=masked, **site)
    assert counts.max() <= 4  # itself and its neighbours, and the block of each row's first key


def test_padding_that_is_added_hides_its_blocks():
    bias = torch.where(torch.arange(200) < 70, 0.0, LOWEST)[None, None, None]
    data = gathered([None] * 4 + [bias], (150, 200))
    assert data.bias.stride() == (200, 200, 0, 1)  # nothing is written out
    masked = blocked(data, Mask(), 150, 200, block_m=64, block_n=64)
    assert torch.equal(masked.some[0, 0], torch.tensor([[True, True, False, False]] * 3))
    assert torch.equal(data.seen_keys(), bias[:, 0, 0] == 0)
    every = blocked(gathered([None] * 4 + [bias * 0 + LOWEST], (150, 200)), Mask(), 150, 200,
                    block_m=64, block_n=64)  # fmt: skip
    assert every.some.all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, policy_tensor):
    q, k, v = (torch.randn(2, 2, 150, 32).to(dtype) for _ in range(3))
    bias = torch.randn(1, 2, 150, 150)
    bias[:, :, 7] = bias[:, :, :, 140:] = LOWEST
    policy = policy_tensor(2, tau=1.0)
    site = (False, 0, 0, 0.3, "sub8", 0, "none", None, None, None, None, ZERO)
    scores = q.float() @ k.float().transpose(-1, -2) * 0.3
    for given_as in (bias, bias.to(dtype).clamp(min=torch.finfo(dtype).min)):
        out = torch.ops.afbs.attention(q, k, v, policy, *site, given_as)
        want = (scores + given_as.float()).softmax(-1) @ v.float()
        torch.testing.assert_close(out.float(), want, atol=2e-2, rtol=2e-2)
    with torch.autocast("cpu", dtype):
        out = torch.ops.afbs.attention(q.float(), k.float(), v.float(), policy, *site, bias)
        assert out.dtype == dtype


def test_a_bias_that_needs_gradients_is_refused(policy_tensor):
    q, bias = torch.rand(1, 1, 40, 32), torch.rand(40, 40).requires_grad_()
    site = (policy_tensor(1), False, 0, 0, 0.3, "sub8")
    more = ("none", None, None, None, None, ZERO, bias)
    with pytest.raises(RuntimeError, match="no gradient of a mask that is added"):
        torch.ops.afbs.attention(q, q, q, *site, 0, *more)
    torch.ops.afbs.attention(q, q, q, *site, 100, *more).sum().backward()
    assert bias.grad is not None
    with torch.no_grad():
        assert torch.ops.afbs.attention(q, q, q, *site, 0, *more).isfinite().all()


def test_old_calls_and_fakes(policy_tensor):
    q = torch.randn(2, 2, 40, 32)
    site = (q, q, q, policy_tensor(2, tau=1.0), False, 0, 0, 0.3, "sub8", 0)
    keys, bias = torch.arange(40) < 30, torch.randn(40, 40)
    old = torch.ops.afbs.attention(*site, "none", keys[None].expand(2, -1))
    new = torch.ops.afbs.attention(*site, "none", None, None, None, keys.expand(40, 40))
    torch.testing.assert_close(old, new)
    args = (*site, "none", None, None, None, None, "nan", bias)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.afbs.attention.default, args, test_utils=tests)
    with pytest.raises(ValueError, match="blind rows cannot be 'one'"):
        torch.ops.afbs.attention(*site, "none", None, None, None, None, "one", bias)
