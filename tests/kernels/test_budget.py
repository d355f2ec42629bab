"""The laws of a budget: a cost known before, the best blocks, nothing that hangs on the device."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from afbs_compile.kernels import policy_columns as col
from afbs_compile.kernels.geometry import Blocks, Mask, head_visible
from afbs_compile.kernels.lists import to_keep
from afbs_compile.kernels.scores import SELECTORS, block_scores
from afbs_compile.kernels.selection import blocks_kept, forced_blocks, select

budgets = st.sampled_from([1e-4, 0.1, 0.3, 0.5, 0.77, 0.999, 1.0])
selectors = st.sampled_from(SELECTORS)


def kept(problem, selector, policy=None):
    policy = problem.policy if policy is None else policy
    return to_keep(*select(problem.q, problem.k, policy, selector=selector, **problem.site))


def with_budget(problem, budget, **columns):
    policy = problem.policy.clone()
    policy[:, col.BUDGET] = budget
    for name, value in columns.items():
        policy[:, getattr(col, name)] = value
    return policy


def surroundings(problem):
    q = Blocks.of(problem.q.shape[2], problem.block_m, problem.q.device)
    k = Blocks.of(problem.k.shape[2], problem.block_n, problem.q.device)
    visible = head_visible(problem.mask, problem.policy, q, k)
    return visible, forced_blocks(problem.mask, problem.policy, q, k, problem.block_n) & visible


@given(st.data(), selectors, budgets)
def test_keeps_as_many_as_it_says_and_the_best(problems, data, selector, budget):
    problem = data.draw(problems())
    policy = with_budget(problem, budget)
    keep = kept(problem, selector, policy)
    visible, forced = surroundings(problem)
    seen, least = visible.sum(-1), forced.sum(-1)
    share = torch.floor(seen * budget + 0.5).clamp(min=1).minimum(seen).long()
    slack = (seen * budget % 1 - 0.5).abs() < 1e-3  # budgets are whole 2^-14
    off = (keep.sum(-1) - torch.maximum(share, least)).abs()
    assert bool((off <= slack).all())
    assert not (keep & ~visible).any()
    assert bool((forced <= keep).all())
    scores, _ = block_scores(problem.q, problem.k, policy, selector=selector, **problem.site)
    worst = torch.where(keep & ~forced, scores, torch.inf).amin(-1)
    left = torch.where(visible & ~keep, scores, -torch.inf).amax(-1)
    assert bool((worst >= left).all())
    counted, every = blocks_kept(
        policy, mask=problem.mask, length_q=problem.q.shape[2], length_k=problem.k.shape[2],
        **problem.blocks,
    )  # fmt: skip
    assert torch.equal(keep.sum((-1, -2)), counted.expand(len(keep), -1))
    assert torch.equal(every, seen.sum(-1))


@given(st.data(), selectors)
def test_a_larger_budget_keeps_a_superset(problems, data, selector):
    problem = data.draw(problems())
    few, more = sorted([data.draw(budgets), data.draw(budgets)])
    small, large = (kept(problem, selector, with_budget(problem, b)) for b in (few, more))
    assert bool((small <= large).all())


@given(st.data(), selectors)
def test_no_budget_is_tau_and_a_budget_hides_tau_and_theta(problems, data, selector):
    problem = data.draw(problems())
    assert torch.equal(kept(problem, selector), kept(problem, selector, with_budget(problem, 0.0)))
    budget = data.draw(budgets)
    one, other = (with_budget(problem, budget, TAU=tau, THETA=theta)
                  for tau, theta in ((0.0, -1.0), (0.9, 0.9)))  # fmt: skip
    assert torch.equal(kept(problem, selector, one), kept(problem, selector, other))


@given(st.data(), st.sampled_from([col.DENSE, col.WINDOWED]))
def test_only_sparse_heads_have_one(problems, data, mode):
    problem = data.draw(problems())
    problem.policy[:, col.MODE] = mode
    assert torch.equal(kept(problem, "sub8"), kept(problem, "sub8", with_budget(problem, 0.1)))


def alike(policy_tensor, budget=0.3):
    """All keys alike: every block has the same score."""
    q, k = torch.randn(1, 1, 32, 32), torch.randn(1, 1, 1, 32).expand(1, 1, 160, 32)
    policy = policy_tensor(1, sink=0)
    policy[:, col.BUDGET] = budget
    site = {"mask": Mask(), "scale": 0.5, "selector": "mean", "block_m": 32, "block_n": 16}
    return q, k, policy, site


def test_of_equals_the_first_are_kept(policy_tensor):
    q, k, policy, site = alike(policy_tensor)
    assert to_keep(*select(q, k, policy, **site))[0, 0, 0].nonzero().flatten().tolist() == [
        0,
        1,
        2,
    ]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_rows_without_finite_scores_stay_dense(policy_tensor, poison):
    q, k = torch.randn(1, 1, 64, 32), torch.randn(1, 1, 128, 32)
    q[0, 0, 40] = poison
    policy = policy_tensor(1, sink=0)
    policy[:, col.BUDGET] = 0.25
    site = {"mask": Mask(), "scale": 0.1, "block_m": 32, "block_n": 32}
    keep = to_keep(*select(q, k, policy, selector="sub8", **site))
    assert keep[0, 0, 1].all()
    assert keep[0, 0, 0].sum() == 1


# Triton 3.6's interpreter makes scalars in a way that NumPy deprecates
interpreted = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim:DeprecationWarning"
)


@interpreted
def test_the_gpus_first_equals_are_the_oracles(policy_tensor):
    triton_selection = pytest.importorskip("afbs_compile.kernels.triton_selection")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for budget in (1e-4, 0.3, 0.5, 0.95):
        q, k, policy, site = alike(policy_tensor, budget)
        q, k, policy = (x.to(device) for x in (q, k, policy))
        got = triton_selection.select(q, k, policy, **site)
        assert torch.equal(to_keep(*got), to_keep(*select(q, k, policy, **site)))


@interpreted
@settings(max_examples=6, phases=[Phase.generate])
@given(st.data(), selectors)
def test_the_gpu_keeps_the_oracles_blocks(problems, data, selector):
    """In fp32; where scores are equal but for rounding, as many as the oracle and no worse."""
    triton_selection = pytest.importorskip("afbs_compile.kernels.triton_selection")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    problem = data.draw(problems())
    heads = problem.policy.shape[0]
    policy = problem.policy.clone()
    policy[:, col.BUDGET] = torch.tensor(
        data.draw(st.lists(budgets, min_size=heads, max_size=heads))
    )
    policy[:, col.MODE] = torch.tensor(
        data.draw(st.lists(st.sampled_from([col.SPARSE, col.SPARSE, col.DENSE]),
                           min_size=heads, max_size=heads))
    )  # fmt: skip
    policy[:, col.THETA] = 0.5
    q, k, policy = (x.to(device) for x in (problem.q, problem.k, policy))
    site = problem.site | {"selector": selector}
    got, want = (to_keep(*f(q, k, policy, **site)) for f in (triton_selection.select, select))
    assert torch.equal(got.sum(-1), want.sum(-1))
    scores, _ = block_scores(q, k, policy, **site)
    for one, other in ((got, want), (want, got)):
        lost = torch.where(one & ~other, scores, 0.0).amax(-1)
        worst = torch.where(other & ~one, scores, torch.inf).amin(-1)
        assert bool((lost <= worst * (1 + 1e-3) + 1e-6).all())
