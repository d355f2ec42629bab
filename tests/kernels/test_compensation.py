"""Tangents of dropped blocks: the plain version, and the CPU path with it."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from afbs_compile.kernels import compensation, dispatch, reference
from afbs_compile.kernels import policy_columns as col
from afbs_compile.kernels.geometry import Blocks, Mask, head_full, head_visible
from afbs_compile.kernels.lists import from_keep, to_keep
from afbs_compile.kernels.selection import select

FEW = settings(max_examples=10, suppress_health_check=list(HealthCheck))
COMPILED = settings(max_examples=6, suppress_health_check=list(HealthCheck))  # seconds each
BLOCKS = {"block_m": 64, "block_n": 64}  # those of the CPU


def some_lists(problem, data):
    """Lists that keep any blocks, also none: not only what a selection would keep."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    shape = (*problem.q.shape[:2], *blocks_of(problem))
    keep = torch.rand(shape, generator=generator) < data.draw(st.sampled_from([0.0, 0.4, 0.9]))
    qb, kb = axes(problem)
    return from_keep(keep & head_visible(problem.mask, problem.policy, qb, kb))


def axes(problem):
    return (
        Blocks.of(problem.q.shape[2], problem.block_m, problem.q.device),
        Blocks.of(problem.k.shape[2], problem.block_n, problem.q.device),
    )


def blocks_of(problem):
    return tuple(len(axis) for axis in axes(problem))


def merged(problem, lists, k=None, v=None):
    """Attention over the lists and over the tangents, merged by their lse; o and lse."""
    k, v = problem.k if k is None else k, problem.v if v is None else v
    args = problem.q, k, v, *lists, problem.policy
    o, lse = reference.forward(*args, **problem.site)
    beside = compensation.attend(*args, **problem.site)
    if beside is None:
        return o, lse
    both = torch.logaddexp(lse, beside[1])
    share = [torch.exp(x - both.clamp(min=-1e30))[..., None] for x in (lse, beside[1])]
    return o * share[0] + beside[0] * share[1], both


@given(st.data())
def test_equals_one_softmax_over_keys_and_tangents(problems, with_tangents, data):
    problem = data.draw(problems(longest=100))
    problem.policy[0, col.MODE] = data.draw(st.sampled_from([col.SPARSE, col.WINDOWED]))
    problem.policy[0, col.SINK] = 0  # a block that window and sink fill together counts as cut
    lists = some_lists(problem, data)
    o, lse = merged(problem, lists)
    args = problem.q, problem.k, problem.v, *lists, problem.policy
    want, want_lse = with_tangents(*args, **problem.site)
    torch.testing.assert_close(o, want.float(), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(lse, want_lse.float(), atol=2e-5, rtol=1e-5)


@given(st.data())
def test_keys_that_are_equal_inside_a_block_lose_nothing(problems, data):
    """Then a tangent is the block itself, whatever its values are."""
    problem = data.draw(problems())
    k = problem.k.clone()
    for start in range(0, k.shape[2], problem.block_n):
        k[:, :, start : start + problem.block_n] = k[:, :, start : start + 1]
    qb, kb = axes(problem)
    # what is partly masked has no tangent: keep it
    keep = to_keep(*some_lists(problem, data))
    keep |= ~head_full(problem.mask, problem.policy, qb, kb)
    keep &= head_visible(problem.mask, problem.policy, qb, kb)
    everything = head_visible(problem.mask, problem.policy, qb, kb).expand(keep.shape)
    o, lse = merged(problem, from_keep(keep), k)
    want, want_lse = merged(problem, from_keep(everything), k)
    torch.testing.assert_close(o, want, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(lse, want_lse, atol=2e-5, rtol=1e-5)


@given(st.data())
def test_mass_is_never_too_large(problems, data):
    problem = data.draw(problems())
    lists = some_lists(problem, data)
    everything = from_keep(
        head_visible(problem.mask, problem.policy, *axes(problem)).expand(
            *problem.q.shape[:2], *blocks_of(problem)
        )
    )
    _, lse = merged(problem, lists)
    args = problem.q, problem.k, problem.v
    _, most = reference.forward(*args, *everything, problem.policy, **problem.site)
    _, least = reference.forward(*args, *lists, problem.policy, **problem.site)
    assert (lse <= most + 1e-4).all()
    assert (lse >= least - 1e-4).all()


@given(st.data())
def test_only_whole_dropped_blocks_are_read(problems, data):
    """NaN in blocks that are kept, hidden or partly masked does not reach the tangents."""
    problem = data.draw(problems())
    lists = some_lists(problem, data)
    drop = compensation.dropped_blocks(
        *lists, problem.policy, mask=problem.mask, length_q=problem.q.shape[2],
        length_k=problem.k.shape[2], **problem.blocks,
    )  # fmt: skip
    k, v = problem.k.clone(), problem.v.clone()
    for block in (~drop).all(2).all(1).all(0).nonzero()[:, 0].tolist():
        for x in (k, v):
            x[:, :, block * problem.block_n : (block + 1) * problem.block_n] = torch.nan
    found = compensation.attend(problem.q, k, v, *lists, problem.policy, **problem.site)
    want = compensation.attend(
        problem.q, problem.k, problem.v, *lists, problem.policy, **problem.site
    )
    assert (found is None) == (want is None) == (not drop.any())
    if found is not None:
        assert torch.equal(found[0], want[0])
        assert torch.equal(found[1], want[1])


def test_nan_in_one_dropped_block_stays_with_the_rows_that_dropped_it():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 96, 32, generator=generator) for _ in range(3))
    v[:, :, 40] = torch.nan
    keep = torch.ones(3, 3, dtype=torch.bool).tril()
    keep[2, 1] = keep[2, 0] = False
    policy = torch.zeros(1, col.COLUMNS)
    site = {"mask": Mask(True), "scale": 0.2, "block_m": 32, "block_n": 32}
    lists = from_keep(keep[None, None])
    o, _ = compensation.attend(q, k, v, *lists, policy, **site)
    assert torch.equal(o[0, 0].isnan().any(-1), torch.arange(96) >= 64)


