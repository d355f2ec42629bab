"""The selection rule: what must be kept, what is not, and what cannot matter."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from afbs_compile.kernels import dispatch
from afbs_compile.kernels import policy_columns as col
from afbs_compile.kernels import scores as scores_module
from afbs_compile.kernels.data_mask import blocked, gathered
from afbs_compile.kernels.geometry import Blocks, Mask, head_visible
from afbs_compile.kernels.lists import from_keep, to_keep
from afbs_compile.kernels.scores import SELECTORS, block_scores
from afbs_compile.kernels.selection import forced_blocks, select

selectors = st.sampled_from(SELECTORS)


def kept(problem, selector, policy=None):
    policy = problem.policy if policy is None else policy
    return to_keep(*select(problem.q, problem.k, policy, selector=selector, **problem.site))


def surroundings(problem):
    q = Blocks.of(problem.q.shape[2], problem.block_m, problem.q.device)
    k = Blocks.of(problem.k.shape[2], problem.block_n, problem.q.device)
    visible = head_visible(problem.mask, problem.policy, q, k)
    return visible, forced_blocks(problem.mask, problem.policy, q, k, problem.block_n)


@given(st.data(), selectors)
def test_reaches_tau_with_the_fewest_blocks(problems, data, selector):
    problem = data.draw(problems())
    keep = kept(problem, selector)
    visible, forced = surroundings(problem)
    scores, _ = block_scores(problem.q, problem.k, problem.policy, selector=selector,
                             **problem.site)  # fmt: skip
    tau = float(problem.policy[0, col.TAU])
    assert not (keep & ~visible).any()
    assert bool(((forced & visible) <= keep).all())
    assert bool((keep.any(-1) == visible.any(-1)).all())
    if tau == 1:
        assert torch.equal(keep, visible.expand(keep.shape))
        return
    total = scores.sum(-1)
    mass = (scores * keep).sum(-1)
    assert bool((mass >= tau * total - 1e-5).all())
    # without its least droppable block a set that was searched for falls short
    free = keep & ~forced & (scores > 0)
    least = torch.where(free, scores, torch.inf).amin(-1)
    top = torch.where(scores >= least[..., None], scores, 0).sum(-1) - least
    assert bool(((top < tau + 1e-5) | least.isinf()).all())


@given(st.data(), selectors)
def test_more_tau_keeps_a_superset(problems, data, selector):
    problem = data.draw(problems(tau=0.5))
    more = problem.policy.clone()
    more[:, col.TAU] = data.draw(st.floats(0.5, 1.0))
    assert bool((kept(problem, selector) <= kept(problem, selector, more)).all())


@given(st.data(), selectors)
def test_heads_permute(problems, data, selector):
    problem = data.draw(problems())
    order = torch.randperm(problem.k.shape[1], generator=torch.Generator().manual_seed(0))
    group = problem.q.shape[1] // problem.k.shape[1]
    q_order = (order[:, None] * group + torch.arange(group)).flatten()
    ours = kept(problem, selector)[:, q_order]
    other = to_keep(*select(problem.q[:, q_order], problem.k[:, order], problem.policy[q_order],
                            selector=selector, **problem.site))  # fmt: skip
    assert torch.equal(ours, other)


@given(st.data(), st.sampled_from([col.DENSE, col.WINDOWED]))
def test_dense_and_windowed_heads_keep_what_they_see(problems, data, mode):
    problem = data.draw(problems(tau=0.0))
    problem.policy[:, col.MODE] = mode
    visible, _ = surroundings(problem)
    assert torch.equal(kept(problem, "sub8"), visible.expand(kept(problem, "sub8").shape))


@given(st.data())
def test_chunks_change_nothing(problems, data):
    problem = data.draw(problems())
    whole = kept(problem, "sub8")
    size = scores_module.CHUNK_ELEMENTS
    try:
        scores_module.CHUNK_ELEMENTS = 1
        assert torch.equal(kept(problem, "sub8"), whole)
    finally:
        scores_module.CHUNK_ELEMENTS = size


def test_scores_follow_their_definition(policy_tensor):
    """One head, one query block, by hand: rms over sub-rows of softmax mass, sink left out."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, n, 32, generator=generator) for n in (16, 64))
    policy = policy_tensor(1, sink=16)
    scores, _ = block_scores(q, k, policy, mask=Mask(), scale=0.3, selector="sub8",
                             block_m=16, block_n=16)  # fmt: skip
    qs, ks = q[0, 0].view(2, 8, 32).mean(1), k[0, 0].view(8, 8, 32).mean(1)
    p = torch.softmax((qs @ ks.T * 0.3)[:, 2:], -1).view(2, 3, 2).sum(-1)
    rms = p.square().mean(0).sqrt()
    torch.testing.assert_close(scores[0, 0, 0, 1:], rms / rms.sum())
    assert scores[0, 0, 0, 0] == 0


