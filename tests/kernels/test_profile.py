"""The one-pass profile against running every threshold."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from afbs_compile.kernels import policy_columns as col
from afbs_compile.kernels import reference
from afbs_compile.kernels.profile import profile
from afbs_compile.kernels.scores import SELECTORS
from afbs_compile.kernels.selection import select


@given(st.data(), st.sampled_from(SELECTORS), st.sampled_from([0.05, 0.3, 0.7, 0.95, 0.999]))
def test_profile_knows_the_error_of_every_tau(problems, data, selector, tau):
    problem = data.draw(problems(tau=1.0))
    tables = profile(problem.q, problem.k, problem.v, problem.policy, selector=selector,
                     **problem.site)  # fmt: skip
    exact, _ = run(problem, problem.policy, selector)
    policy = problem.policy.clone()
    policy[:, col.TAU] = tau
    out, counts = run(problem, policy, selector)
    wanted = (out - exact).abs().sum(-1).split(problem.block_m, 2)
    wanted = torch.stack([rows.sum(2) for rows in wanted], 2)
    extra = (tables.before < tau).sum(-1)
    extra = torch.where(tables.forced == 0, extra.clamp(min=1), extra)
    extra = torch.minimum(extra, tables.visible - tables.forced)
    found = tables.error.gather(-1, extra[..., None])[..., 0]
    assert torch.equal((extra + tables.forced).int(), counts)
    norm = exact.abs().sum()
    torch.testing.assert_close(found / norm, wanted / norm, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(tables.norm.sum(), norm, rtol=1e-5, atol=1e-5)


def run(problem, policy, selector):
    lists = select(problem.q, problem.k, policy, selector=selector, **problem.site)
    out, _ = reference.forward(problem.q, problem.k, problem.v, *lists, policy, **problem.site)
    return out, lists[0]


@given(st.data())
def test_sampled_rows_are_rows_of_the_whole(problems, data):
    problem = data.draw(problems())
    whole = profile(problem.q, problem.k, problem.v, problem.policy, selector="sub8",
                    **problem.site)  # fmt: skip
    blocks = whole.error.shape[2]
    some = torch.tensor(sorted(data.draw(st.sets(st.integers(0, blocks - 1), min_size=1))))
    part = profile(problem.q, problem.k, problem.v, problem.policy, selector="sub8", rows=some,
                   **problem.site)  # fmt: skip
    torch.testing.assert_close(part.error, whole.error[:, :, some])
    assert torch.equal(part.before, whole.before[:, :, some])
