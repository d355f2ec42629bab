"""Attention and its gradients by pairs of blocks: the oracle's, over every kind of problem."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afbs_compile.kernels import pairs, reference
from afbs_compile.kernels import policy_columns as col
from afbs_compile.kernels.selection import select

KINDS = [col.SPARSE, col.DENSE, col.WINDOWED]


def lists(problem):
    return select(problem.q, problem.k, problem.policy, selector="sub8", **problem.site)


@pytest.fixture(params=[5, pairs.MOST_PAIRS])
def most_pairs(request, monkeypatch):
    monkeypatch.setattr(pairs, "MOST_PAIRS", request.param)


@pytest.mark.usefixtures("most_pairs")
@settings(max_examples=12)
@given(st.data(), st.sampled_from(KINDS))
def test_forward_and_gradients_are_the_oracles(problems, data, mode):
    problem = data.draw(problems())
    problem.policy[:, col.MODE] = mode
    q, k, v = problem.q, problem.k, problem.v
    chosen = lists(problem)
    o, lse = pairs.forward(q, k, v, *chosen, problem.policy, **problem.site)
    want, want_lse = reference.forward(q, k, v, *chosen, problem.policy, **problem.site)
    torch.testing.assert_close(o, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-5)
    do = torch.randn(q.shape, generator=torch.Generator().manual_seed(0))
    got = pairs.backward(do, q, k, v, o, lse, *chosen, problem.policy, **problem.site)
    wanted = reference.backward(do, q, k, v, *chosen, problem.policy, **problem.site)
    for mine, theirs in zip(got, wanted, strict=True):  # sums over all queries, in fp32
        torch.testing.assert_close(mine, theirs, atol=5e-5, rtol=1e-5)


@given(st.data())
def test_what_is_not_seen_does_not_leak(problems, data):
    """A key that no query sees may hold anything: no result changes, its gradients are 0."""
    problem = data.draw(problems())
    seen = problem.seen().any(0)
    q, policy, site = problem.q, problem.policy, problem.site
    chosen, do = lists(problem), torch.ones_like(problem.q)
    found = []
    for filling in (0.0, torch.nan):
        k, v = (x.masked_fill(~seen[:, None], filling) for x in (problem.k, problem.v))
        o, lse = pairs.forward(q, k, v, *chosen, policy, **site)
        found.append((o, lse, *pairs.backward(do, q, k, v, o, lse, *chosen, policy, **site)))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
    assert not found[1][3].masked_fill(seen[:, None], 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(policy_tensor, dtype):
    q, k, v = (torch.randn(1, h, 100, 32).to(dtype) for h in (4, 2, 2))
    site = {"mask": pairs.Mask(True), "scale": 0.2, "block_m": 32, "block_n": 16}
    policy = policy_tensor(4, tau=0.5)
    chosen = select(q, k, policy, selector="sub8", **site)
    o, lse = pairs.forward(q, k, v, *chosen, policy, **site)
    exact, _ = pairs.forward(q.float(), k.float(), v.float(), *chosen, policy, **site)
    assert o.dtype == dtype
    torch.testing.assert_close(o, exact.to(dtype))
    grads = pairs.backward(torch.ones_like(o), q, k, v, o, lse, *chosen, policy, **site)
    assert {g.dtype for g in grads} == {dtype}
