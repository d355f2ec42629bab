"""A mask that comes with the call hides exactly what it says; hidden keys count for nothing."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import afbs_compile.kernels.op  # noqa: F401  registers the op
from afbs_compile.kernels import dispatch, flex, reference
from afbs_compile.kernels import policy_columns as col
from afbs_compile.kernels.data_mask import DataMask, blocked, gathered
from afbs_compile.kernels.lists import to_keep
from afbs_compile.kernels.profile import profile
from afbs_compile.kernels.scores import SELECTORS
from afbs_compile.kernels.selection import select

KINDS = ("right", "left", "holes", "segments", "packed", "elements", "shared elements")


def call(problem, parts, policy=None, **more):
    """The op on a problem."""
    mask, policy = problem.mask, problem.policy if policy is None else policy
    more = {"min_length": 0, "compensation": "none"} | more
    return torch.ops.afbs.attention(
        problem.q, problem.k, problem.v, policy, mask.causal, mask.offset, mask.window,
        problem.scale, "sub8", *more.values(), *parts,
    )  # fmt: skip


def gather(problem, parts):
    return gathered(parts, (problem.q.shape[2], problem.k.shape[2]))


def look(problem, parts):
    return blocked(gather(problem, parts), problem.mask, problem.q.shape[2], problem.k.shape[2],
                   **problem.blocks)  # fmt: skip


@settings(max_examples=40)
@given(st.data())
def test_blocks_are_visible_if_a_pair_is(problems, data_masks, hidden_dense, data):
    problem = data.draw(problems())
    parts = data.draw(data_masks(problem, KINDS))
    found = look(problem, parts)
    _, seen = hidden_dense(problem, parts)
    m, n = problem.block_m, problem.block_n
    for i, j in itertools.product(*(range(size) for size in found.some.shape[2:])):
        block = seen[:, :, i * m : (i + 1) * m, j * n : (j + 1) * n].flatten(2)
        assert torch.equal(found.some[:, :, i, j].expand(block.shape[:2]), block.any(2))
        assert torch.equal(found.every[:, :, i, j].expand(block.shape[:2]), block.all(2))


@settings(max_examples=40)
@given(st.data(), st.sampled_from(SELECTORS))
def test_lists_hold_no_hidden_block(problems, data_masks, hidden_dense, data, selector):
    problem = data.draw(problems())
    parts = data.draw(data_masks(problem, KINDS))
    masked = look(problem, parts)
    lists = select(problem.q, problem.k, problem.policy, selector=selector, masked=masked,
                   **problem.site)  # fmt: skip
    keep = to_keep(*lists)
    assert not (keep & ~masked.some).any()
    assert torch.equal(keep.any(3), masked.some.any(3).expand(keep.shape[:3]))
    out, lse = reference.forward(problem.q, problem.k, problem.v, *lists, problem.policy,
                                 data=masked.data, **problem.site)  # fmt: skip
    wanted, seen = hidden_dense(problem, parts)
    dense = problem.policy.clone()
    dense[:, col.TAU] = 1.0
    everything = select(problem.q, problem.k, dense, selector=selector, masked=masked,
                        **problem.site)  # fmt: skip
    exact, _ = reference.forward(problem.q, problem.k, problem.v, *everything, dense,
                                 data=masked.data, **problem.site)  # fmt: skip
    torch.testing.assert_close(exact, wanted, atol=1e-5, rtol=1e-5)
    assert out.isfinite().all()
    assert (lse[~seen.any(3)] == -math.inf).all()


@settings(max_examples=40)
@given(st.data(), st.sampled_from(SELECTORS))
def test_hidden_keys_have_no_mass(problems, data_masks, data, selector):
    problem = data.draw(problems())
    parts = data.draw(data_masks(problem, ("right", "left", "holes")))
    masked = look(problem, parts)
    k = problem.k.clone()
    hidden = ~masked.data.keys[:, None, :, None].expand(k.shape)
    k[hidden] = math.nan
    before, after = (
        to_keep(*select(problem.q, x, problem.policy, selector=selector, masked=masked,
                        **problem.site))
        for x in (problem.k, k)
    )  # fmt: skip
    assert torch.equal(before, after)


@settings(max_examples=15)
@given(st.data(), st.sampled_from([0.5, 0.9, 1.0]))
def test_op_is_attention_over_the_blocks_that_it_keeps(
    problems, data_masks, hidden_dense, data, tau
):
    problem = data.draw(problems(tau=tau, one_kind=True, longest=256))
    parts = data.draw(data_masks(problem))
    out = call(problem, parts)
    block_m, block_n = dispatch.block_sizes("cpu")
    blocks = {"block_m": block_m, "block_n": block_n}
    sizes = problem.q.shape[2], problem.k.shape[2]
    masked = blocked(gather(problem, parts), problem.mask, *sizes, **blocks)
    site = {"mask": problem.mask, "scale": problem.scale} | blocks
    lists = select(problem.q, problem.k, problem.policy, selector="sub8", masked=masked, **site)
    wanted, _ = reference.forward(problem.q, problem.k, problem.v, *lists, problem.policy,
                                  data=masked.data, **site)  # fmt: skip
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    if tau == 1.0:
        exact, _ = hidden_dense(problem, parts)
        torch.testing.assert_close(out, exact, atol=1e-5, rtol=1e-5)


@given(st.data())
def test_dense_calls_have_the_mask_too(problems, data_masks, hidden_dense, data):
    problem = data.draw(problems())
    parts = data.draw(data_masks(problem, KINDS))
    wanted, seen = hidden_dense(problem, parts)
    out = call(problem, parts, min_length=1000)
    assert out.isfinite().all()
    torch.testing.assert_close(
        out.masked_fill(~seen.any(3)[..., None], 0), wanted, atol=1e-5, rtol=1e-5
    )


@settings(max_examples=25)
@given(st.data(), st.sampled_from(SELECTORS), st.sampled_from([0.3, 0.9]))
def test_profile_knows_the_error_under_the_mask(
    problems, data_masks, hidden_dense, data, selector, tau
):
    problem = data.draw(problems(tau=tau))
    parts = data.draw(data_masks(problem, KINDS))
    masked = look(problem, parts)
    args = problem.q, problem.k, problem.v
    tables = profile(*args, problem.policy, selector=selector, data=masked.data, **problem.site)
    counts, indices = select(problem.q, problem.k, problem.policy, selector=selector,
                             masked=masked, **problem.site)  # fmt: skip
    out, _ = reference.forward(*args, counts, indices, problem.policy, data=masked.data,
                               **problem.site)  # fmt: skip
    exact, _ = hidden_dense(problem, parts)
    visible = masked.some.sum(3).expand(counts.shape)
    assert torch.equal(tables.visible, visible)
    extra = (counts - tables.forced).long()
    assert (extra >= 0).all()
    before = (tables.before < tau).sum(-1)
    before = torch.where(tables.forced == 0, before.clamp(min=1), before)
    assert torch.equal(torch.minimum(before, visible - tables.forced), extra)
    found = tables.error[0].gather(-1, extra[..., None])[..., 0]
    parts_of = [x.sum((2, 3)) for x in (out - exact).abs().split(problem.block_m, 2)]
    wanted, norm = torch.stack(parts_of, 2), exact.abs().sum().clamp(min=1e-3)
    torch.testing.assert_close(found / norm, wanted / norm, atol=1e-5, rtol=1e-4)


def test_key_padding_under_another_name():
    keys = torch.rand(2, 70) < 0.5
    for given_as in (keys[:, None, None], keys[:1, None, None]):
        found = gathered([None, None, None, given_as], (50, 70))
        assert found.elements is None
        assert torch.equal(found.keys, given_as[:, 0, 0])
    assert gathered([None] * 4, (5, 5)) is None
    assert gathered([], (5, 5)) is None
    assert gathered([None, None, None, torch.ones(9, 7).bool()], (9, 7)).elements.dim() == 4


def test_part_of_a_mask():
    q_segments, k_segments = (torch.arange(n)[None] // 7 for n in (20, 30))
    elements = torch.rand(1, 3, 20, 30) < 0.5
    data = DataMask(torch.rand(2, 30) < 0.5, q_segments, k_segments, elements)
    part = data.part(slice(4, 11), slice(25))
    assert torch.equal(part.tokens(0, 7), data.tokens(4, 11)[..., :25])
    assert data.kind == "key padding + segments + elements"


def test_what_has_no_kernel_is_refused(problems, policy_tensor):
    q = torch.rand(1, 1, 40, 32)
    policy, keys = policy_tensor(1), torch.ones(1, 40, dtype=torch.bool)
    site = (False, 0, 0, 0.3, "sub8", 0)
    with pytest.raises(ValueError, match="depend on data with compensation 'tangent'"):
        torch.ops.afbs.attention(q, q, q, policy, *site, "tangent", keys)
    short = torch.ops.afbs.attention(
        q.requires_grad_(), q, q, policy, *site[:-1], 100, "none", keys
    )
    short.sum().backward()
    assert q.grad is not None


def test_one_compilation_serves_all_paddings(policy_tensor, monkeypatch):
    kinds = set()

    def record(function, kind):
        kinds.add((function.__name__, kind))
        return lambda q, *rest: torch.zeros_like(q)

    monkeypatch.setattr(flex, "fused", record)
    for length in (70, 100):
        q = torch.rand(2, 2, length, 32)
        for ends in ((length, length), (3, 64), (0, 1)):
            keys = torch.arange(length) < torch.tensor(ends)[:, None]
            site = (policy_tensor(2), False, 0, 0, 0.3, "sub8", 0, "none")
            torch.ops.afbs.attention(q, q, q, *site, keys)
    assert len(kinds) == 1
