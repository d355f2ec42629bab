"""Reference and CPU path against dense attention, and against each other."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from afbs_compile.kernels import dispatch, flex, reference
from afbs_compile.kernels import policy_columns as col
from afbs_compile.kernels.fused import fused
from afbs_compile.kernels.geometry import Mask
from afbs_compile.kernels.selection import select

FEW = settings(max_examples=12, suppress_health_check=list(HealthCheck))
COMPILED = settings(max_examples=6, suppress_health_check=list(HealthCheck))  # seconds each
BLOCKS = {"block_m": 64, "block_n": 64}  # those of the CPU: every other size is a compilation


def relative(x, y):
    return ((x.float() - y.float()).norm() / y.float().norm().clamp(min=1e-12)).item()


@given(st.data())
def test_reference_with_everything_kept_is_dense(problems, data):
    problem = data.draw(problems(tau=1.0))
    lists = select(problem.q, problem.k, problem.policy, selector="sub8", **problem.site)
    out, lse = reference.forward(problem.q, problem.k, problem.v, *lists, problem.policy,
                                 **problem.site)  # fmt: skip
    torch.testing.assert_close(out, problem.dense(), atol=1e-5, rtol=1e-5)
    assert torch.equal(lse.isinf(), ~problem.seen().any(1).expand(lse.shape))


@given(st.data())
def test_what_is_not_listed_cannot_matter(problems, data):
    problem = data.draw(problems(tau=0.5))
    counts, indices = select(problem.q, problem.k, problem.policy, selector="sub8",
                             **problem.site)  # fmt: skip
    out, _ = reference.forward(problem.q, problem.k, problem.v, counts, indices, problem.policy,
                               **problem.site)  # fmt: skip
    listed = set()
    for row, count in zip(indices.flatten(0, 2), counts.flatten(), strict=True):
        listed |= set(row[:count].tolist())
    k, v = problem.k.clone(), problem.v.clone()
    for block in set(range(indices.shape[-1])) - listed:
        k[:, :, block * problem.block_n : (block + 1) * problem.block_n] = torch.nan
        v[:, :, block * problem.block_n : (block + 1) * problem.block_n] = torch.nan
    again, _ = reference.forward(problem.q, k, v, counts, indices, problem.policy, **problem.site)
    assert torch.equal(out, again)


@COMPILED
@given(st.data(), st.sampled_from([col.SPARSE, col.WINDOWED, col.DENSE]))
def test_cpu_path_equals_the_reference(problems, data, mode):
    problem = data.draw(problems(longest=400, one_kind=True))
    problem.policy[:, col.MODE] = mode
    site = problem.site | BLOCKS
    lists = select(problem.q, problem.k, problem.policy, selector="sub8", **site)
    out = flex.forward(problem.q, problem.k, problem.v, *lists, problem.policy, **site)
    want, _ = reference.forward(problem.q, problem.k, problem.v, *lists, problem.policy, **site)
    torch.testing.assert_close(out, want, atol=2e-5, rtol=1e-5)


@pytest.mark.fused_scores
@COMPILED
@given(st.data())
def test_dispatch_with_density_one_is_dense(problems, data):
    problem = data.draw(problems(longest=400, tau=1.0, one_kind=True))
    out = dispatch.attention(problem.q, problem.k, problem.v, problem.policy, mask=problem.mask,
                             scale=problem.scale, selector="sub8")  # fmt: skip
    torch.testing.assert_close(out, problem.dense(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cpu_path_in_half_precision(policy_tensor, dtype):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, h, 300, 64, generator=generator).to(dtype) for h in (4, 2, 2))
    site = {"mask": Mask(True), "scale": 0.125} | BLOCKS
    policy = policy_tensor(4, tau=0.6, sink=64)
    lists = select(q, k, policy, selector="sub8", **site)
    out = flex.forward(q, k, v, *lists, policy, **site)
    want, _ = reference.forward(q.float(), k.float(), v.float(), *lists, policy, **site)
    assert out.dtype == dtype
    assert relative(out, want) < (3e-3 if dtype == torch.bfloat16 else 1e-3)


@FEW
@given(st.data())
def test_dense_is_sdpa_under_the_mask(problems, data):
    problem = data.draw(problems())
    out = dispatch.dense(problem.q, problem.k, problem.v, mask=problem.mask, scale=problem.scale)
    seen = problem.seen().any(1)
    torch.testing.assert_close(out[:, :, seen], problem.dense()[:, :, seen], atol=1e-5, rtol=1e-5)


@pytest.mark.fused_scores
def test_one_compilation_serves_all_lengths(policy_tensor, fresh_dynamo):
    fused.cache_clear()
    torch._dynamo.utils.counters.clear()
    policy = policy_tensor(2, tau=0.5)
    for length in (300, 257, 512, 640):
        q, k = torch.randn(1, 2, length, 32), torch.randn(1, 1, length, 32)
        dispatch.attention(q, k, k, policy, mask=Mask(True), scale=0.2, selector="sub8")
    # scores and attention; torch 2.11 takes one size for another at first and compiles once more
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
