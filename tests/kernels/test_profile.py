"""The one-pass profile against running every threshold."""

import math

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from afbs_compile.kernels import compensation, lists, profile_rows, reference
from afbs_compile.kernels import policy_columns as col
from afbs_compile.kernels.data_mask import gathered
from afbs_compile.kernels.geometry import token_visible
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
    found = tables.error[0].gather(-1, extra[..., None])[..., 0]
    computed = tables.computed[0].gather(-1, extra[..., None])[..., 0]
    assert torch.equal(computed, counts)
    assert torch.equal((extra + tables.forced).int(), counts)
    norm = exact.abs().sum()
    torch.testing.assert_close(found / norm, wanted / norm, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(tables.norm.sum(), norm, rtol=1e-5, atol=1e-5)


@given(st.data(), st.sampled_from([0.0, 0.3, 0.7, 0.95]), st.sampled_from([-math.inf, -2.0]))
def test_profile_with_tangents_is_what_attention_with_them_does(
    problems, with_tangents, data, tau, level
):
    problem = data.draw(problems(longest=100, tau=tau))
    q, k, v, policy, site = problem.q, problem.k, problem.v, problem.policy, problem.site
    tables = profile(
        q, k, v, policy, selector="sub8", lambdas=(level,), compensation="tangent", **site
    )
    counts, indices = select(q, k, policy, selector="sub8", **site)
    exact, _ = run(problem, policy, "sub8", tau=1.0)
    if level == -math.inf:
        out, _ = with_tangents(q, k, v, counts, indices, policy, **site)
    else:  # what lambda leaves out is listed, and so has no tangent
        out = without(problem, counts, indices, gains(problem) >= level)
    extra = (counts - tables.forced).long()[..., None]
    found = tables.error[0].gather(-1, extra)[..., 0]
    wanted = [part.sum((2, 3)) for part in (out - exact).abs().split(problem.block_m, 2)]
    wanted, norm = torch.stack(wanted, 2).float(), exact.abs().sum()
    torch.testing.assert_close(found / norm, wanted / norm, atol=1e-5, rtol=1e-4)


def without(problem, counts, indices, live):
    """Kept blocks that are `live`, and tangents, merged by their lse."""
    args = problem.q, problem.k, problem.v
    beside = compensation.attend(*args, counts, indices, problem.policy, **problem.site)
    live = lists.from_keep(lists.to_keep(counts, indices) & live)
    o, lse = reference.forward(*args, *live, problem.policy, **problem.site)
    if beside is None:
        return o
    total = torch.logaddexp(lse, beside[1]).clamp(min=-1e30)
    return sum(x * torch.exp(y - total)[..., None] for x, y in ((o, lse), beside))


def run(problem, policy, selector, tau=None):
    if tau is not None:
        policy = policy.clone()
        policy[:, col.TAU] = tau
    found = select(problem.q, problem.k, policy, selector=selector, **problem.site)
    out, _ = reference.forward(problem.q, problem.k, problem.v, *found, policy, **problem.site)
    return out, found[0]


@given(st.data())
def test_sampled_rows_are_rows_of_the_whole(problems, data):
    problem = data.draw(problems())
    whole = profile(problem.q, problem.k, problem.v, problem.policy, selector="sub8",
                    **problem.site)  # fmt: skip
    blocks = whole.error.shape[3]
    some = torch.tensor(sorted(data.draw(st.sets(st.integers(0, blocks - 1), min_size=1))))
    part = profile(problem.q, problem.k, problem.v, problem.policy, selector="sub8", rows=some,
                   **problem.site)  # fmt: skip
    torch.testing.assert_close(part.error, whole.error[:, :, :, some])
    assert torch.equal(part.before, whole.before[:, :, some])


@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(st.data(), st.sampled_from(["plain", "tangent", "data", "bias"]))
def test_groups_together_or_one_by_one(problems, data_masks, biases, monkeypatch, data, kind):
    """A GPU takes all KV groups at once, a CPU one after the other."""
    problem, more = data.draw(problems()), {}
    lengths = problem.q.shape[2], problem.k.shape[2]
    if kind == "tangent":
        more = {"compensation": "tangent"}
    elif kind == "data":
        more = {"data": gathered(data.draw(data_masks(problem)), lengths)}
    elif kind == "bias":
        more = {"data": gathered([None] * 4 + [data.draw(biases(problem))], lengths)}
    found = []
    for together in (lambda _, groups: groups, lambda _, groups: 1):
        monkeypatch.setattr(profile_rows, "groups_together", together)
        found.append(
            profile(problem.q, problem.k, problem.v, problem.policy, selector="sub8",
                    lambdas=(-math.inf, -2.0), **more, **problem.site)
        )  # fmt: skip
    torch.testing.assert_close(found[0].error, found[1].error, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[0].norm, found[1].norm)
    assert torch.equal(found[0].computed, found[1].computed)


@given(st.data(), st.sampled_from([0.3, 0.9, 1.0]), st.sampled_from([-12.0, -3.0, -1.0, -0.1]))
def test_profile_knows_what_lambda_leaves_out(problems, data, tau, level):
    problem = data.draw(problems())
    q, k, v, policy, site = problem.q, problem.k, problem.v, problem.policy, problem.site
    tables = profile(q, k, v, policy, selector="sub8", lambdas=(-math.inf, level), **site)
    policy = policy.clone()
    policy[:, col.TAU] = tau
    counts, indices = select(q, k, policy, selector="sub8", **site)
    keep = lists.to_keep(counts, indices) & (gains(problem) >= level)
    out, _ = reference.forward(q, k, v, *lists.from_keep(keep), policy, **site)
    exact, _ = run(problem, problem.policy, "sub8", tau=1.0)
    extra = (counts - tables.forced).long()[..., None]
    found = tables.error[1].gather(-1, extra)[..., 0].sum()
    torch.testing.assert_close(
        found / exact.abs().sum(), (out - exact).abs().sum() / exact.abs().sum(),
        atol=1e-6, rtol=1e-4,
    )  # fmt: skip
    assert torch.equal(tables.computed[1].gather(-1, extra)[..., 0], keep.sum(-1).int())


def gains(problem):
    """By how much each block comes closest to a row's largest score, log2 units `[B, H, I, J]`."""
    q, k = problem.q.float(), problem.k.float()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    i, j = torch.arange(q.shape[2]), torch.arange(k.shape[2])
    seen = token_visible(problem.site["mask"], problem.policy, i, j)
    s = (q @ k.transpose(-1, -2) * problem.site["scale"]).masked_fill(~seen, -math.inf)
    s = s - s.amax(-1, keepdim=True).clamp(min=-1e30)
    rows = [part.amax(2) for part in s.split(problem.block_m, 2)]
    blocks = [torch.stack(rows, 2)[..., n : n + problem.site["block_n"]].amax(-1)
              for n in range(0, k.shape[2], problem.site["block_n"])]  # fmt: skip
    return torch.stack(blocks, -1) * math.log2(math.e)