def test_finer_sub_blocks_find_the_needle(policy_tensor):
    """A few rows that need one block much are washed out by a mean over the block."""
    q = torch.zeros(1, 1, 64, 32)
    k = torch.zeros(1, 1, 64 * 8, 32)
    q[0, 0, 16:24, 0] = 6.0
    q[0, 0, 32:64, 0] = -2.0
    k[0, 0, 64 * 5 : 64 * 6, 0] = 8.0
    policy = policy_tensor(1, tau=0.4, sink=0)
    site = {"mask": Mask(), "scale": 32**-0.5, "block_m": 64, "block_n": 64}
    assert to_keep(*select(q, k, policy, selector="sub8", **site))[0, 0, 0, 5]
    assert not to_keep(*select(q, k, policy, selector="mean", **site))[0, 0, 0, 5]


def test_theta_forces_dissimilar_blocks(policy_tensor):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.ones(1, 1, 64, 32), torch.ones(1, 1, 128, 32)
    k[:, :, 32:64] = torch.randn(1, 1, 32, 32, generator=generator)
    policy = policy_tensor(1, tau=0.0, sink=0, theta=0.5)
    site = {"mask": Mask(), "scale": 0.1, "block_m": 32, "block_n": 32}
    keep = to_keep(*select(q, k, policy, selector="mean", **site))
    assert keep[0, 0].tolist() == [[False, True, False, False]] * 2


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_rows_without_finite_scores_stay_dense(policy_tensor, poison):
    q, k = torch.randn(1, 1, 64, 32), torch.randn(1, 1, 128, 32)
    q[0, 0, 40] = poison
    site = {"mask": Mask(), "scale": 0.1, "block_m": 32, "block_n": 32}
    keep = to_keep(*select(q, k, policy_tensor(1, tau=0.1, sink=0), selector="sub8", **site))
    assert keep[0, 0, 1].all()
    assert not keep[0, 0, 0].all()


def test_unknown_selector_names_the_known():
    with pytest.raises(ValueError, match="sub8, sub4, mean"):
        block_scores(torch.zeros(1, 1, 8, 32), torch.zeros(1, 1, 8, 32), torch.zeros(1, 8),
                     mask=Mask(), scale=1.0, selector="sub16", block_m=8, block_n=8)  # fmt: skip


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**31))
def test_lists_round_trip(rows, columns, seed):
    keep = torch.rand(2, 1, rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    counts, indices = from_keep(keep)
    assert torch.equal(to_keep(counts, indices), keep)
    for row, count in zip(indices.flatten(0, 2), counts.flatten(), strict=True):
        assert row[:count].tolist() == sorted(set(row[:count].tolist()))
        assert bool(((row >= 0) & (row < columns)).all())


@pytest.mark.fused_scores
def test_fused_scores_are_the_plain_ones_whatever_came_first(policy_tensor):
    """Code that was made for one query block once gave the first block's scores to all."""
    q, k = torch.randn(1, 2, 192, 32), torch.randn(1, 1, 256, 32)
    site = {"mask": Mask(True, 64), "scale": 0.3, "selector": "sub8", "block_m": 64, "block_n": 64}
    for length_q, length_k in ((64, 256), (192, 256), (192, 64), (130, 200)):
        given = q[:, :, :length_q], k[:, :, :length_k], policy_tensor(2, sink=64)
        want, _ = block_scores(*given, **site)
        got, _ = block_scores(*given, **site, core=dispatch.fused_scores(*given[:2], "sub8"))
        torch.testing.assert_close(got, want)


@pytest.mark.fused_scores
def test_fused_scores_under_a_mask_are_the_plain_ones(policy_tensor):
    q, k = torch.randn(2, 2, 192, 32), torch.randn(2, 1, 256, 32)
    site = {"mask": Mask(True, 64), "scale": 0.3, "block_m": 64, "block_n": 64}
    for ends in ((200, 256), (100, 3)):
        keys = torch.arange(256) < torch.tensor(ends)[:, None]
        data = gathered([keys, None, None, None], (192, 256))
        masked = blocked(data, site["mask"], 192, 256, block_m=64, block_n=64)
        core = dispatch.fused_scores(q, k, "sub8", masked)
        want, got = (
            block_scores(q, k, policy_tensor(2, sink=64), selector="sub8", masked=masked,
                         core=way, **site)[0] for way in (None, core)
        )  # fmt: skip
        torch.testing.assert_close(got, want)