@given(st.data(), st.sampled_from(["sub8", "mean"]), st.integers(0, 2))
def test_a_selection_drops_no_partly_masked_block(problems, data, selector, neighbours):
    """But for the left edge of a site's window, which no rule forces."""
    problem = data.draw(problems(tau=0.0))
    problem.policy[:, col.NEIGHBOURS] = neighbours
    lists = select(problem.q, problem.k, problem.policy, selector=selector, **problem.site)
    mask = Mask(problem.mask.causal, problem.mask.offset)
    partly = ~head_full(mask, problem.policy, *axes(problem))
    seen = head_visible(problem.mask, problem.policy, *axes(problem))
    assert to_keep(*lists)[(partly & seen).expand(*problem.q.shape[:2], -1, -1)].all()


@given(st.data())
def test_chunks_do_not_matter(problems, data):
    problem = data.draw(problems(longest=100))
    lists = some_lists(problem, data)
    args = problem.q, problem.k, problem.v, *lists, problem.policy
    whole = compensation.attend(*args, **problem.site)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compensation, "CHUNK_ELEMENTS", 1)
        pieces = compensation.attend(*args, **problem.site)
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-5)


@COMPILED
@given(st.data(), st.sampled_from([col.SPARSE, col.WINDOWED, col.DENSE]))
def test_cpu_path_equals_the_oracle(problems, with_tangents, data, mode):
    problem = data.draw(problems(longest=400, one_kind=True, tau=0.3))
    problem.policy[1:, col.MODE] = mode
    site = {"mask": problem.mask, "scale": problem.scale}
    args = problem.q, problem.k, problem.v
    o = dispatch.attention(*args, problem.policy, selector="sub8", compensation="tangent", **site)
    lists = select(*args[:2], problem.policy, selector="sub8", **site, **BLOCKS)
    want, _ = with_tangents(*args, *lists, problem.policy, **site, **BLOCKS)
    torch.testing.assert_close(o, want.float(), atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cpu_path_in_half_precision(policy_tensor, with_tangents, dtype):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, h, 300, 32, generator=generator).to(dtype) for h in (4, 2, 2))
    site = {"mask": Mask(True), "scale": 0.3}
    policy = policy_tensor(4, tau=0.3, sink=64)
    o = dispatch.attention(q, k, v, policy, selector="sub8", compensation="tangent", **site)
    lists = select(q, k, policy, selector="sub8", **site, **BLOCKS)
    want, _ = with_tangents(q, k, v, *lists, policy, **site, **BLOCKS)
    assert o.dtype == dtype
    error = (o.double() - want).norm() / want.norm()
    assert error < (6e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("mode", [col.SPARSE, col.WINDOWED, col.DENSE])
def test_where_nothing_is_dropped_nothing_changes(policy_tensor, mode):
    q, k, v = (torch.randn(2, h, 200, 32) for h in (4, 2, 2))
    policy = policy_tensor(4, mode=mode, tau=1.0)
    call = {"mask": Mask(True), "scale": 0.3, "selector": "sub8"}
    plain, tangent = (
        dispatch.attention(q, k, v, policy, compensation=name, **call)
        for name in compensation.COMPENSATIONS
    )
    assert torch.equal(plain, tangent)


def test_unknown_compensation_is_an_error(policy_tensor):
    q = torch.randn(1, 1, 80, 32)
    with pytest.raises(ValueError, match="'taylor': use one of none, tangent"):
        dispatch.attention(q, q, q, policy_tensor(1), mask=Mask(True), scale=0.3,
                           selector="sub8", compensation="taylor")  # fmt: skip
