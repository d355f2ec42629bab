"""Are the benchmark's masks the same for all who are compared, and is its judge fair?"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afbs_compile.bench import baselines, checks, problems
from afbs_compile.bench.problems import BLOCK_M, BLOCK_N, Shape
from afbs_compile.kernels import reference
from afbs_compile.kernels.geometry import Mask
from afbs_compile.kernels.lists import from_keep, to_keep

BLOCKS = {"block_m": BLOCK_M, "block_n": BLOCK_N}
LENGTHS = st.integers(1, 700)
KEPT = st.sampled_from([0.0, 0.3, 1.0])


@given(
    shape=st.builds(
        Shape,
        st.integers(1, 1 << 20),
        st.booleans(),
        st.sampled_from([64, 128]),
        st.sampled_from([1, 8, 32]),
    )
)
def test_a_shape_is_what_it_prints(shape):
    assert Shape.parse(str(shape)) == shape


def test_a_short_shape():
    assert Shape.parse("8192") == Shape(8192, False, 128, 32)
    assert Shape.parse(" 16384:causal:d64:kv8") == Shape(16384, True, 64, 8)


@pytest.mark.parametrize("text", ["", "x", "8192:big", "0", "8192:d0", "8192:kv5", "8192:d64:kvx"])
def test_no_shape(text):
    with pytest.raises(ValueError, match="is no shape; give LENGTH"):
        Shape.parse(text)


@given(length=LENGTHS, causal=st.booleans(), kept=KEPT)
def test_flex_visits_our_blocks(small, length, causal, kept):
    problem = small(length, causal)
    keep = problems.random_keep(problem, kept)
    mask = baselines.block_mask(problem, from_keep(keep), backward=True)
    assert torch.equal(mask.to_dense().bool(), keep)
    full = to_keep(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (full & to_keep(mask.kv_num_blocks, mask.kv_indices)).any()
    i, j = torch.arange(length)[:, None], torch.arange(length)
    pairs = mask.mask_mod(0, 0, i, j) if causal else torch.ones(length, length, dtype=torch.bool)
    for _, h, m, n in full.nonzero().tolist():
        assert pairs[m * BLOCK_M : (m + 1) * BLOCK_M, n * BLOCK_N : (n + 1) * BLOCK_N].all(), h


@given(length=LENGTHS, causal=st.booleans(), kept=KEPT)
def test_coarse_blocks_are_the_same_pairs(small, length, causal, kept):
    problem = small(length, causal)
    coarse = problems.random_keep(problem, kept, 2 * BLOCK_N)
    fine = problems.halved(problem, coarse)
    i, j = torch.arange(length)[:, None], torch.arange(length)
    allowed = (j <= i) | (not causal)

    def pairs(keep, block_n):
        rows = keep.repeat_interleave(BLOCK_M, -2)[..., :length, :]
        return rows.repeat_interleave(block_n, -1)[..., :length] & allowed

    assert torch.equal(pairs(coarse, 2 * BLOCK_N), pairs(fine, BLOCK_N))
    if kept == 1:
        assert problems.share(problem, from_keep(fine)[0]) == 1


@settings(max_examples=8)
@given(length=st.integers(200, 500), causal=st.booleans(), kv_heads=st.integers(1, 2))
def test_the_judge_agrees_with_the_reference_and_sees_a_fault(small, length, causal, kv_heads):
    problem = small(length, causal, kv_heads)
    lists = from_keep(problems.random_keep(problem, 0.4))
    q, k, v = (x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v))
    o, _ = reference.forward(
        q, k, v, *lists, problems.policy(1.0, 2, "cpu"),
        mask=Mask(causal), scale=problem.scale, **BLOCKS,
    )  # fmt: skip
    assert checks.forward_error(problem, lists, o) < 1e-5
    assert checks.forward_error(problem, lists, o * 1.01) > checks.FORWARD_BAR
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(0))
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), do)
    assert checks.backward_error(problem, lists, do, (dq, dk, dv)) < 1e-5
    for wrong in ((dq * 1.01, dk, dv), (dq, dk * 1.01, dv), (dq, dk, dv * 1.01)):
        assert checks.backward_error(problem, lists, do, wrong) > checks.BACKWARD_BAR


@pytest.mark.parametrize("error", [1.0, float("nan")])
def test_a_wrong_result_is_an_error(error):
    with pytest.raises(checks.WrongResult, match="forward 8192"):
        checks.require("forward 8192", error, checks.FORWARD_BAR)


def test_clustered_inputs_have_topics(small):
    noise, topics = (small(600, kind=kind).q[0, 0] for kind in ("randn", "clustered"))
    near = [torch.cosine_similarity(x[:-1], x[1:], dim=-1).mean() for x in (noise, topics)]
    assert near[0] < 0.1
    assert near[1] > 0.3
